"""Post-training quantization of a float model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

from qwt2.capture import wiring
from qwt2.capture.batch import Inputs, first, shapes, types
from qwt2.capture.blocks import check_blocks, find_blocks, is_inside
from qwt2.capture.check import check_captured, differing_modules, outputs_of, same_outputs
from qwt2.capture.export import capture
from qwt2.capture.graph import GraphModel, Product
from qwt2.capture.normalise import fold_batchnorms, fold_scales
from qwt2.capture.rotation import rotated
from qwt2.errors import Qwt2Error
from qwt2.quantization.checks import check_images, check_weights, observed_inputs
from qwt2.quantization.info import QuantizationInfo
from qwt2.quantization.layers import (
    QuantizedAdd,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedModule,
    full_precision,
)
from qwt2.quantization.layout import Layout
from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.precision import Precision
from qwt2.quantization.processes import Processes
from qwt2.quantization.quantizers import Quantizer
from qwt2.quantization.request import Request
from qwt2.quantization.targets import Target
from qwt2.quantization.walk import Progress, Walk


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    method: str = "repq",
    precision: Precision = Precision(),
    target: str = "portable",
    observer_images: int = 32,
    blocks: Iterable[str] | None = None,
    parts: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    bits: Mapping[str, Precision] | None = None,
    rotate: bool = False,
    progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
) -> GraphModel:
    """Quantize every Linear, Conv2d and attention product of a model after training.

    The model is captured as one graph of operations (:func:`qwt2.capture.export.capture`), and the graph's layers are
    replaced by fake-quantized ones. Their parameters are chosen in one walk over the first calibration images, in
    execution order and with everything upstream already quantized (as in RepQ-ViT and QwT). A layer that runs several
    times (a detector's head on the levels of a pyramid) has one input quantizer, chosen from all its inputs.

    Args:
        model: float32 model that takes one batch; it is not changed.
        calibration: batches, each a tensor (N, ...), a tuple that starts with one, or a dictionary of tensors that the
            model takes as keyword arguments. The first axis of every tensor counts images.
        method: a registered PTQ method: "repq", "percentile", "mse" or "minmax" only choose ranges; "gptq", "gptaq" and
            "erq" also choose weight codes for the layer's output; "brecq" learns them for a block's output, which is
            expensive; "repq_published" and "percentile_published" follow the papers' code and run in simulation only.
        precision: bit widths.
        target: the engines that the model will run on (:mod:`qwt2.quantization.targets`): "portable" for the integer
            kernels of all CPU engines; "openvino" for OpenVINO only, where it is more accurate and mostly faster;
            "tensorrt" for TensorRT.
        observer_images: number of calibration images that the ranges are chosen from (32 in the papers). "gptq",
            "gptaq", "erq" and "brecq" choose weight codes from all images.
        blocks: names of the blocks that compensation will work on; by default they are found automatically.
        parts: names of the modules to quantize; everything outside them stays in float. ``None``: all modules.
        exclude: names or patterns of modules that stay in float ("head", "blocks.*.mlp", "*.fc1"); a name includes
            everything inside that module.
        bits: bit widths by module name or pattern. Later entries override earlier ones, and all of them override
            ``precision``, including its ``first_last_bits``.
        rotate: first rotate the residual stream of a pre-norm transformer (:mod:`qwt2.capture.rotation`), which spreads
            outlier channels over all channels. Only weights change; the float function stays the same.
        progress: called with the number of calibrated modules and the number of all modules, for progress bars.
        group: processes that call this together, as in :func:`qwt2.compensate`. Ranges are chosen in each of them;
            methods that choose weight codes from all images share these.

    Returns:
        A new model in evaluation mode, which is called like the float model and has an attribute ``quantization``
        (:class:`qwt2.quantization.info.QuantizationInfo`).

    Raises:
        Qwt2Error: if the method or target is unknown, a name or pattern matches nothing, the calibration set is empty,
            values are not finite (the module is named), or the model cannot be captured or has no quantizable layers,
            or has a residual stream that cannot be rotated.
    """
    request = Request(
        method, target, precision, _names(blocks), _names(parts), tuple(exclude), dict(bits or {}), rotate
    )
    layout = Layout.of(method, target, precision)  # refuses a wrong name before the expensive work
    ptq = PTQ_METHODS.get(method)()
    inputs, *others = observed_inputs(model, calibration, observer_images, rest=ptq.all_images)
    check_images(model, inputs)
    check_weights(model)
    captured = capture(model, first(inputs, 2))
    exact = outputs_of(model, inputs) if captured is model else check_captured(model, captured, inputs)
    if rotate:
        captured = _rotated(captured, inputs, exact)
    qmodel = _faithful(captured, inputs, exact, request)
    processes = Processes(group)
    processes.check_batches([inputs, *others], shared=ptq.all_images)
    with torch.no_grad():
        ptq.fit(Walk(qmodel, [inputs, *others], progress=progress, processes=processes), layout.recipe)
    processes.check_parameters(qmodel)
    return qmodel


def _rotated(captured: GraphModel, inputs: Inputs, exact: list[Any]) -> GraphModel:
    """Return the model with rotated residual streams.

    Raises:
        Qwt2Error: if it cannot be rotated, or no longer gives the exact outputs.
    """
    model = rotated(captured)
    if not same_outputs(exact, outputs_of(model, inputs)):
        raise Qwt2Error(f"{model.title} computes something else with a rotated residual stream; leave rotate out")
    return model


def _names(names: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def _faithful(captured: GraphModel, inputs: Inputs, exact: list[Any], request: Request) -> GraphModel:
    """Prepare a model such that it computes the same as before while its quantizers are off.

    Modules that do not are left in float, with their BatchNorms behind them.

    Args:
        captured: the graph of the float model.
        inputs: the images to compare on.
        exact: the float model's outputs.
        request: how to quantize.

    Raises:
        Qwt2Error: if that does not help; the message names the first module that differs.
    """
    unfaithful: list[str] = []
    for _ in range(2):
        qmodel = prepare(captured, first(inputs, 1), request, unfaithful)
        with full_precision(qmodel):
            if same_outputs(exact, outputs_of(qmodel, inputs)):
                return qmodel
            unfaithful = differing_modules(captured, qmodel, inputs)
        if not unfaithful:  # only rounding, which the network itself turns into other outputs
            return qmodel
    raise Qwt2Error(
        f"{qmodel.title} computes something else with its quantizers off, first in {unfaithful[0]}, a defect of this "
        "library; leave what is around it in float with quantize(exclude=[...])"
    )


def prepare(captured: GraphModel, example: Inputs, request: Request, unfaithful: Collection[str] = ()) -> GraphModel:
    """Return a copy of the captured model with uncalibrated quantizers: the first half of :func:`quantize`.

    The result depends only on the arguments, so that a stored quantized model can be rebuilt from the float model's
    architecture and loaded (:func:`qwt2.load_quantized`).

    Args:
        captured: the graph of the float model.
        example: the inputs of one image.
        request: how to quantize.
        unfaithful: layers that stay in float, see :class:`QuantizationInfo`.

    Raises:
        Qwt2Error: if the request names a method, target or module that does not exist, or nothing can be quantized.
    """
    layout = Layout.of(request.method, request.target, request.precision)
    qmodel = copy.deepcopy(captured)
    if layout.recipe.fold_batchnorm:
        qmodel.edit(fold_batchnorms, unfaithful)
        qmodel.edit(fold_scales, unfaithful)
    info = _plan(qmodel, example, layout, QuantizationInfo(request, unfaithful=list(unfaithful)))
    info.structure = structure(captured)
    for name, module in _quantized_modules(qmodel, layout, info).items():
        qmodel.set_module(name, module)
    if layout.target.centred:
        _share_grids_with_additions(qmodel, layout.target)
    for name, module in qmodel.named_modules():
        if isinstance(module, Quantizer):
            module.where = name
    qmodel.quantization = info
    return qmodel.eval()


def _quantized_modules(qmodel: GraphModel, layout: Layout, info: QuantizationInfo) -> dict[str, QuantizedModule]:
    """Return the uncalibrated modules, by the names of the modules that they replace."""
    operands, softmax = layout.operands(qmodel, info), wiring.softmax_products(qmodel)
    escaping = wiring.escaping(qmodel) | _read_outside(qmodel, info)

    def of(name: str) -> Layout:
        own = info.request.bits_of(name)
        return layout if own is None else replace(layout, precision=own)

    def layer(name: str) -> QuantizedModule:
        is_edge = name in info.first_last_layers and info.request.bits_of(name) is None
        return of(name).layer(qmodel.get_submodule(name), name == info.layers[0], is_edge, name in escaping)

    return (
        {name: layer(name) for name in info.layers}
        | {name: of(name).matmul(name in softmax) for name in info.matmuls}
        | {name: layout.addition(operands[name]) for name in info.additions}
        | {name: layout.pooling(qmodel.get_submodule(name)) for name in info.poolings}
    )


def structure(captured: GraphModel) -> str:
    """Return a digest of the graph's text, which may change with the version of PyTorch or of the model."""
    return hashlib.sha256(str(captured.graph).encode()).hexdigest()


def _plan(qmodel: GraphModel, example: Inputs, layout: Layout, info: QuantizationInfo) -> QuantizationInfo:
    """Fill ``info`` with the modules that get quantizers, and return it.

    Raises:
        Qwt2Error: if there is no layer to quantize in the model or in one of the parts, a name in ``blocks`` is not a
            block, or a pattern matches nothing.
    """
    request = info.request
    layers, calls = wiring.layers(qmodel), qmodel.calls((*wiring.LAYER_TYPES, Product))
    if not layers:
        raise Qwt2Error(f"{qmodel.title} runs no Linear or Conv2d layer on its input, so nothing can be quantized")
    for part in request.parts or ():
        if not any(is_inside(layer, part) for layer in layers):
            raise Qwt2Error(f"{part!r} holds no layer that runs, so nothing in it can be quantized; name other parts")
    request.check(calls)
    kept = info.covers
    found = find_blocks(qmodel) if request.blocks is None else check_blocks(qmodel, request.blocks)
    edges = first_and_last(qmodel, found)
    info.modules = {n: "product" if isinstance(qmodel.get_submodule(n), Product) else "layer" for n in calls if kept(n)}
    info.layers = [name for name in layers if kept(name)]
    if not info.layers:
        raise Qwt2Error(f"every layer of {qmodel.title} is excluded, so nothing is left to quantize; exclude fewer")
    info.matmuls = [name for name, kind in info.modules.items() if kind == "product"]
    info.first_last_layers = [name for name in info.layers if name in edges]
    info.blocks = [block for block in found if any(is_inside(layer, block) for layer in info.layers)]
    info.poolings = [name for name in layout.poolings(qmodel) if kept(name)]
    info.additions = [name for name, kinds in layout.operands(qmodel, info).items() if any(kinds)]
    # One value per image and channel, as behind a pooling, is too few to choose a range per channel from.
    info.norm_consumers = {
        n: linears
        for n, linears in wiring.norm_consumers(qmodel).items()
        if all(map(kept, linears)) and all(len(call.meta["shape"]) > 2 for call in qmodel.calls(nn.LayerNorm)[n])
    }
    info.repeated = [name for name in info.layers if len(calls[name]) > 1]
    info.exportable = layout.recipe.exportable
    info.input_shape, info.input_types = shapes(example), types(example)
    outside = {name: reason for name in calls if (reason := info.left_out(name))}
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
    """Return the convolutions whose output is read by layers that stay in float."""
    return {name for name, readers in wiring.layer_readers(qmodel).items() if not set(readers) <= set(info.layers)}


def _share_grids_with_additions(qmodel: GraphModel, target: Target) -> None:
    """Give a layer that reads the same value as an addition the addition's grid, so that one quantizer serves both.

    An engine fuses the quantizer of a layer's output into the layer's kernel only if there is just one quantizer.
    """
    operands: set[fx.Node] = set()
    for name, calls in qmodel.calls(QuantizedAdd).items():
        addition = qmodel.get_submodule(name)
        for position, quantizer in enumerate((addition.a_quantizer, addition.b_quantizer)):
            if quantizer is not None and quantizer.rounds:
                operands |= {call.args[position] for call in calls}
    for name, calls in qmodel.calls((QuantizedLinear, QuantizedConv2d)).items():
        quantizer = qmodel.get_submodule(name).input_quantizer
        if len(calls) == 1 and calls[0].args[0] in operands and quantizer.grid.bits == target.addition_bits:
            quantizer.grid = replace(quantizer.grid, centred=True)


def first_and_last(qmodel: GraphModel, blocks: list[str]) -> set[str]:
    """Return the first layer, the last layer and its siblings: other heads after the last block with the same width.

    In a network with several outputs, every layer whose output is one of them counts as a last layer.
    """
    layers = wiring.layers(qmodel)
    after = max(
        (i for i, name in enumerate(layers) if any(is_inside(name, block) for block in blocks)), default=len(layers)
    )
    width = qmodel.get_submodule(layers[-1]).weight.shape[0]
    siblings = {name for name in layers[after + 1 :] if qmodel.get_submodule(name).weight.shape[0] == width}
    outputs = wiring.output_layers(qmodel) if len(qmodel.output.all_input_nodes) > 1 else set()
    return {layers[0], layers[-1]} | siblings | outputs
