"""Tracing: one forward pass that records how a model is wired, without reading its source.

Everything later steps need to know about a model they have never seen comes from here: in which
order its layers run, where activations are multiplied with each other, which LayerNorm feeds which
Linear, which convolution's output is used by something other than a quantized layer, and what poolings average. Values
are followed by tagging tensors with the module that made them and carrying the tags through
functions that only move data or that integer engines merge into the convolution.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Iterator

import torch
import torch.nn.functional as F
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from qwt2.errors import Qwt2Error
from qwt2.capture.batch import Inputs, call, shapes

LAYER_TYPES = (nn.Linear, nn.Conv2d)
NORM_TYPES = (nn.modules.batchnorm._BatchNorm,)
POOLING_TYPES = (nn.AdaptiveAvgPool2d, FastAdaptiveAvgPool)

_MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_ATTENTIONS = {F.scaled_dot_product_attention}
_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
# Outside a Linear or Conv2d module.
_UNSUPPORTED = {
    torch.einsum, torch.baddbmm, Tensor.baddbmm, torch.addmm, Tensor.addmm, F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d,
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip

# Functions that move values without changing them, as long as the last axis stays the last axis.
_MOVES = {
    torch.reshape, Tensor.reshape, Tensor.view, torch.permute, Tensor.permute, torch.transpose,
    Tensor.transpose, torch.roll, Tensor.roll, Tensor.contiguous, torch.flatten, Tensor.flatten,
    torch.unflatten, Tensor.unflatten, Tensor.clone, torch.squeeze, Tensor.squeeze,
    torch.unsqueeze, Tensor.unsqueeze, F.dropout, Tensor.expand,
}  # fmt: skip
# Functions that integer engines compute on, or merge into, a convolution's quantized output.
_MERGES = {
    F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.max_pool2d,
    torch.max_pool2d, F.dropout, F.dropout2d,
}  # fmt: skip


@dataclass
class Site:
    """A module that multiplies activations with each other, or adds them, in its own forward method.

    Attributes:
        constants: names of the arguments that held no tensor in the traced call, with their values.
        products: whether it multiplies activations.
        masks: for each ``scaled_dot_product_attention`` call, the dtype of its mask (or ``None``).
        additions: for each addition of tensors, the convolutions whose outputs are the operands (``None``: something
            else), if it is a residual one: of equal shapes, and at least one of them a convolution's output.
    """

    constants: dict[str, Any] = field(default_factory=dict)
    products: bool = False
    masks: list[torch.dtype | None] = field(default_factory=list)
    additions: list[tuple[str | None, str | None]] = field(default_factory=list)


@dataclass
class Trace:
    """What one forward pass showed.

    Attributes:
        layers: names of Linear and Conv2d modules in the order of their first call.
        calls: number of calls of each of them.
        sites: module name -> products and additions of its own forward method, in execution order.
        norm_consumers: LayerNorm name -> names of the Linears that read its output, only for norms
            whose output nothing else reads and reaches them with its last axis intact.
        batchnorm_of: Conv2d or Linear name -> the BatchNorm that alone reads its output.
        escaping: convolutions whose output is read by something that is not a layer.
        layer_readers: of the other convolutions, the layers that read their output.
        outputs: layers whose output is an output of the network.
        poolings: modules that alone read, and average, what a convolution's kernel computes: its output, or a residual sum
            with it, activated or not.
        unsupported: module name -> functions that compute on activations and stay in float.
    """

    layers: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    sites: dict[str, Site] = field(default_factory=dict)
    norm_consumers: dict[str, list[str]] = field(default_factory=dict)
    batchnorm_of: dict[str, str] = field(default_factory=dict)
    escaping: set[str] = field(default_factory=set)
    layer_readers: dict[str, list[str]] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)
    poolings: list[str] = field(default_factory=list)
    unsupported: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


def trace(model: nn.Module, example: Inputs) -> Trace:
    """Run ``model`` once on ``example`` in evaluation mode and record its wiring.

    Args:
        model: any module; its weights and mode are left as they were.
        example: one input batch, on the model's device.

    Raises:
        Qwt2Error: the model calls no Linear or Conv2d, returns something else than one tensor
            for one tensor, or cannot run on the
            example (the module that fails is named).
    """
    if isinstance(model, LAYER_TYPES):
        raise Qwt2Error(f"the model is nothing but one {type(model).__name__}; put it into an nn.Sequential")
    recorder = _Recorder(model)
    with evaluation_mode(model), torch.no_grad(), recorder.hooks(), recorder:
        try:
            output = call(model, example)
            recorder.note_outputs(output)
        except RuntimeError as error:
            name = recorder.stack[-1][0] if recorder.stack else ""
            raise Qwt2Error(
                f"{name or type(model).__name__} cannot run on images of shape {_shape_text(example)} "
                f"({str(error).splitlines()[0]}); give images as the model takes them"
            ) from error
    if isinstance(example, Tensor) and not isinstance(output, Tensor):
        raise Qwt2Error(
            f"{type(model).__name__} returns a {type(output).__name__}; quantize a module whose forward returns one tensor"
        )
    result = recorder.result()
    if not result.layers:
        raise Qwt2Error(
            f"{type(model).__name__} runs no Linear or Conv2d layer on its input, so nothing can be quantized"
        )
    return result


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode, and back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Recorder(TorchFunctionMode):
    """Tags tensors with the module that made them, and notes who reads a tagged tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.trace = Trace()
        self.stack: list[tuple[str, nn.Module]] = []
        self.calls: list[tuple[tuple, dict]] = []
        # Tensors are kept alive so that an id stands for one tensor during the whole pass.
        self.tags: dict[int, tuple[Tensor, str]] = {}
        self.sums: dict[int, Tensor] = {}  # residual ones, activated or not
        self.sum_reads: dict[int, int] = {}
        self.pooled: dict[str, Tensor] = {}
        self.readers: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self.sources: dict[str, set[str | None]] = defaultdict(set)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str):
        def hook(module, args, kwargs):
            if isinstance(module, (*LAYER_TYPES, *NORM_TYPES)):
                self._read(args, ("module", name))
                self.sources[name].add(self._tag_of(args[0]) if args else None)
            elif isinstance(module, nn.LayerNorm):
                self._read(args, ("function", "layer_norm"))
            elif isinstance(module, POOLING_TYPES) and args:
                self.pooled[name] = args[0]
            elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
                self.trace.unsupported[name].add(type(module).__name__)
            self.stack.append((name, module))
            self.calls.append((args, kwargs))

        return hook

    def _leave(self, name: str):
        def hook(module, args, output):
            if isinstance(module, LAYER_TYPES):
                self._note_layer(name, module, args[0], output)
            self.stack.pop()
            self.calls.pop()
            if isinstance(module, (nn.LayerNorm, *LAYER_TYPES)) and isinstance(output, Tensor):
                self.tags[id(output)] = (output, name)
            elif not isinstance(module, (*NORM_TYPES, *POOLING_TYPES)) and not any(True for _ in module.children()):
                self._note_opaque(module, args, output)

        return hook

    def _note_opaque(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A module that computes out of sight (RoIAlign, a compiled function) reads what it does not pass on."""
        passed_on = {self._tag_of(value) for value in (output if isinstance(output, (tuple, list)) else [output])}
        self._read([x for x in args if self._tag_of(x) not in passed_on], ("function", type(module).__name__))

    def note_outputs(self, outputs: Any) -> None:
        """What the network returns is read by whoever called it."""
        leaves = tree_flatten(outputs)[0]
        self._read(leaves, ("function", "the network's output"))
        self.trace.outputs = {
            source for leaf in leaves
            if (source := self._tag_of(leaf)) and isinstance(self.model.get_submodule(source), LAYER_TYPES)
        }  # fmt: skip

    def _note_layer(self, name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        if not self.trace.calls[name] and not _has_plain_arithmetic(layer, x, output):
            self.trace.unsupported[name].add(f"{type(layer).__name__} with a forward method of its own")
        elif not self.trace.calls[name]:
            self.trace.layers.append(name)
        self.trace.calls[name] += 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, module = self.stack[-1] if self.stack else ("", self.model)
        # A layer's own arithmetic is the layer; only what lies between layers is followed.
        if isinstance(module, (*LAYER_TYPES, *NORM_TYPES, nn.LayerNorm)):
            return func(*args, **kwargs)
        source = self._tag_of(args[0]) if args else None
        is_sum = self._note_addition(func, name, args) or (func in _MERGES and id(args[0]) in self.sums)
        output = func(*args, **kwargs)
        self._note_matmul(func, name, args, kwargs)
        if not isinstance(output, (Tensor, tuple, list)) or func is Tensor.requires_grad.__get__:
            return output
        if isinstance(output, Tensor) and source is not None and self._carries(func, args, kwargs, output, source):
            self.tags[id(output)] = (output, source)
        elif not _is_getter(func):
            self._read((*args, *kwargs.values()), ("function", getattr(func, "__name__", str(func))))
            if isinstance(output, Tensor):
                self.tags.pop(id(output), None)  # an in-place function: no longer the layer's value
                self.sums.pop(id(output), None)
        if is_sum:
            self.sums[id(output)], self.sum_reads[id(output)] = output, 0
        return output

    def _tag_of(self, value: Any) -> str | None:
        return self.tags[id(value)][1] if isinstance(value, Tensor) and id(value) in self.tags else None

    def _read(self, values: Any, reader: tuple[str, str]) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self._read(value, reader)
            elif (source := self._tag_of(value)) is not None:
                self.readers[source].add(reader)
            elif id(value) in self.sums:
                self.sum_reads[id(value)] += 1

    def _carries(self, func, args, kwargs, output: Tensor, source: str) -> bool:
        layer = self.model.get_submodule(source)
        if isinstance(layer, nn.Conv2d):
            return func in _MERGES
        if func is F.pad:  # window attention pads by nothing where the windows fit
            return output.shape == args[0].shape
        if func not in _MOVES or not args[0].dim() or not output.dim():
            return False
        return output.shape[-1] == args[0].shape[-1] and not _moves_last_axis(func, args, kwargs)

    def _note_matmul(self, func, name: str, args, kwargs) -> None:
        if func in _UNSUPPORTED and any(isinstance(a, Tensor) for a in args):
            self.trace.unsupported[name].add(func.__name__)
        if func not in _MATMULS and func not in _ATTENTIONS:
            return
        if any(isinstance(a, nn.Parameter) for a in args[:2]):
            self.trace.unsupported[name].add(f"{func.__name__} with a parameter")
            return
        site = self._site(name)
        site.products = True
        if func in _ATTENTIONS:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            site.masks.append(mask.dtype if isinstance(mask, Tensor) else None)

    def _has_one_reader(self, value: Tensor) -> bool:
        """Of a convolution's output or a residual sum: whether nothing but a pooling reads it."""
        if id(value) in self.sums:
            return self.sum_reads[id(value)] == 1
        source = self._tag_of(value)
        return source is not None and isinstance(self._get(source), nn.Conv2d) and len(self.readers[source]) == 1

    def _note_addition(self, func, name: str, args) -> bool:
        """Whether it is a residual one."""
        if func not in _ADDITIONS or not all(isinstance(a, Tensor) for a in args[:2]):
            return False
        tags = [self._tag_of(a) for a in args[:2]]
        makers = [tag if tag and isinstance(self._get(tag), nn.Conv2d) else None for tag in tags]
        is_residual = any(makers) and args[0].shape == args[1].shape
        self._site(name).additions.append(tuple(makers) if is_residual else (None, None))
        return is_residual

    def _site(self, name: str) -> Site:
        return self.trace.sites.setdefault(name, Site(constants=self._constants()))

    def _constants(self) -> dict[str, Any]:
        """Arguments of the innermost module's call that held no tensor, by parameter name."""
        if not self.stack:
            return {}
        args, kwargs = self.calls[-1]
        bound = inspect.signature(self.stack[-1][1].forward).bind(*args, **kwargs)
        bound.apply_defaults()
        return {
            k: v for k, v in bound.arguments.items()
            if not isinstance(v, (Tensor, tuple, dict)) and k != "self"
        }  # fmt: skip

    def result(self) -> Trace:
        for source, readers in self.readers.items():
            layer = self.model.get_submodule(source)
            modules = [n for kind, n in readers if kind == "module"]
            only_modules = len(modules) == len(readers)
            if isinstance(layer, nn.LayerNorm):
                if only_modules and all(isinstance(self._get(n), nn.Linear) and self.sources[n] == {source} for n in modules):
                    self.trace.norm_consumers[source] = sorted(modules, key=self.trace.layers.index)
            elif only_modules and len(modules) == 1 and isinstance(self._get(modules[0]), NORM_TYPES):
                self.trace.batchnorm_of[source] = modules[0]
            elif isinstance(layer, nn.Conv2d):
                if only_modules and all(isinstance(self._get(n), LAYER_TYPES) for n in modules):
                    self.trace.layer_readers[source] = modules
                else:
                    self.trace.escaping.add(source)
        # A BatchNorm that reads something else as well must stay.
        folded = defaultdict(set)
        for layer, norm in self.trace.batchnorm_of.items():
            folded[norm].add(layer)
        self.trace.batchnorm_of = {
            layer: norm for layer, norm in self.trace.batchnorm_of.items() if self.sources[norm] == folded[norm]
        }
        self.trace.poolings = [name for name, value in self.pooled.items() if self._has_one_reader(value)]
        return self.trace

    def _get(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)


def _has_plain_arithmetic(layer: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Whether a subclass of Linear or Conv2d computes what its base class does (many only wrap it)."""
    if isinstance(layer, nn.Linear):
        if type(layer).forward is nn.Linear.forward:
            return True
        expected = F.linear(x, layer.weight, layer.bias)
    else:
        if type(layer).forward is nn.Conv2d.forward and layer.padding_mode == "zeros":
            return True
        expected = F.conv2d(
            x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    return expected.shape == output.shape and torch.allclose(expected, output, rtol=1e-4, atol=1e-5)


def _shape_text(example: Inputs) -> str:
    return str(tuple(example.shape)) if isinstance(example, Tensor) else str(shapes(example))


def _is_getter(func) -> bool:
    """Attribute reads such as ``x.shape`` pass through the mode too; they compute nothing."""
    return getattr(func, "__name__", "") == "__get__"


def _moves_last_axis(func, args, kwargs) -> bool:
    """Whether a permute, transpose or roll touches the last axis of its input."""
    rank = args[0].dim()
    if func in (torch.roll, Tensor.roll):
        return rank - 1 in _axes(kwargs.get("dims", args[2:] or rank - 1), rank)
    if func in (torch.permute, Tensor.permute):
        return _axes([*args[1:], *kwargs.values()], rank)[-1] != rank - 1
    if func in (torch.transpose, Tensor.transpose):
        return rank - 1 in _axes([*args[1:], *kwargs.values()], rank)
    return False


def _axes(values: Any, rank: int) -> list[int]:
    if isinstance(values, int):
        return [values % rank]
    return [axis for value in values for axis in _axes(value, rank)]
