"""Network inputs: an image tensor, or named tensors (images and further arguments of the forward method).

The first axis of every tensor counts images. Images of different sizes that must share a tensor are padded at the
bottom and on the right, as detectors do.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwt2.errors import Qwt2Error

Inputs = Tensor | dict[str, Tensor]


def model_inputs(model: nn.Module, batches: Iterable[Any]) -> Iterator[Inputs]:
    """Yield the inputs of each batch.

    Of a tuple or list, these are the leading elements that the model's forward method needs: one, or one per parameter
    without a default. Dictionary entries that the model does not take (labels) are left out, with a warning that names
    them.

    Raises:
        Qwt2Error: if a batch holds no tensor or no images, the model takes none of a dictionary's entries, or the model
            is TorchScript.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise Qwt2Error("the model is TorchScript, which cannot be captured; give the nn.Module that it was made from")
    parameters = inspect.signature(model.forward).parameters
    said: set[str] = set()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for batch in batches:
        inputs = _leading(batch, parameters)
        if isinstance(inputs, dict) and not takes_any:
            unknown = sorted(inputs.keys() - parameters.keys())
            if inputs and len(unknown) == len(inputs):
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
        _check_tensors(inputs)
        yield inputs


def _leading(batch: Any, parameters: Mapping[str, inspect.Parameter]) -> Any:
    """Return a batch without what follows the model's inputs, such as labels; mappings become dictionaries."""
    if isinstance(batch, (tuple, list)) and batch:
        needed = [
            name for name, parameter in parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
        ]  # fmt: skip
        if 1 < len(needed) <= len(batch):
            return dict(zip(needed, batch))
        batch = batch[0]
    return dict(batch) if isinstance(batch, Mapping) else batch


def _check_tensors(inputs: Any) -> None:
    for name, tensor in tensors(inputs).items():
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            kind = "Tensor without axes" if isinstance(tensor, Tensor) else type(tensor).__name__
            what = f"batch's entry {name!r}" if isinstance(inputs, dict) else "batch"
            raise Qwt2Error(
                f"a calibration {what} is a {kind}; give tensors (N, ...), tuples starting with one, or "
                "dictionaries of them"
            )
        if tensor.shape[0] == 0:
            raise Qwt2Error("a calibration batch is empty; give batches with at least one image")
    if isinstance(inputs, dict) and not inputs:
        raise Qwt2Error("a calibration batch is an empty dict; give the tensors that the model takes, by name")


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run ``model`` on copies, because it may write into its inputs; named tensors are keyword arguments."""
    if isinstance(inputs, dict):
        return model(**{name: tensor.clone() for name, tensor in inputs.items()})
    return model(inputs.clone())


def tensors(inputs: Any) -> dict[str, Any]:
    """Return the inputs by name; a single image tensor is called "images"."""
    return inputs if isinstance(inputs, dict) else {"images": inputs}


def image_count(inputs: Inputs) -> int:
    """Return the number of images."""
    return len(next(iter(tensors(inputs).values())))


def first(inputs: Inputs, count: int) -> Inputs:
    """Return the inputs of the first ``count`` images."""
    return _sliced(inputs, slice(count))


def after(inputs: Inputs, count: int) -> Inputs:
    """Return the inputs of all but the first ``count`` images."""
    return _sliced(inputs, slice(count, None))


def single_images(inputs: Inputs) -> Iterator[Inputs]:
    """Yield the inputs of each image, as a batch of one."""
    for number in range(image_count(inputs)):
        yield _sliced(inputs, slice(number, number + 1))


def _sliced(inputs: Inputs, images: slice) -> Inputs:
    return {n: t[images] for n, t in inputs.items()} if isinstance(inputs, dict) else inputs[images]


def joined(batches: list[Inputs]) -> Inputs:
    """Concatenate several batches into one.

    Raises:
        Qwt2Error: if batches of plain image tensors differ in the images' shape.
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
    """Return the shape of one image's inputs, without the batch axis."""
    return {n: tuple(t.shape[1:]) for n, t in inputs.items()} if isinstance(inputs, dict) else tuple(inputs.shape[1:])


def types(inputs: Inputs) -> dict[str, str]:
    """Return each input's type by name, for example "float32" or "int64"."""
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors(inputs).items()}


def zeros(shape: tuple[int, ...] | dict[str, tuple[int, ...]], types: dict[str, str]) -> Inputs:
    """Return all-zero inputs of one image, from the results of :func:`shapes` and :func:`types`."""
    made = {name: torch.zeros(1, *s, dtype=getattr(torch, types[name])) for name, s in tensors(shape).items()}
    return made if isinstance(shape, dict) else made["images"]


def _stacked(parts: list[Tensor]) -> Tensor:
    """Concatenate along the first axis; pad the other axes with zeros at the end where sizes differ."""
    size = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].dim())]
    return torch.cat([F.pad(part, _padding(part, size)) if list(part.shape[1:]) != size else part for part in parts])


def _padding(part: Tensor, size: list[int]) -> list[int]:
    """Return the padding in the order of ``F.pad``: the last axis first, (before, after) per axis."""
    return [n for wanted, found in zip(reversed(size), reversed(part.shape[1:])) for n in (0, wanted - found)]
