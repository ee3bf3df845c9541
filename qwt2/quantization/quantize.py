"""Post-training quantization of a float model."""

from __future__ import annotations

import copy
import inspect
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Iterable

import torch
from torch import Tensor, nn

from qwt2.capture.attention import make_attention_explicit
from qwt2.capture.blocks import execution_units, find_blocks, is_inside
from qwt2.errors import Qwt2Error
from qwt2.capture.batch import Inputs, as_inputs, call, first, image_count, joined, shapes, tensors
from qwt2.quantization.layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedMatmul,
    QuantizedModule,
    QuantizedPooling,
    full_precision,
)
from qwt2.quantization.observers import Grid
from qwt2.quantization.precision import Precision
from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PTQMethod, Recipe
from qwt2.quantization.quantizers import LogSqrt2Quantizer, Quantizer, UniformQuantizer
from qwt2.capture.rewrite import (
    Operands,
    expose_operations,
    expose_transposed_convolutions,
    fold_batchnorms,
    merge_parametrizations,
    replace_module,
)
from qwt2.capture.trace import Trace, trace


@dataclass
class QuantizationInfo:
    """What was quantized how; an attribute ``quantization`` of every quantized model.

    Attributes:
        layers: quantized Linear and Conv2d modules in execution order.
        matmuls: quantized products of activations.
        additions: residual additions with quantized operands.
        poolings: poolings of quantized values.
        edges: the first layer and the last ones, which have bits of their own.
        blocks: the blocks that compensation works on.
        sections: modules outside the blocks whose layers are executed, and compensated, together.
        parts: the modules that were to be quantized; ``None``, all.
        float_modules: module name -> why it stays in float.
        exportable: whether integer engines can run the quantizers.
        input_shape: shape of one calibration image, or of each of its inputs by name.
        norm_consumers: LayerNorm -> the Linears that alone read its output.
        repeated: layers that run several times in one pass.
    """

    method: str
    variant: str
    precision: Precision
    layers: list[str] = field(default_factory=list)
    matmuls: list[str] = field(default_factory=list)
    edges: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)
    parts: list[str] | None = None
    float_modules: dict[str, str] = field(default_factory=dict)
    exportable: bool = True
    input_shape: tuple[int, ...] | dict[str, tuple[int, ...]] = ()
    norm_consumers: dict[str, list[str]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    additions: list[str] = field(default_factory=list)
    poolings: list[str] = field(default_factory=list)

    @property
    def units(self) -> list[str]:
        """Blocks, sections and the layers outside them, in execution order."""
        sections = [name for name in self.sections if any(layer.startswith(name + ".") for layer in self.layers)]
        return execution_units(self.layers, [*self.blocks, *sections])

    @property
    def modules(self) -> dict[str, str]:
        """Every quantized module and its kind, "layer" or "product", in execution order.

        A product stands behind the first layer of the module that it belongs to, after the projection of its operands.
        """
        names = list(self.layers)
        for product in reversed(self.matmuls):
            parent = product.rpartition(".")[0] + "."
            names.insert(next((i + 1 for i, name in enumerate(names) if name.startswith(parent)), len(names)), product)
        return {name: "product" if name in self.matmuls else "layer" for name in names}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantizationInfo":
        shape = values["input_shape"]
        shape = {n: tuple(s) for n, s in shape.items()} if isinstance(shape, dict) else tuple(shape)
        values = dict(values, precision=Precision(**values["precision"]), input_shape=shape)
        return cls(**values)


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    method: str = "repq",
    precision: Precision = Precision(),
    variant: str = "default",
    observer_images: int = 32,
    blocks: Iterable[str] | None = None,
    sections: Iterable[str] = (),
    parts: Iterable[str] | None = None,
) -> nn.Module:
    """Quantize every Linear, Conv2d and attention product of a model after training.

    The model is copied; the copy's layers are replaced by fake-quantized ones whose parameters are
    chosen in one forward pass over the first calibration images, in execution order and with
    everything upstream already quantized (as RepQ-ViT and QwT do). A layer that runs several times (a detector's head
    on a pyramid's levels) has one input quantizer, chosen from all its inputs.

    Args:
        model: float32 model; called with one batch.
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
        sections: names of modules outside the blocks that compensation runs as a whole: those whose layers run several
            times or read what was computed long before (a detector's neck and heads).
        parts: names of the modules to quantize; everything outside them stays in float. ``None``: all.

    Returns:
        A new model in evaluation mode, with an attribute ``quantization`` (:class:`QuantizationInfo`).

    Raises:
        Qwt2Error: unknown method or variant, an empty calibration set, values that are not finite
            (the module is named), or a model without quantizable layers.
    """
    inputs = first_inputs(calibration, observer_images)
    check_images(model, inputs)
    ptq: PTQMethod = PTQ_METHODS.get(method)
    qmodel = prepare(model, first(inputs, 1), method, precision, variant, blocks, sections, parts)
    with torch.no_grad():
        _calibrate_repeated(qmodel, inputs)
        call(qmodel, inputs)
    for name, module in qmodel.named_modules():
        if isinstance(module, Quantizer) and not module.calibrated:
            raise Qwt2Error(f"{name} saw no data in calibration; every quantized layer must run on each image")
    ptq.after_calibration(qmodel, qmodel.quantization.norm_consumers, ptq.recipe(variant))
    return qmodel


def _calibrate_repeated(qmodel: nn.Module, inputs: Inputs) -> None:
    """Calibrate what runs several times in one pass on the full-precision values of all its runs."""
    runs: dict[str, list] = {name: [] for name, m in qmodel.named_modules() if isinstance(m, QuantizedModule)}
    with full_precision(qmodel):
        _record_runs(qmodel, runs, first(inputs, 1), values=False)
        runs = {name: [] for name, calls in runs.items() if len(calls) > 1}
        if runs:
            _record_runs(qmodel, runs, inputs, values=True)
    for name, calls in runs.items():
        qmodel.get_submodule(name).calibrate(*zip(*calls))


def _record_runs(qmodel: nn.Module, runs: dict[str, list], inputs: Inputs, values: bool) -> None:
    """Add an entry for every run of the named modules: its arguments and output, or nothing but the entry."""

    def recorder(name: str):
        return lambda module, args, output: runs[name].append([x.clone() for x in (*args, output)] if values else None)

    handles = [qmodel.get_submodule(name).register_forward_hook(recorder(name)) for name in runs]
    try:
        call(qmodel, inputs)
    finally:
        for handle in handles:
            handle.remove()


def prepare(
    model: nn.Module, example: Inputs, method: str, precision: Precision, variant: str,
    blocks: Iterable[str] | None = None, sections: Iterable[str] = (), parts: Iterable[str] | None = None,
) -> nn.Module:  # fmt: skip
    """The first half of :func:`quantize`: the model with uncalibrated quantizers in place.

    Deterministic in its arguments, so that a stored quantized model can be rebuilt from the float
    model's architecture and loaded (:func:`qwt2.load_quantized`).
    """
    check_weights(model)
    ptq: PTQMethod = PTQ_METHODS.get(method)
    recipe = ptq.recipe(variant)
    qmodel = copy.deepcopy(model).eval().requires_grad_(False)
    merge_parametrizations(qmodel)
    left = make_attention_explicit(qmodel, example) | expose_transposed_convolutions(qmodel)
    wiring = trace(qmodel, example)
    if recipe.fold_batchnorm:
        fold_batchnorms(qmodel, wiring)
        wiring = trace(qmodel, example)
    sections, parts = list(sections), None if parts is None else list(parts)
    found = _blocks_outside(qmodel, wiring, sections) if blocks is None else list(blocks)
    edges = first_and_last(qmodel, wiring, found, bool(sections))
    left |= _leave_out(wiring, parts)
    found = [block for block in found if parts is None or any(is_inside(block, part) for part in parts)]
    exposed = expose_operations(qmodel, wiring, _quantized_operands(wiring, recipe))
    info = QuantizationInfo(
        method=method, variant=variant, precision=precision, layers=wiring.layers, matmuls=exposed.matmuls,
        additions=exposed.additions, poolings=wiring.poolings if recipe.pooling_bits else [],
        edges=[name for name in wiring.layers if name in edges], blocks=found, sections=sections, parts=parts,
        exportable=recipe.exportable, input_shape=shapes(example),
        norm_consumers=wiring.norm_consumers, repeated=[name for name in wiring.layers if wiring.calls[name] > 1],
        float_modules={n: ", ".join(sorted(f)) + " stays in float" for n, f in wiring.unsupported.items()}
        | exposed.skipped | left,
    )  # fmt: skip
    info.units  # refuses blocks that overlap or hold nothing
    _insert_layers(qmodel, wiring, ptq, recipe, info)
    _insert_matmul_quantizers(qmodel, recipe, info)
    _insert_addition_quantizers(qmodel, recipe, info)
    _insert_pooling_quantizers(qmodel, recipe, info)
    if recipe.centred and info.additions:
        _share_grids_with_additions(qmodel, example, recipe, info)
    _name_quantizers(qmodel)
    qmodel.quantization = info
    return qmodel


def check_weights(model: nn.Module) -> None:
    """Refuse weights that cannot be quantized as they are.

    Raises:
        Qwt2Error: half-precision or non-finite weights; the parameter is named.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise Qwt2Error(f"{name} is {parameter.dtype}; convert the model with model.float() before quantizing")
        if not torch.isfinite(parameter).all():
            raise Qwt2Error(f"{name} holds NaN or infinity; load a sound checkpoint")


def check_images(model: nn.Module, inputs: Inputs) -> None:
    """Refuse images that the model cannot take.

    Raises:
        Qwt2Error: they are not float32, not on the device of the model's parameters (one is named), or given by a name
            that its forward method does not have.
    """
    parameters = inspect.signature(model.forward).parameters
    if isinstance(inputs, dict) and (unknown := inputs.keys() - parameters.keys()):
        raise Qwt2Error(
            f"a calibration batch is a dict; give tensors (N, ...), or names that {type(model).__name__}.forward takes, "
            f"which {sorted(unknown)[0]!r} is not"
        )
    images = next(iter(tensors(inputs).values()))
    if images.dtype != torch.float32:
        raise Qwt2Error(f"the calibration images are {images.dtype}; convert them to float32 and normalize them")
    for name, parameter in model.named_parameters():
        if parameter.device != images.device:
            raise Qwt2Error(
                f"the calibration images are on {images.device}, but {name} is on {parameter.device}; move one to the other"
            )


def first_inputs(calibration: Iterable[Any], count: int) -> Inputs:
    """The inputs of the first ``count`` images of the calibration set in one batch (fewer if it is smaller)."""
    collected: list[Inputs] = []
    for batch in calibration:
        collected.append(as_inputs(batch))
        if sum(map(image_count, collected)) >= count:
            break
    if not collected:
        raise Qwt2Error("the calibration set is empty; give at least one batch of images")
    return first(joined(collected), count)


def _leave_out(wiring: Trace, parts: list[str] | None) -> dict[str, str]:
    """Take what lies outside ``parts`` off the wiring; returns name -> reason.

    Raises:
        Qwt2Error: a part that holds no layer.
    """
    if parts is None:
        return {}
    for part in parts:
        if not any(is_inside(layer, part) for layer in wiring.layers):
            raise Qwt2Error(f"{part!r} holds no layer that runs, so nothing in it can be quantized; name other parts")

    def kept(name: str) -> bool:
        return any(is_inside(name, part) for part in parts)

    left = [name for name in [*wiring.layers, *wiring.sites] if not kept(name)]
    wiring.layers = [name for name in wiring.layers if kept(name)]
    wiring.sites = {name: site for name, site in wiring.sites.items() if kept(name)}
    wiring.poolings = [name for name in wiring.poolings if kept(name)]
    wiring.norm_consumers = {n: readers for n, readers in wiring.norm_consumers.items() if all(map(kept, readers))}
    wiring.escaping |= {n for n, readers in wiring.layer_readers.items() if not all(map(kept, readers))}
    return dict.fromkeys(left, "is not among the parts to quantize")


def _blocks_outside(qmodel: nn.Module, wiring: Trace, sections: list[str]) -> list[str]:
    return find_blocks(qmodel, [n for n in wiring.layers if not any(is_inside(n, section) for section in sections)])


def _insert_layers(
    qmodel: nn.Module, wiring: Trace, ptq: PTQMethod, recipe: Recipe, info: QuantizationInfo
) -> None:
    for name in info.layers:
        layer = qmodel.get_submodule(name)
        is_conv = isinstance(layer, nn.Conv2d)
        weight_bits, input_bits = info.precision.weight_bits, info.precision.activation_bits
        if is_conv and recipe.conv_input_bits:
            input_bits = recipe.conv_input_bits
        if name in info.edges and info.precision.first_last_bits:
            weight_bits = input_bits = info.precision.first_last_bits
        axis = ptq.input_axis(name, wiring.norm_consumers)
        input_quantizer = _activation_quantizer(recipe, input_bits, axis, centred=recipe.centred and name == info.layers[0])
        weight_quantizer = UniformQuantizer(
            Grid(weight_bits, recipe.symmetric_weights, recipe.zero_in_range, narrow=weight_bits == 8),
            recipe.observer,
            channel_axis=0,
        )
        output_quantizer = None
        if name in wiring.escaping and recipe.output_bits:
            output_quantizer = _activation_quantizer(recipe, recipe.output_bits, None)
        kind = QuantizedConv2d if is_conv else QuantizedLinear
        replace_module(qmodel, name, kind(layer, input_quantizer, weight_quantizer, output_quantizer, recipe.exportable))


def _activation_quantizer(
    recipe: Recipe, bits: int, axis: int | None, rounds: bool = True, centred: bool = False
) -> UniformQuantizer:
    grid = Grid(bits, recipe.symmetric_activations, recipe.zero_in_range, centred=centred)
    return UniformQuantizer(grid, recipe.observer, axis, rounds)


def _insert_matmul_quantizers(qmodel: nn.Module, recipe: Recipe, info: QuantizationInfo) -> None:
    operand = Grid(info.precision.activation_bits, recipe.symmetric_matmuls, recipe.zero_in_range)
    for name in info.matmuls:
        matmul: QuantizedMatmul = qmodel.get_submodule(name)
        is_softmax = matmul.a_quantizer.is_softmax
        matmul.b_quantizer = UniformQuantizer(operand, recipe.observer)
        if not is_softmax:
            matmul.a_quantizer = UniformQuantizer(operand, recipe.observer)
        elif recipe.log_softmax:
            matmul.a_quantizer = LogSqrt2Quantizer(info.precision.activation_bits, recipe.log_floor)
        else:
            matmul.a_quantizer = UniformQuantizer(
                Grid(info.precision.softmax_bits, recipe.symmetric_activations), recipe.observer
            )


def _quantized_operands(wiring: Trace, recipe: Recipe) -> dict[str, list[Operands]]:
    """What becomes of the operands of every addition; see :attr:`Recipe.addition_bits`."""
    if recipe.addition_bits is None:
        return {}

    def chosen(makers: tuple[str | None, str | None]) -> Operands:
        convolutions = [position for position, name in enumerate(makers) if name in wiring.layers]
        if not convolutions:
            return None, None
        if recipe.output_bits:
            return tuple(None if maker else "quantized" for maker in makers)
        return tuple("clipped" if position == convolutions[0] else "quantized" for position in range(2))

    return {name: [chosen(makers) for makers in site.additions] for name, site in wiring.sites.items()}


def _insert_addition_quantizers(qmodel: nn.Module, recipe: Recipe, info: QuantizationInfo) -> None:
    for name in info.additions:
        addition = qmodel.get_submodule(name)
        for role in addition.quantizers():
            rounds = not getattr(addition, role).clips
            setattr(addition, role, _activation_quantizer(recipe, recipe.addition_bits, None, rounds, recipe.centred))


def _insert_pooling_quantizers(qmodel: nn.Module, recipe: Recipe, info: QuantizationInfo) -> None:
    for name in info.poolings:
        quantizer = _activation_quantizer(recipe, recipe.pooling_bits, None)
        replace_module(qmodel, name, QuantizedPooling(qmodel.get_submodule(name), quantizer))


def _share_grids_with_additions(qmodel: nn.Module, example: Inputs, recipe: Recipe, info: QuantizationInfo) -> None:
    """Give a layer that reads what is an addition's operand too the operand's grid, so that one quantizer serves both.

    A layer computes the quantizer behind it in its own kernel only where there is one.
    """
    operands: list[Tensor] = []  # kept, so that no other tensor takes their identity
    inputs: list[tuple[str, Tensor]] = []

    def note_operands(addition, args):
        quantizers = (addition.a_quantizer, addition.b_quantizer)
        operands.extend(x for x, quantizer in zip(args, quantizers) if quantizer is not None and quantizer.rounds)

    def note_input(name: str):
        return lambda layer, args: inputs.append((name, args[0]))

    handles = [qmodel.get_submodule(name).register_forward_pre_hook(note_operands) for name in info.additions]
    handles += [qmodel.get_submodule(n).register_forward_pre_hook(note_input(n)) for n in info.layers if n not in info.repeated]
    try:
        with full_precision(qmodel), torch.no_grad():
            call(qmodel, example)
    finally:
        for handle in handles:
            handle.remove()
    for name, x in inputs:
        quantizer = qmodel.get_submodule(name).input_quantizer
        if any(x is operand for operand in operands) and quantizer.grid.bits == recipe.addition_bits:
            quantizer.grid = replace(quantizer.grid, centred=True)


def first_and_last(qmodel: nn.Module, wiring: Trace, blocks: list[str], many_outputs: bool) -> set[str]:
    """The first layer and the last, with its siblings: other heads as wide after the last block.

    With ``many_outputs``, every layer whose output is one of the network's is a last layer.
    """
    layers = wiring.layers
    after = max((i for i, name in enumerate(layers) if any(is_inside(name, block) for block in blocks)), default=len(layers))
    width = qmodel.get_submodule(layers[-1]).weight.shape[0]
    siblings = {name for name in layers[after + 1 :] if qmodel.get_submodule(name).weight.shape[0] == width}
    return {layers[0], layers[-1]} | siblings | (wiring.outputs if many_outputs else set())


def _name_quantizers(qmodel: nn.Module) -> None:
    for name, module in qmodel.named_modules():
        if isinstance(module, Quantizer):
            module.where = name


def quantized_layers(qmodel: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model by name, in execution order.

    Raises:
        Qwt2Error: the model was not made by :func:`quantize`.
    """
    return {name: qmodel.get_submodule(name) for name in quantization_info(qmodel).layers}


def quantization_info(qmodel: nn.Module) -> QuantizationInfo:
    info = getattr(qmodel, "quantization", None)
    if info is None:
        raise Qwt2Error(f"{type(qmodel).__name__} is not a quantized model; call qwt2.quantize on it first")
    return info


def block_channel_axis(qmodel: nn.Module, block: str) -> int:
    """Channel axis of a block's input and output: 1 if it starts with a convolution, else the last."""
    first = next(name for name in quantization_info(qmodel).layers if name == block or name.startswith(block + "."))
    return 1 if isinstance(qmodel.get_submodule(first), QuantizedConv2d) else -1


def wrap_block(qmodel: nn.Module, name: str, wrapper: nn.Module) -> None:
    """Put ``wrapper``, which holds the block as its child ``block``, in the block's place.

    The recorded module names move along.
    """
    replace_module(qmodel, name, wrapper)
    info = quantization_info(qmodel)

    def moved(old: str) -> str:
        return f"{name}.block{old[len(name):]}" if old.startswith(name + ".") else old

    info.layers = [moved(n) for n in info.layers]
    info.matmuls = [moved(n) for n in info.matmuls]
    info.additions = [moved(n) for n in info.additions]
    info.poolings = [moved(n) for n in info.poolings]
    info.edges = [moved(n) for n in info.edges]
    info.float_modules = {moved(n): reason for n, reason in info.float_modules.items()}
    info.repeated = [moved(n) for n in info.repeated]
    info.norm_consumers = {moved(k): [moved(n) for n in v] for k, v in info.norm_consumers.items()}
    _name_quantizers(qmodel)
