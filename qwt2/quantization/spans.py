"""Spans: parts of a network that read one activation and give one, for methods that learn on a part as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from qwt2.capture.blocks import belongs, ends
from qwt2.capture.graph import GraphModel
from qwt2.quantization.info import channel_axis
from qwt2.quantization.layers import QuantizedModule
from qwt2.quantization.walk import Walk


@dataclass(frozen=True)
class Span:
    """A part of the graph, by the names of its nodes, which other image sizes share.

    Attributes:
        modules: names of its quantized modules, in execution order.
        x: the node it reads.
        first: its first node.
        y: the node whose value it gives.
        axis: channel axis of that value.
    """

    modules: tuple[str, ...]
    x: str
    first: str
    y: str
    axis: int

    def values(self, walk: Walk) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield (batch number, quantized input, full-precision input, full-precision output) for every batch.

        The quantized network stays in front of the span, whose modules may then be changed.
        """
        for index, route in enumerate(walk.routes):
            start, stop = route.positions[route.by_name[self.first]], route.positions[route.by_name[self.y]] + 1
            before = walk.quantized.advance(index, start)
            walk.quantized.hold(index, (start, before))
            exact = walk.reference.advance(index, start)
            x_f = exact[route.by_name[self.x]]
            walk.reference.run(index, exact, start, stop)
            walk.reference.hold(index, (stop, exact))
            yield index, before[route.by_name[self.x]], x_f, exact[route.by_name[self.y]]

    def run_first(self, walk: Walk, run_module: Callable) -> None:
        """Run the quantized network's first batch through the span; the network stays where it is.

        Args:
            walk: the calibration set on its way, in front of the span.
            run_module: computes a module's output, given the module and its arguments.
        """
        route = walk.routes[0]
        start, stop = route.positions[route.by_name[self.first]], route.positions[route.by_name[self.y]] + 1
        walk.quantized.run(0, walk.quantized.advance(0, start).copy(), start, stop, run_module)

    def network(self, walk: Walk, index: int) -> GraphModel:
        """Return the span as a model for images of a batch's size; it shares the modules and returns a tuple."""
        route = walk.routes[index]
        return route.model.between(route.by_name[self.x], [route.by_name[self.y]])


def span_of_layer(model: GraphModel, call: fx.Node) -> Span:
    """Return the span of one call of a layer."""
    name = str(call.target)
    return Span((name,), call.args[0].name, call.name, call.name, model.get_submodule(name).channel_axis)


def span_of_block(model: GraphModel, block: str) -> Span | None:
    """Return a block's span.

    ``None`` stands for a block that reads values other than its input, shares modules with others, or is not computed
    in one piece.
    """
    found = ends(model, block)
    if found is None:
        return None
    x, y = found
    nodes = list(model.graph.nodes)
    first = next(number for number, node in enumerate(nodes) if belongs(node, block))
    calls = model.calls(QuantizedModule)
    between = nodes[first : nodes.index(y) + 1]
    modules = [str(n.target) for n in between if isinstance(model.module_of(n), QuantizedModule)]
    part = model.between(x, [y])
    if len(part.inputs) > 1 or {*part.calls(QuantizedModule)} != {*modules} or any(len(calls[m]) > 1 for m in modules):
        return None
    return Span(tuple(modules), x.name, nodes[first].name, y.name, channel_axis(model, block))
