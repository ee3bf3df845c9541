"""Post-training quantization of a float model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qwt2.capture import wiring
from qwt2.capture.batch import Inputs, first, shapes
from qwt2.capture.blocks import check_blocks, find_blocks, is_inside
from qwt2.capture.check import check_captured
from qwt2.capture.export import capture
from qwt2.capture.graph import GraphModel, Product
from qwt2.capture.normalise import fold_batchnorms
from qwt2.errors import Qwt2Error
from qwt2.quantization.checks import check_images, check_weights, first_inputs
from qwt2.quantization.info import QuantizationInfo
from qwt2.quantization.layers import (
    QuantizedAdd,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedMatmul,
    QuantizedPooling,
)
from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.observers import Grid
from qwt2.quantization.precision import Precision
from qwt2.quantization.quantizers import LogSqrt2Quantizer, Quantizer, UniformQuantizer
from qwt2.quantization.recipe import PTQMethod, Recipe
from qwt2.quantization.walk import Walk


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    method: str = "repq",
    precision: Precision = Precision(),
    variant: str = "default",
    observer_images: int = 32,
    blocks: Iterable[str] | None = None,
    parts: Iterable[str] | None = None,
) -> GraphModel:
    """Quantize every Linear, Conv2d and attention product of a model after training.

    What the model computes is captured as one graph of operations (:func:`qwt2.capture.export.capture`); the graph's
    layers become fake-quantized ones whose parameters are chosen in one walk over the first calibration images, in
    execution order and with everything upstream already quantized (as RepQ-ViT and QwT do). A layer that runs several times (a detector's head
    on a pyramid's levels) has one input quantizer, chosen from all its inputs.

    Args:
        model: float32 model; called with one batch. It stays as it is.
        calibration: batches, each a tensor (N, ...), a tuple that starts with one, or a dictionary of tensors that the
            model takes as keyword arguments, the first axis of each counting images.
        method: a registered PTQ method ("repq", "percentile", "mse", "minmax").
        precision: bit widths.
        variant: "default" runs on integer engines; "openvino" leaves float what OpenVINO's convolution kernels
            activate, add and round at once (more accurate there, and mostly faster; slower on engines whose
            convolutions give integers alone), quantizes what these kernels give a pooling, and centres the codes of
            images and of what is added on zero;
            "tensorrt" has the symmetric activations that TensorRT wants; "published" follows the
            papers' code, where a method has that variant.
        observer_images: how many calibration images choose the ranges (32 in the papers).
        blocks: names of the blocks that compensation will work on; found by their names if not given.
        parts: names of the modules to quantize; everything outside them stays in float. ``None``: all.

    Returns:
        A new model in evaluation mode, called as the model is, with an attribute ``quantization``
        (:class:`qwt2.quantization.info.QuantizationInfo`).

    Raises:
        Qwt2Error: unknown method or variant, an empty calibration set, values that are not finite
            (the module is named), a model that cannot be captured, or one without quantizable layers.
    """
    inputs = first_inputs(model, calibration, observer_images)
    check_images(model, inputs)
    check_weights(model)
    ptq: PTQMethod = PTQ_METHODS.get(method)
    recipe = ptq.recipe(variant)
    captured = capture(model, first(inputs, 2))
    if captured is not model:
        check_captured(model, captured, inputs)
    qmodel = prepare(captured, first(inputs, 1), method, precision, variant, blocks, parts)
    with torch.no_grad():
        ptq.fit(Walk(qmodel, [inputs]), recipe)
    return qmodel


def prepare(
    captured: GraphModel, example: Inputs, method: str, precision: Precision, variant: str,
    blocks: Iterable[str] | None = None, parts: Iterable[str] | None = None,
) -> GraphModel:  # fmt: skip
    """The first half of :func:`quantize`: the captured model with uncalibrated quantizers in place.

    Deterministic in its arguments, so that a stored quantized model can be rebuilt from the float
    model's architecture and loaded (:func:`qwt2.load_quantized`).
    """
    ptq: PTQMethod = PTQ_METHODS.get(method)
    recipe = ptq.recipe(variant)
    qmodel = copy.deepcopy(captured)
    if recipe.fold_batchnorm:
        qmodel.edit(fold_batchnorms)
    parts = None if parts is None else list(parts)
    info = _plan(qmodel, example, recipe, QuantizationInfo(method, variant, precision, parts=parts), blocks)
    info.structure = structure(captured)
    operands = _operands(qmodel, recipe, info)
    softmax = wiring.softmax_products(qmodel)
    escaping = wiring.escaping(qmodel) | _read_outside(qmodel, info)
    for name in info.layers:
        output_bits = recipe.output_bits if name in escaping else None
        qmodel.set_module(name, _quantized_layer(qmodel.get_submodule(name), name, output_bits, recipe, info))
    for name in info.matmuls:
        qmodel.set_module(name, _quantized_matmul(name in softmax, recipe, info.precision))
    for name in info.additions:
        qmodel.set_module(name, _quantized_add(operands[name], recipe))
    for name in info.poolings:
        quantizer = _activation_quantizer(recipe, recipe.pooling_bits)
        qmodel.set_module(name, QuantizedPooling(qmodel.get_submodule(name), quantizer))
    if recipe.centred:
        _share_grids_with_additions(qmodel, recipe, info)
    for name, module in qmodel.named_modules():
        if isinstance(module, Quantizer):
            module.where = name
    qmodel.quantization = info
    return qmodel.eval()


def structure(captured: GraphModel) -> str:
    """A digest of the graph's text: another version of PyTorch or of the model may be captured in another way."""
    return hashlib.sha256(str(captured.graph).encode()).hexdigest()


def _plan(
    qmodel: GraphModel, example: Inputs, recipe: Recipe, info: QuantizationInfo, blocks: Iterable[str] | None
) -> QuantizationInfo:
    """Which modules get quantizers.

    Raises:
        Qwt2Error: there is no layer, or none in one of the parts; blocks that are none.
    """
    layers, calls = wiring.layers(qmodel), qmodel.calls((*wiring.LAYER_TYPES, Product))
    if not layers:
        raise Qwt2Error(f"{qmodel.title} runs no Linear or Conv2d layer on its input, so nothing can be quantized")
    for part in info.parts or ():
        if not any(is_inside(layer, part) for layer in layers):
            raise Qwt2Error(f"{part!r} holds no layer that runs, so nothing in it can be quantized; name other parts")

    def kept(name: str) -> bool:
        return info.parts is None or any(is_inside(name, part) for part in info.parts)

    found = find_blocks(qmodel) if blocks is None else check_blocks(qmodel, blocks)
    edges = first_and_last(qmodel, found)
    info.modules = {n: "product" if isinstance(qmodel.get_submodule(n), Product) else "layer" for n in calls if kept(n)}
    info.layers = [name for name in layers if kept(name)]
    info.matmuls = [name for name, kind in info.modules.items() if kind == "product"]
    info.first_last_layers = [name for name in info.layers if name in edges]
    info.blocks = [block for block in found if kept(block)]
    info.poolings = [name for name in wiring.kernel_poolings(qmodel) if kept(name)] if recipe.pooling_bits else []
    info.additions = [name for name, kinds in _operands(qmodel, recipe, info).items() if any(kinds)]
    info.norm_consumers = {
        n: linears for n, linears in wiring.norm_consumers(qmodel).items() if all(map(kept, linears))
    }
    info.repeated = [name for name in info.layers if len(calls[name]) > 1]
    info.exportable, info.input_shape = recipe.exportable, shapes(example)
    outside = dict.fromkeys([n for n in calls if not kept(n)], "is not among the parts to quantize")
    info.float_modules = wiring.float_operations(qmodel) | outside
    if info.float_modules:
        _count_float(qmodel, example, info)
    return info


def _count_float(qmodel: GraphModel, example: Inputs, info: QuantizationInfo) -> None:
    counts = wiring.multiply_accumulates(qmodel, example)
    info.total_macs = sum(counts.values())
    for node, count in counts.items():
        name = node.target if node.op == "call_module" else node.meta["module"]
        if name in info.float_modules:
            info.float_macs[name] = info.float_macs.get(name, 0) + count


def _read_outside(qmodel: GraphModel, info: QuantizationInfo) -> set[str]:
    """Convolutions that layers read which stay in float."""
    return {name for name, readers in wiring.layer_readers(qmodel).items() if not set(readers) <= set(info.layers)}


def _quantized_layer(
    layer: nn.Module, name: str, output_bits: int | None, recipe: Recipe, info: QuantizationInfo
) -> QuantizedLinear | QuantizedConv2d:
    is_conv = isinstance(layer, nn.Conv2d)
    weight_bits, input_bits = info.precision.weight_bits, info.precision.activation_bits
    if is_conv and recipe.conv_input_bits:
        input_bits = recipe.conv_input_bits
    if name in info.first_last_layers and info.precision.first_last_bits:
        weight_bits = input_bits = info.precision.first_last_bits
    input_quantizer = _activation_quantizer(recipe, input_bits, centred=recipe.centred and name == info.layers[0])
    weight_grid = Grid(weight_bits, recipe.symmetric_weights, recipe.zero_in_range, narrow=weight_bits == 8)
    weight_quantizer = UniformQuantizer(weight_grid, recipe.observer, channel_axis=0)
    output_quantizer = _activation_quantizer(recipe, output_bits) if output_bits else None
    kind = QuantizedConv2d if is_conv else QuantizedLinear
    return kind(layer, input_quantizer, weight_quantizer, output_quantizer, recipe.exportable)


def _activation_quantizer(recipe: Recipe, bits: int, rounds: bool = True, centred: bool = False) -> UniformQuantizer:
    grid = Grid(bits, recipe.symmetric_activations, recipe.zero_in_range, centred=centred)
    return UniformQuantizer(grid, recipe.observer, rounds=rounds)


def _quantized_matmul(is_softmax: bool, recipe: Recipe, precision: Precision) -> QuantizedMatmul:
    operand = Grid(precision.activation_bits, recipe.symmetric_matmuls, recipe.zero_in_range)
    a: Quantizer = UniformQuantizer(operand, recipe.observer)
    if is_softmax and recipe.log_softmax:
        a = LogSqrt2Quantizer(precision.activation_bits, recipe.log_floor)
    elif is_softmax:
        a = UniformQuantizer(Grid(precision.softmax_bits, recipe.symmetric_activations), recipe.observer)
    return QuantizedMatmul(a, UniformQuantizer(operand, recipe.observer))


# Of an addition's operands: "quantized", "clipped" to the grid's range, or ``None``, as it is.
Operands = tuple[str | None, str | None]


def _operands(qmodel: GraphModel, recipe: Recipe, info: QuantizationInfo) -> dict[str, Operands]:
    """What becomes of the operands of every residual addition; see :attr:`Recipe.addition_bits`."""

    def chosen(makers: tuple[str | None, str | None]) -> Operands:
        convolutions = [position for position, name in enumerate(makers) if name in info.layers]
        if not convolutions:
            return None, None
        if recipe.output_bits:
            return tuple(None if maker else "quantized" for maker in makers)
        return tuple("clipped" if position == convolutions[0] else "quantized" for position in range(2))

    sums = wiring.residual_sums(qmodel) if recipe.addition_bits else {}
    inside = [name for name in sums if info.parts is None or any(is_inside(name, part) for part in info.parts)]
    return {name: chosen(sums[name]) for name in inside}


def _quantized_add(operands: Operands, recipe: Recipe) -> QuantizedAdd:
    return QuantizedAdd(*(
        kind and _activation_quantizer(recipe, recipe.addition_bits, rounds=kind == "quantized", centred=recipe.centred)
        for kind in operands
    ))  # fmt: skip


def _share_grids_with_additions(qmodel: GraphModel, recipe: Recipe, info: QuantizationInfo) -> None:
    """Give a layer that reads what is an addition's operand too the operand's grid, so that one quantizer serves both.

    A layer computes the quantizer behind it in its own kernel only where there is one.
    """
    operands: set[fx.Node] = set()
    for name, calls in qmodel.calls(QuantizedAdd).items():
        addition = qmodel.get_submodule(name)
        for position, quantizer in enumerate((addition.a_quantizer, addition.b_quantizer)):
            if quantizer is not None and quantizer.rounds:
                operands |= {call.args[position] for call in calls}
    for name, calls in qmodel.calls((QuantizedLinear, QuantizedConv2d)).items():
        quantizer = qmodel.get_submodule(name).input_quantizer
        if len(calls) == 1 and calls[0].args[0] in operands and quantizer.grid.bits == recipe.addition_bits:
            quantizer.grid = replace(quantizer.grid, centred=True)


def first_and_last(qmodel: GraphModel, blocks: list[str]) -> set[str]:
    """The first layer and the last, with its siblings: other heads as wide after the last block.

    In a network with several outputs, every layer whose output is one of them is a last layer.
    """
    layers = wiring.layers(qmodel)
    after = max(
        (i for i, name in enumerate(layers) if any(is_inside(name, block) for block in blocks)), default=len(layers)
    )
    width = qmodel.get_submodule(layers[-1]).weight.shape[0]
    siblings = {name for name in layers[after + 1 :] if qmodel.get_submodule(name).weight.shape[0] == width}
    outputs = wiring.output_layers(qmodel) if len(qmodel.output.all_input_nodes) > 1 else set()
    return {layers[0], layers[-1]} | siblings | outputs
