"""Plain PyTorch, in exact integers: the oracle for the other engines, on any device that torch has."""

from __future__ import annotations

import numpy as np
import onnx

from qwt2.engines import ENGINES


@ENGINES.register("torch_int8")
class TorchInt8Session:
    """See :class:`qwt2.engines.Session`; :mod:`qwt2.torch_graph` says how it computes.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, model: onnx.ModelProto, threads: int, device: str = "cpu"):
        from qwt2.torch_graph import TorchGraph

        self.graph, self.threads = TorchGraph(model, device), threads

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self.graph(feeds)
        finally:
            torch.set_num_threads(before)
