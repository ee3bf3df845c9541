"""ONNX Runtime on the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx

from qwt2.engines import ENGINES
from qwt2.engines.operations import Operation
from qwt2.extras import extra

_INTEGER_KERNELS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QAttention", "NhwcMaxPool")
_CODES = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


@ENGINES.register("onnxruntime")
class OnnxRuntimeSession:
    """See :class:`qwt2.engines.Session`."""

    package = "onnxruntime"

    def __init__(self, model: onnx.ModelProto, threads: int):
        with extra("onnxruntime"):
            import onnxruntime

        self.model = model.SerializeToString()
        self.options = onnxruntime.SessionOptions()
        self.options.log_severity_level = 3  # errors; the level of the whole process is left to the user
        self.options.intra_op_num_threads, self.options.inter_op_num_threads = threads, 1
        self.session = onnxruntime.InferenceSession(self.model, self.options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`qwt2.engines.Session.__call__`."""
        return dict(zip(self.outputs, self.session.run(None, feeds)))

    def operations(self) -> list[Operation]:
        """See :meth:`qwt2.engines.Session.operations`.

        Integer kernels are recognized by their names, and Clips of codes by bounds that are stored as codes.
        """
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            self.options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            onnxruntime.InferenceSession(self.model, self.options, providers=["CPUExecutionProvider"])
            graph = onnx.load(self.options.optimized_model_filepath).graph
        codes = {tensor.name for tensor in graph.initializer if tensor.data_type in _CODES}
        return [
            Operation(node.op_type, node.op_type.startswith(_INTEGER_KERNELS) or not codes.isdisjoint(node.input))
            for node in graph.node
        ]
