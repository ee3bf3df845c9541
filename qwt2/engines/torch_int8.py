"""Plain PyTorch in exact integers, on any device that torch has: the oracle for the other engines."""

from __future__ import annotations

import numpy as np
import onnx

from qwt2.engines import ENGINES
from qwt2.engines.operations import Operation

# Operations whose input TorchGraph moves as codes.
KEEP_CODES = ("Identity", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Expand")


@ENGINES.register("torch_int8")
class TorchInt8Session:
    """See :class:`qwt2.engines.Session`; :mod:`qwt2.engines.interpreter.graph` describes the arithmetic.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, model: onnx.ModelProto, threads: int, device: str = "cpu"):
        from qwt2.engines.interpreter.graph import TorchGraph

        self.graph, self.threads = TorchGraph(model, device), threads

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`qwt2.engines.Session.__call__`."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self.graph(feeds)
        finally:
            torch.set_num_threads(before)

    def operations(self) -> list[Operation]:
        """See :meth:`qwt2.engines.Session.operations`; a product of two dequantized codes is integer."""
        codes = {name for node in self.graph.nodes if node.op_type == "DequantizeLinear" for name in node.output}
        operations = []
        for node in self.graph.nodes:
            if node.op_type in KEEP_CODES and node.input[0] in codes:
                codes.update(node.output)
            integer = node.op_type in ("Conv", "Gemm", "MatMul") and set(node.input[:2]) <= codes
            operations.append(Operation(node.op_type, integer))
        return operations
