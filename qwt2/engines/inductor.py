"""PyTorch's Inductor on x86 CPUs: oneDNN's int8 kernels, with everything between them compiled from C++ by gcc."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from qwt2.engines import ENGINES
from qwt2.engines.operations import Operation
from qwt2.errors import Qwt2Error
from qwt2.io import quiet

if TYPE_CHECKING:
    from torch import Tensor, fx

_INTEGER_KERNELS = ("qlinear", "qconv", "_int_mm")


@ENGINES.register("inductor")
class InductorSession:
    """See :class:`qwt2.engines.Session`; :mod:`qwt2.engines.interpreter.qdq_graph` describes the graph it compiles.

    Linear layers and convolutions run in integers. Inductor has no integer kernel for products of two activations:
    their codes are multiplied as float32, which is exact for sums up to 2^24.
    """

    def __init__(self, model: onnx.ModelProto, threads: int):
        from qwt2.engines.interpreter.qdq_graph import QuantizedGraph

        self.graph, self.threads = QuantizedGraph(model), threads
        self._compiled: Callable[..., Any] | None = None
        self._optimized: list[fx.Graph] = []

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`qwt2.engines.Session.__call__`."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            images = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in self.graph.inputs]
            with torch.no_grad():
                outputs = self._compile(images) if self._compiled is None else self._compiled(*images)
            return {name: output.numpy() for name, output in zip(self.graph.outputs, outputs)}
        finally:
            torch.set_num_threads(before)

    def operations(self) -> list[Operation]:
        """See :meth:`qwt2.engines.Session.operations`; taken from the graph after Inductor's last pass."""
        if self._compiled is None:
            self({value.name: np.zeros(_shape(value), np.float32) for value in self.graph.input_values})
        nodes = [node for graph in self._optimized for node in graph.nodes if node.op == "call_function"]
        return [Operation(kind, kind.startswith(_INTEGER_KERNELS)) for kind in map(_kind, nodes)]

    def _compile(self, images: list[Tensor]) -> tuple[Tensor, ...]:
        """Compile the graph for inputs of these shapes, and return the outputs for these inputs."""
        import torch
        from torch._inductor import config
        from torch._inductor.exc import InductorError

        self._compiled = torch.compile(self.graph.trace(images), backend="inductor", dynamic=False)
        # The settings must hold during the first call. Dynamo also reads ``freezing``, without which no int8 kernel is
        # chosen. There is one compiling thread, because a pool of processes would outlive the call.
        settings = {"freezing": True, "compile_threads": 1, "post_grad_custom_post_pass": self._optimized.append}
        with config.patch(settings), quiet("torch.utils.cpp_extension"):
            try:
                return self._compiled(*images)
            except InductorError as error:
                if "C++ compiler" not in str(error):
                    raise
                raise Qwt2Error(
                    "inductor found no C++ compiler; install g++, or name one in the variable CXX"
                ) from error


def _kind(node: fx.Node) -> str:
    """Return the name of the function that a node calls; Inductor's integer kernels are partial functions."""
    target: Any = getattr(node.target, "func", node.target)
    return getattr(target, "_opname", target.__name__)


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
