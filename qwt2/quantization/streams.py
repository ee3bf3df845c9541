"""Residual streams: where a layer's output is added to the values that its block started from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qwt2.capture.graph import GraphModel, Sum
from qwt2.capture.wiring import is_bijection
from qwt2.quantization.layers import QuantizedAdd


@dataclass(frozen=True)
class Joint:
    """The addition of a layer's output to a residual stream.

    Attributes:
        call: the layer's call.
        moves: nodes between the layer and the addition, which only reorder values.
        addition: the sum.
        side: position of the shortcut among the sum's two operands.
    """

    call: fx.Node
    moves: tuple[fx.Node, ...]
    addition: fx.Node
    side: int

    @property
    def shortcut(self) -> fx.Node:
        """The other operand: the stream before the addition."""
        return self.addition.args[self.side]

    def moved_back(self, model: GraphModel, values: Any, moved: Tensor, like: Tensor) -> Tensor:
        """Bring values from the order that the addition sees into the order of the layer's output.

        Args:
            model: the model.
            values: the values alive in front of the layer, by node.
            moved: values as the addition sees them.
            like: the layer's output.
        """
        if not self.moves:
            return moved
        places = values.copy()
        places[self.call] = torch.arange(like.numel(), device=like.device).reshape(like.shape)
        for node in self.moves:
            places[node] = model.evaluate(node, places)
        back = torch.empty_like(like).flatten()
        back[places[self.moves[-1]].flatten()] = moved.flatten()
        return back.reshape(like.shape)


def joint(model: GraphModel, call: fx.Node) -> Joint | None:
    """Return where a layer's output is added to a residual stream; ``None`` if it is read in any other way."""
    node = call
    moves: list[fx.Node] = []
    while len(node.users) == 1:
        [user] = node.users
        if isinstance(model.module_of(user), (Sum, QuantizedAdd)):
            return Joint(call, tuple(moves), user, 1 - user.args.index(node))
        if not is_bijection(user):
            return None
        moves.append(user)
        node = user
    return None


def branch_end(model: GraphModel, call: fx.Node) -> fx.Node | None:
    """Return the first sum, in execution order, of a value that depends on ``call`` and one that does not."""
    dependent = {call}
    for node in call.graph.nodes:
        reads = [source in dependent for source in node.all_input_nodes]
        if any(reads):
            if isinstance(model.module_of(node), (Sum, QuantizedAdd)) and not all(reads):
                return node
            dependent.add(node)
    return None
