"""A record of what was quantized and how, and what stayed in float."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from qwt2.capture.blocks import is_inside
from qwt2.capture.graph import GraphModel
from qwt2.errors import Qwt2Error
from qwt2.quantization.layers import QuantizedConv2d, QuantizedLayer
from qwt2.quantization.precision import Precision
from qwt2.quantization.request import Request


@dataclass
class QuantizationInfo:
    """A record of a model's quantization; every quantized model has it as its attribute ``quantization``.

    Attributes:
        request: the user's request.
        layers: quantized Linear and Conv2d modules in execution order.
        matmuls: quantized products of activations.
        additions: residual additions with quantized operands.
        poolings: poolings of quantized values.
        modules: name -> kind ("layer" or "product") of the quantized layers and products, in execution order.
        first_last_layers: the first layer and the last ones, which use ``first_last_bits``.
        blocks: the blocks that compensation works on.
        unfaithful: modules that :func:`qwt2.quantize` left in float, because they did not compute the same in their
            quantized form with the quantizers off (the folding of a BatchNorm can lose precision).
        float_modules: module name -> reason why it stays in float.
        float_macs: module name -> multiply-accumulates of one image that stay in float there.
        total_macs: multiply-accumulates of one image.
        exportable: whether integer engines can run the quantizers.
        input_shape: shape of one calibration image, or of each of its inputs by name.
        input_types: type of each input by name.
        norm_consumers: LayerNorm -> the quantized Linears that are the only readers of its output; without the norms of
            values that have only channels.
        repeated: layers that run several times in one pass.
        structure: digest of the captured graph, to tell whether a stored model belongs to the same graph.
    """

    request: Request
    layers: list[str] = field(default_factory=list)
    matmuls: list[str] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)
    first_last_layers: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    unfaithful: list[str] = field(default_factory=list)
    float_modules: dict[str, str] = field(default_factory=dict)
    float_macs: dict[str, int] = field(default_factory=dict)
    total_macs: int = 0
    exportable: bool = True
    input_shape: tuple[int, ...] | dict[str, tuple[int, ...]] = ()
    input_types: dict[str, str] = field(default_factory=dict)
    norm_consumers: dict[str, list[str]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    additions: list[str] = field(default_factory=list)
    poolings: list[str] = field(default_factory=list)
    structure: str = ""

    @property
    def method(self) -> str:
        """The PTQ method."""
        return self.request.method

    @property
    def target(self) -> str:
        """The engines that the model will run on."""
        return self.request.target

    @property
    def precision(self) -> Precision:
        """Bit widths of all modules without bits of their own."""
        return self.request.precision

    def covers(self, name: str) -> bool:
        """Return whether a module is to be quantized, provided that it can be."""
        return not self.left_out(name)

    def left_out(self, name: str) -> str:
        """Return why a module is not to be quantized, or "" if it is."""
        if self.request.parts is not None and not any(is_inside(name, part) for part in self.request.parts):
            return "is not among the parts to quantize"
        if self.request.is_excluded(name):
            return "was excluded"
        return (
            "computes something else once it is rewritten, with its quantizers off" if name in self.unfaithful else ""
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizationInfo:
        """Create the record from the result of :meth:`to_dict`, possibly read from JSON."""
        shape = values["input_shape"]
        shape = {n: tuple(s) for n, s in shape.items()} if isinstance(shape, dict) else tuple(shape)
        return cls(**{**values, "request": Request.from_dict(values["request"]), "input_shape": shape})


def quantization_info(qmodel: nn.Module) -> QuantizationInfo:
    """Return the record of how a model was quantized.

    Raises:
        Qwt2Error: if the model does not come from :func:`qwt2.quantize`.
    """
    info = getattr(qmodel, "quantization", None)
    if info is None:
        raise Qwt2Error(f"{type(qmodel).__name__} is not a quantized model; call qwt2.quantize on it first")
    return info


def quantized_layers(qmodel: GraphModel) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a model by name, in execution order.

    Raises:
        Qwt2Error: if the model does not come from :func:`qwt2.quantize`.
    """
    return {name: qmodel.get_submodule(name) for name in quantization_info(qmodel).layers}


def channel_axis(qmodel: GraphModel, block: str) -> int:
    """Return the channel axis of a block's input and output: 1 if it starts with a convolution, else -1."""
    first = next(name for name in quantization_info(qmodel).layers if is_inside(name, block))
    return 1 if isinstance(qmodel.get_submodule(first), QuantizedConv2d) else -1
