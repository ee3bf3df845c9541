"""Integer inference engines, one module each, with one interface: arrays in, arrays out."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import onnx

from qwt2.engines.operations import Operation
from qwt2.errors import Qwt2Error
from qwt2.extras import extra
from qwt2.onnx.file import load_onnx, with_batch_size
from qwt2.registry import Registry

ENGINES: Registry = Registry("engine", __name__, "qwt2.engines")


_REASON = 500  # characters of an engine's own message that are passed on


class Session(Protocol):
    """A model compiled for fixed input shapes, called with arrays by input name.

    A class attribute ``package`` may name a module that the engine needs. The extra with the engine's name installs it.
    """

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model on arrays of the shapes it was compiled for, and return its outputs by name."""
        ...

    def operations(self) -> list[Operation]:
        """Return the nodes that run, as the engine itself reports them after its optimizations."""
        ...


class Engine:
    """An exported model on one engine.

    The model is compiled once for each batch size, on first use, because engines choose the best integer kernels for
    fixed shapes.

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
        """Return the model compiled for one batch size.

        Raises:
            Qwt2Error: if the engine cannot run the model.
        """
        if batch_size not in self._sessions:
            with self._refusing():
                self._sessions[batch_size] = self.compile(with_batch_size(self.model, batch_size), self.threads)
        return self._sessions[batch_size]

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn what an engine raises (each has exceptions of its own, of many lines) into one sentence."""
        try:
            yield
        except (Qwt2Error, MemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:_REASON]
            raise Qwt2Error(f"{self.name} cannot run the model ({reason}); choose another engine") from error

    def operations(self) -> list[Operation]:
        """Return the nodes that run for the first batch size that was used, or for one image if none was."""
        return self.session(next(iter(self._sessions), 1)).operations()

    def __call__(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> np.ndarray | dict[str, np.ndarray]:
        """Run the model on a batch.

        Args:
            inputs: images (N, C, H, W) of the exported size, or arrays by name for a model with several inputs.

        Returns:
            The output, such as logits (N, classes); for a model with several outputs, arrays by name in the file's
            order.

        Raises:
            Qwt2Error: an input has another name, shape or type than the model's.
        """
        feeds = dict(inputs) if isinstance(inputs, Mapping) else {self.input.name: inputs}
        known = {value.name: value.type.tensor_type for value in self.model.graph.input}
        if len(feeds) == len(known) == 1:  # a single input may have any name
            feeds = dict(zip(known, feeds.values()))
        if feeds.keys() != known.keys():
            raise Qwt2Error(f"{self.name} got inputs {', '.join(feeds)}; the model takes {', '.join(known)}")
        for name, array in feeds.items():
            expected = [dim.dim_value for dim in known[name].shape.dim[1:]]
            kind = onnx.helper.tensor_dtype_to_np_dtype(known[name].elem_type)
            if array.dtype != kind or list(array.shape[1:]) != expected or len(array) == 0:
                raise Qwt2Error(
                    f"{self.name} got a {array.dtype} array of shape {array.shape}; "
                    f"the model takes {kind} (N, {', '.join(map(str, expected))})"
                )
        session = self.session(len(next(iter(feeds.values()))))
        with self._refusing():
            outputs = session(feeds)
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs


def check_engine(name: str) -> None:
    """Raise if an engine is unknown or its package cannot be imported, before any work is done for it.

    Raises:
        Qwt2Error: the engine is unknown, or the extra that installs its package is missing; the message names it.
    """
    package = getattr(ENGINES.get(name), "package", None)
    if package is not None:
        with extra(name):
            importlib.import_module(package)


def load_engine(path: str | os.PathLike, name: str = "onnxruntime", threads: int = 1) -> Engine:
    """Load an exported ONNX file into an engine.

    Args:
        path: a file from :func:`qwt2.export_onnx`.
        name: "onnxruntime", "openvino", "inductor", "tvm", "tensorrt" or "torch_int8" (exact but slow: the oracle).
        threads: CPU threads.

    Returns:
        The engine, which compiles the model on its first call.

    Raises:
        Qwt2Error: the file does not exist or was not exported by this library, or the engine is unknown or not
            installed.
    """
    check_engine(name)
    return Engine(load_onnx(path), name, threads)
