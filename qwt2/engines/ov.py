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
        self.compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", options)
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
