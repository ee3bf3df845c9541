"""OpenVINO on the CPU."""

from __future__ import annotations

import numpy as np
import onnx

from qwt2.engines import ENGINES
from qwt2.engines.operations import Operation
from qwt2.extras import extra
from qwt2.onnx.file import TARGET_KEY
from qwt2.onnx.graph import OnnxGraph

_FUSED = ("Clip", "Gelu", "HardSigmoid", "HardSwish", "Relu", "Sigmoid", "Tanh")  # computed in a convolution's kernel


@ENGINES.register("openvino")
class OpenVinoSession:
    """See :class:`qwt2.engines.Session`.

    What stays in float is computed in float32: OpenVINO's default on recent CPUs is bfloat16, which
    would blur the comparison with the simulation.
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
        self.compiled = core.compile_model(core.read_model(quantize_added_twice(model).SerializeToString()), "CPU", options)
        self.outputs = [output.any_name for output in self.compiled.outputs]

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self.compiled(feeds).values()))

    def operations(self) -> list[Operation]:
        """See :meth:`qwt2.engines.Session.operations`; OpenVINO tells every node's run-time precision."""
        facts = [node.get_rt_info() for node in self.compiled.get_runtime_model().get_ordered_ops()]
        return [
            Operation(fact["layerType"].astype(str), fact["runtimePrecision"].astype(str) in ("i8", "u8"))
            for fact in facts
        ]


def quantize_added_twice(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose additions read the quantized outputs of convolutions through a second, equal quantizer.

    Where OpenVINO (2026.4) computes a convolution, the quantizer behind it and an addition in one kernel, it leaves out
    the quantizer's rounding. A repeated one changes no value, and the rounding is kept. Models of target="openvino" are
    meant to run without it.
    """
    if any(entry.key == TARGET_KEY and entry.value == "openvino" for entry in model.metadata_props):
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = _Convolutions(changed)
    nodes = []
    for node in graph.nodes:
        if node.op_type == "Add":
            for position, name in enumerate(node.input):
                if graph.is_quantized_convolution(name):
                    parameters = graph.made[name].input[1:]
                    codes, value = (f"{node.output[0]}/{kind}_{position}" for kind in ("codes", "again"))
                    nodes.append(onnx.helper.make_node("QuantizeLinear", [name, *parameters], [codes]))
                    nodes.append(onnx.helper.make_node("DequantizeLinear", [codes, *parameters], [value]))
                    node.input[position] = value
        nodes.append(node)
    graph.replace_nodes(nodes)
    return changed


class _Convolutions(OnnxGraph):
    def is_convolution(self, name: str) -> bool:
        """Whether a tensor is a convolution's output that nothing else reads, perhaps activated or clipped."""
        node = self.made.get(name)
        if node is None or len(self.readers[name]) > 1:
            return False
        return node.op_type == "Conv" or (node.op_type in _FUSED and self.is_convolution(node.input[0]))

    def is_quantized_convolution(self, name: str) -> bool:
        """Whether a tensor is such an output behind a quantizer."""
        dequantize = self.made.get(name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return False
        quantize = self.made.get(dequantize.input[0])
        return quantize is not None and self.is_convolution(quantize.input[0])
