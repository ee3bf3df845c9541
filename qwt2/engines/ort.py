"""ONNX Runtime on the CPU."""

from __future__ import annotations

import numpy as np
import onnx

from qwt2.engines import ENGINES


@ENGINES.register("onnxruntime")
class OnnxRuntimeSession:
    """See :class:`qwt2.engines.Session`."""

    def __init__(self, model: onnx.ModelProto, threads: int):
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self.session.run(None, feeds)))
