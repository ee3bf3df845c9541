"""OpenVINO on the CPU."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from qwt2.engines import ENGINES
from qwt2.engines.operations import Operation
from qwt2.extras import extra
from qwt2.onnx.graph import make, maker
from qwt2.onnx.metadata import TARGET_KEY, properties

_FUSED = ("Clip", "Gelu", "HardSigmoid", "HardSwish", "Relu", "Sigmoid", "Tanh")  # computed in a convolution's kernel


@ENGINES.register("openvino")
class OpenVinoSession:
    """See :class:`qwt2.engines.Session`.

    Float operations run in float32. OpenVINO's default on recent CPUs is bfloat16, whose rounding would add to the
    differences from the simulation.
    """

    package = "openvino"

    def __init__(self, model: onnx.ModelProto, threads: int):
        with extra("openvino"):
            import openvino

        options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = openvino.Core()
        self.compiled = core.compile_model(
            core.read_model(quantize_added_twice(model).SerializeToString()), "CPU", options
        )
        self.outputs = [output.any_name for output in self.compiled.outputs]

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`qwt2.engines.Session.__call__`."""
        return dict(zip(self.outputs, self.compiled(feeds).values()))

    def operations(self) -> list[Operation]:
        """See :meth:`qwt2.engines.Session.operations`; OpenVINO reports the run-time precision of every node."""
        facts = [node.get_rt_info() for node in self.compiled.get_runtime_model().get_ordered_ops()]
        return [
            Operation(fact["layerType"].astype(str), fact["runtimePrecision"].astype(str) in ("i8", "u8"))
            for fact in facts
        ]


def quantize_added_twice(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose additions read quantized outputs of convolutions through a second, equal quantizer.

    OpenVINO (2026.4) skips the rounding of a quantizer that it computes in one kernel with the convolution in front of
    it and an addition behind it. A second quantizer changes no value and keeps the rounding. Models quantized with
    target="openvino" are meant to run without that rounding and are returned as they are.
    """
    if properties(model).get(TARGET_KEY) == "openvino":
        return model
    changed = ir.from_proto(model)
    for addition in [node for node in changed.graph if node.op_type == "Add"]:
        for position, value in enumerate(addition.inputs):
            dequantize = maker(value, "DequantizeLinear")
            if dequantize is not None and _is_behind_convolution(dequantize):
                _quantize_again(addition, position, dequantize)
    return ir.to_proto(changed)


def _quantize_again(addition: ir.Node, position: int, dequantize: ir.Node) -> None:
    """Put a quantizer with the parameters of ``dequantize`` between it and the addition."""
    name, parameters = addition.outputs[0].name, dequantize.inputs[1:]
    codes = make("QuantizeLinear", [dequantize.outputs[0], *parameters], f"{name}/codes_{position}")
    again = make("DequantizeLinear", [codes.outputs[0], *parameters], f"{name}/again_{position}")
    addition.prepend([codes, again])
    addition.replace_input_with(position, again.outputs[0])


def _is_convolution(value: ir.Value | None) -> bool:
    """Return whether a tensor is a convolution's output, perhaps activated or clipped, that only one node reads."""
    node = None if value is None or len(value.uses()) > 1 else value.producer()
    if node is None:
        return False
    return node.op_type == "Conv" or (node.op_type in _FUSED and _is_convolution(node.inputs[0]))


def _is_behind_convolution(dequantize: ir.Node) -> bool:
    """Return whether the quantizer that ends with ``dequantize`` reads a convolution's output."""
    codes = dequantize.inputs[0]
    quantize = None if codes is None else codes.producer()
    return quantize is not None and _is_convolution(quantize.inputs[0])
