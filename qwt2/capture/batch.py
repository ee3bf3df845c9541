"""What a network is called with: an image tensor, or named tensors (images, and what else its forward method takes).

The first axis of every tensor counts images. Images of different sizes are padded at the bottom and on the right where
they must share a tensor, as detectors do.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwt2.errors import Qwt2Error

Inputs = Tensor | dict[str, Tensor]


def as_inputs(batch: Any) -> Inputs:
    """The network's inputs of a batch: the batch itself, or the first element of a tuple or list.

    Raises:
        Qwt2Error: it holds no tensor, or no images.
    """
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    for tensor in tensors(inputs).values():
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            raise Qwt2Error(
                f"a calibration batch is a {type(batch).__name__}; give tensors (N, ...), tuples starting with one, or "
                "dictionaries of them"
            )
        if tensor.shape[0] == 0:
            raise Qwt2Error("a calibration batch is empty; give batches with at least one image")
    return inputs


def model_inputs(model: nn.Module, batches: Iterable[Any]) -> Iterator[Inputs]:
    """The inputs of each batch; entries of dictionaries that the model does not take (labels) are left out, and named.

    Raises:
        Qwt2Error: it takes none of them.
    """
    parameters = inspect.signature(model.forward).parameters
    said: set[str] = set()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for batch in batches:
        inputs = as_inputs(batch)
        if isinstance(inputs, dict) and not takes_any:
            unknown = sorted(inputs.keys() - parameters.keys())
            if len(unknown) == len(inputs):
                raise Qwt2Error(
                    "a calibration batch is a dict; give tensors (N, ...), or names that "
                    f"{type(model).__name__}.forward takes, which {unknown[0]!r} is not"
                )
            if set(unknown) - said:
                said |= set(unknown)
                warnings.warn(
                    f"calibration batches hold {', '.join(unknown)}, which the model does not take: left out",
                    stacklevel=3,
                )
            inputs = {name: tensor for name, tensor in inputs.items() if name in parameters}
        yield inputs


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run ``model``; named tensors are keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def tensors(inputs: Any) -> dict[str, Any]:
    """The inputs by name; a single image tensor is called "images"."""
    return inputs if isinstance(inputs, dict) else {"images": inputs}


def image_count(inputs: Inputs) -> int:
    """Number of images."""
    return len(next(iter(tensors(inputs).values())))


def first(inputs: Inputs, count: int) -> Inputs:
    """The inputs of the first ``count`` images."""
    return {n: t[:count] for n, t in inputs.items()} if isinstance(inputs, dict) else inputs[:count]


def joined(batches: list[Inputs]) -> Inputs:
    """Several batches as one.

    Raises:
        Qwt2Error: batches of plain image tensors differ in the images' shape.
    """
    same: list[Any] = batches  # all are tensors, or all are dictionaries
    if isinstance(same[0], dict):
        return {name: _stacked([batch[name] for batch in same]) for name in same[0]}
    try:
        return torch.cat(same)
    except RuntimeError:
        shapes = sorted({tuple(images.shape[1:]) for images in same})
        raise Qwt2Error(f"calibration batches differ in image shape {shapes}; resize them to one") from None


def shapes(inputs: Inputs) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Shape of one image's inputs."""
    return {n: tuple(t.shape[1:]) for n, t in inputs.items()} if isinstance(inputs, dict) else tuple(inputs.shape[1:])


def types(inputs: Inputs) -> dict[str, str]:
    """Type of each input by name: "float32", "int64"."""
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors(inputs).items()}


def zeros(shape: tuple[int, ...] | dict[str, tuple[int, ...]], types: dict[str, str]) -> Inputs:
    """Inputs of one image, all zero, from what :func:`shapes` and :func:`types` returned."""
    made = {name: torch.zeros(1, *s, dtype=getattr(torch, types[name])) for name, s in tensors(shape).items()}
    return made if isinstance(shape, dict) else made["images"]


def _stacked(parts: list[Tensor]) -> Tensor:
    """Concatenated along the first axis, padded with zeros at the end of the others where they differ."""
    size = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].dim())]
    return torch.cat([F.pad(part, _padding(part, size)) if list(part.shape[1:]) != size else part for part in parts])


def _padding(part: Tensor, size: list[int]) -> list[int]:
    """In `F.pad`'s order: the last axis first, before and after."""
    return [n for wanted, found in zip(reversed(size), reversed(part.shape[1:])) for n in (0, wanted - found)]
