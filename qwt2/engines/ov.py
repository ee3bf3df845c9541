"""OpenVINO on the CPU."""

from __future__ import annotations

import numpy as np
import onnx

from qwt2.engines import ENGINES
from qwt2.operations import Operation


@ENGINES.register("openvino")
class OpenVinoSession:
    """See :class:`qwt2.engines.Session`.

    What stays in float is computed in float32: OpenVINO's default on recent CPUs is bfloat16, which
    would blur the comparison with the simulation.
    """

    def __init__(self, model: onnx.ModelProto, threads: int):
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
    """A copy whose additions read quantized operands through a second, equal quantizer.

    Where OpenVINO (2026.4) computes a convolution, the quantizer behind it and an addition in one kernel, it leaves out
    the quantizer's rounding. A repeated one changes no value and costs no time, and the rounding is kept.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    made = {name: node for node in model.graph.node for name in node.output}
    nodes = []
    for node in changed.graph.node:
        for position, name in enumerate(node.input if node.op_type == "Add" else []):
            source = made.get(name)
            if source is not None and source.op_type == "DequantizeLinear" and source.input[0] in made:
                codes, value = (f"{node.output[0]}/{kind}_{position}" for kind in ("codes", "again"))
                nodes.append(onnx.helper.make_node("QuantizeLinear", [name, *source.input[1:]], [codes]))
                nodes.append(onnx.helper.make_node("DequantizeLinear", [codes, *source.input[1:]], [value]))
                node.input[position] = value
        nodes.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed
