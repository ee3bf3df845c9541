"""Checks of a model and its calibration set before they are used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from qwt2.capture.batch import Inputs, after, first, image_count, joined, model_inputs, shapes, tensors
from qwt2.errors import Qwt2Error


def check_weights(model: nn.Module) -> None:
    """Refuse weights that cannot be quantized as they are.

    Raises:
        Qwt2Error: if a parameter has no size yet, is of another floating type than float32, or is not finite; it is
            named.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise Qwt2Error(f"{name} has no size yet; run the model once on a batch before quantizing")
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise Qwt2Error(f"{name} is {parameter.dtype}; convert the model with model.float() before quantizing")
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise Qwt2Error(f"{name} holds NaN or infinity; load a sound checkpoint")


def check_images(model: nn.Module, inputs: Inputs) -> None:
    """Refuse images that the model cannot take.

    Raises:
        Qwt2Error: if images are uint8 or of another floating type than float32, or if they are not on the device of
            the model's parameters (one parameter is named).
    """
    images = next(iter(tensors(inputs).values()))
    for tensor in tensors(inputs).values():
        if tensor.dtype == torch.uint8 or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise Qwt2Error(f"the calibration images are {tensor.dtype}; convert them to float32 and normalize them")
    for name, parameter in model.named_parameters():
        if parameter.device != images.device:
            raise Qwt2Error(
                f"the calibration images are on {images.device}, but {name} is on {parameter.device}; "
                "move one to the other"
            )


def check_batches(batches: list[Inputs], shape: tuple[int, ...] | dict[str, tuple[int, ...]], model: nn.Module) -> None:
    """Refuse calibration batches that do not fit a quantized model.

    Args:
        batches: the inputs per batch.
        shape: shape of one image's inputs when the model was quantized; named inputs may have other sizes.
        model: the quantized model.

    Raises:
        Qwt2Error: if there is no batch, or a batch has another shape or holds NaN or infinity; its number is given.
    """
    if not batches:
        raise Qwt2Error("the calibration set is empty; give at least one batch of images")
    for number, batch in enumerate(batches):
        check_images(model, batch)
        if isinstance(batch, dict) != isinstance(shape, dict) or (isinstance(shape, tuple) and shapes(batch) != shape):
            raise Qwt2Error(
                f"calibration batch {number} holds images of shape {shapes(batch)}, but the model was quantized "
                f"with {shape}; resize them to that"
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors(batch).values()):
            raise Qwt2Error(f"calibration batch {number} holds NaN or infinity; check the images and their transform")


def observed_inputs(model: nn.Module, calibration: Iterable[Any], count: int, rest: bool = False) -> list[Inputs]:
    """Return the inputs of the first ``count`` calibration images as one batch; fewer if the set is smaller.

    Args:
        model: the model.
        calibration: batches as in :func:`qwt2.quantize`.
        count: number of images.
        rest: whether to return all other images too, in further batches.

    Raises:
        Qwt2Error: if the calibration set is empty.
    """
    collected: list[Inputs] = []
    for inputs in model_inputs(model, calibration):
        collected.append(inputs)
        if not rest and sum(map(image_count, collected)) >= count:
            break
    if not collected:
        raise Qwt2Error("the calibration set is empty; give at least one batch of images")
    needed = 1
    while needed < len(collected) and sum(map(image_count, collected[:needed])) < count:
        needed += 1
    together = joined(collected[:needed])
    left = after(together, count)
    return [first(together, count), *([left] if rest and image_count(left) else []), *collected[needed:]]
