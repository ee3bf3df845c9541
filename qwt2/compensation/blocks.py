"""Compensation of a block's output, by modules that follow the block in the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwt2.capture.blocks import ends
from qwt2.capture.graph import GraphModel, replace
from qwt2.quantization.info import quantization_info
from qwt2.quantization.layers import QuantizedModule, per_channel
from qwt2.quantization.walk import Visit, Walk

CHILD = "compensation"


class BlockCompensation(QuantizedModule):
    """Base of modules that compensate a block, given its input x and output y; unfitted ones return y.

    Attributes:
        is_fitted: False in this base class, whose modules only mark the place.
    """

    is_fitted = False

    def full_precision(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the block's output unchanged."""
        return y

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the compensated output, given the block's input ``x`` and output ``y``."""
        return y

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments other than tensors, as values for JSON."""
        return {}


class LinearCompensation(BlockCompensation):
    """QwT's linear map beside a block: y + W x + b (arXiv 2411.13918).

    Args:
        weight: (C_out, C_in) for tokens (the last axis holds channels), or (C_out, C_in / groups, k, k) for images; in
            the type in which it is stored.
        bias: (C_out,).
        stride, groups: stride and groups of the convolution.
        arithmetic: type of the multiplication. "float16" follows the paper's code: the half-precision result is
            converted to float32, and the bias is added. CPU engines do not have such kernels and need "float32".
    """

    is_fitted = True

    def __init__(self, weight: Tensor, bias: Tensor, stride: Any = 1, groups: int = 1, arithmetic: str = "float32"):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias.float())
        self.stride, self.groups, self.arithmetic = stride, groups, arithmetic

    def added(self, x: Tensor) -> Tensor:
        """Return W x + b, (..., C_out) or (N, C_out, H', W')."""
        arithmetic = getattr(torch, self.arithmetic)
        x, weight = x.to(arithmetic), self.weight.to(arithmetic)
        if weight.dim() == 2:
            return F.linear(x, weight).float() + self.bias
        y = F.conv2d(x, weight, None, self.stride, weight.shape[-1] // 2, 1, self.groups)
        return y.float() + self.bias.reshape(1, -1, 1, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See :meth:`BlockCompensation.forward`."""
        return y + self.added(x) if self.quantized else y

    def settings(self) -> dict[str, Any]:
        """See :meth:`BlockCompensation.settings`."""
        return {"stride": self.stride, "groups": self.groups, "arithmetic": self.arithmetic}


class AffineCompensation(BlockCompensation):
    """A channel-wise affine map of a block's output: alpha * y + beta.

    Args:
        alpha, beta: parameters per channel, (C,).
        channel_axis: channel axis of the output.
    """

    is_fitted = True

    def __init__(self, alpha: Tensor, beta: Tensor, channel_axis: int):
        super().__init__()
        self.channel_axis = channel_axis
        self.register_buffer("alpha", alpha)
        self.register_buffer("beta", beta)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See :meth:`BlockCompensation.forward`."""
        if not self.quantized:
            return y
        return y * per_channel(self.alpha, y, self.channel_axis) + per_channel(self.beta, y, self.channel_axis)

    def settings(self) -> dict[str, Any]:
        """See :meth:`BlockCompensation.settings`."""
        return {"channel_axis": self.channel_axis}


def put_behind(model: GraphModel, block: str, module: BlockCompensation) -> str:
    """Insert a module after a block, and return its name.

    The module reads the block's input and output. All readers of the block's output then read the module's output.
    """
    if block not in compensated_blocks(model):
        model.edit(_insert_behind, block)
    name = f"{block}.{CHILD}"
    model.set_module(name, module.train(model.training))
    return name


def _insert_behind(model: GraphModel, block: str) -> None:
    found = ends(model, block)
    assert found is not None, block  # blocks are chosen by their ends
    x, y = found
    name = f"{block}.{CHILD}"
    model.set_module(name, BlockCompensation())
    with model.graph.inserting_after(y):
        node = model.graph.call_module(name, (x, y))
    node.meta = dict(y.meta)
    y.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def remove(model: GraphModel, block: str) -> None:
    """Remove the module after a block."""
    model.edit(_take_away, block)


def _take_away(model: GraphModel, block: str) -> None:
    for node in [node for node in model.graph.nodes if node.op == "call_module" and node.target == f"{block}.{CHILD}"]:
        replace(node, node.args[1])
    del model.get_submodule(block)._modules[CHILD]


def compensated_blocks(model: GraphModel) -> dict[str, BlockCompensation]:
    """Return the compensation modules by the names of their blocks."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, BlockCompensation)}
    return {name.removesuffix(f".{CHILD}"): module for name, module in modules.items()}


def visits_behind_blocks(walk: Walk) -> Iterator[tuple[Visit, str]]:
    """Yield a visit after every block of the model, and the block's name; at the end, remove unfitted modules."""
    blocks = {
        put_behind(walk.model, block, BlockCompensation()): block for block in quantization_info(walk.model).blocks
    }
    for visit in walk.visits(BlockCompensation):
        yield visit, blocks[visit.name]
    for block, module in compensated_blocks(walk.model).items():
        if not module.is_fitted:
            remove(walk.model, block)
