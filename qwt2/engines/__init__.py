"""Integer inference engines, one file each, all with one interface: arrays in, arrays out."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Protocol

import numpy as np
import onnx

from qwt2.errors import Qwt2Error
from qwt2.onnx.file import load_onnx, with_batch_size
from qwt2.engines.operations import Operation
from qwt2.registry import Registry

ENGINES: Registry = Registry("engine", __name__)


class Session(Protocol):
    """A model compiled for fixed input shapes: feeds by name in, outputs by name out."""

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def operations(self) -> list[Operation]:
        """The nodes that run, as the engine itself reports them after its optimizations."""
        ...


class Engine:
    """An exported model on one engine.

    The model is compiled for each batch size it meets, on first use: every engine plans integer
    kernels best for fixed shapes.

    Args:
        model: the ONNX model.
        name: a registered engine.
        threads: CPU threads.
    """

    def __init__(self, model: onnx.ModelProto, name: str, threads: int = 1):
        self.model, self.name, self.threads = model, name, threads
        self.compile = ENGINES.get(name)
        self.input = model.graph.input[0]
        self._sessions: dict[int, Session] = {}

    def session(self, batch_size: int) -> Session:
        """The compiled model for one batch size."""
        if batch_size not in self._sessions:
            self._sessions[batch_size] = self.compile(with_batch_size(self.model, batch_size), self.threads)
        return self._sessions[batch_size]

    def operations(self) -> list[Operation]:
        """The nodes that run, for the batch size that was met first; for one image if none was."""
        return self.session(next(iter(self._sessions), 1)).operations()

    def __call__(self, images: np.ndarray) -> np.ndarray | list[np.ndarray]:
        """Logits of a batch; of a model with several outputs a list, in the file's order.

        Args:
            images: float32 (N, C, H, W), of the exported size.

        Raises:
            Qwt2Error: another shape or type.
        """
        expected = [d.dim_value for d in self.input.type.tensor_type.shape.dim[1:]]
        if images.dtype != np.float32 or list(images.shape[1:]) != expected or len(images) == 0:
            raise Qwt2Error(
                f"{self.name} got a {images.dtype} array of shape {images.shape}; "
                f"the model takes float32 (N, {', '.join(map(str, expected))})"
            )
        outputs = list(self.session(len(images))({self.input.name: images}).values())
        return outputs[0] if len(outputs) == 1 else outputs


def load_package(module: str, package: str) -> ModuleType:
    """Import what an optional engine needs.

    Raises:
        Qwt2Error: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise Qwt2Error(f"the engine needs {name}, which cannot be imported ({error}); install it with: pip install {package}") from error


def load_engine(path: str | os.PathLike, name: str = "onnxruntime", threads: int = 1) -> Engine:
    """Load an exported ONNX file into an engine.

    Args:
        path: a file from :func:`qwt2.export_onnx`.
        name: "onnxruntime", "openvino", "inductor", "tvm", or "torch_int8" (exact and slow: the oracle).
        threads: CPU threads.

    Raises:
        Qwt2Error: no such file, a file that is not ours, or an unknown engine.
    """
    return Engine(load_onnx(path), name, threads)
