"""Capture a model as one graph of ATen operations."""

from __future__ import annotations

import builtins
import inspect
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_unflatten

from qwt2.capture.batch import Inputs, call, tensors
from qwt2.capture.check import evaluation_mode
from qwt2.capture.graph import GraphModel, OtherSizes, Signature
from qwt2.capture.normalise import normalise
from qwt2.errors import Qwt2Error

_ATTRIBUTES = {*vars(GraphModel), "edits", "graph", "other_sizes", "quantization", "signature", "title"}
_UNKNOWN_OUTPUT = re.compile(r"Found <class '(.+?)'> in output, which is not a known type")
_REPEATED = re.compile(r"@\d+")


def capture(model: nn.Module, example: Inputs) -> GraphModel:
    """Return the graph of a model in evaluation mode, for calls like ``model(example)``; the model is not changed.

    Args:
        model: any module that ``torch.export`` can trace. If it has a method ``capture_parts(example)``, that method
            captures it; networks whose parts are joined by untraceable code (detectors) need it.
        example: one batch; its first axis counts images and stays dynamic.

    Raises:
        Qwt2Error: if the model cannot run on the example, or cannot be traced; the message names the line of its code.
    """
    if isinstance(model, GraphModel):
        return model
    captured = model.capture_parts(example) if hasattr(model, "capture_parts") else _captured(model, example)
    captured.other_sizes = OtherSizes(lambda inputs: capture(model, inputs))
    return captured.eval()


def _captured(model: nn.Module, example: Inputs) -> GraphModel:
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    names = [*inspect.signature(model.forward).parameters]
    # torch.export orders named inputs as the forward method does.
    kwargs = dict(sorted(kwargs.items(), key=lambda item: names.index(item[0]) if item[0] in names else len(names)))
    with evaluation_mode(model), torch.no_grad():
        _try(model, example)
        program = _program(model, args, kwargs)
    signature = Signature.of(model.forward, args, kwargs, program.call_spec.out_spec)
    graph_model = _graph_model(model, program, signature)
    normalise(graph_model)
    return graph_model


def _try(model: nn.Module, example: Inputs) -> None:
    try:
        call(model, example)
    except Exception as error:  # the model's code may raise anything
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors(example).items()}
        raise Qwt2Error(
            f"{type(model).__name__} cannot run on {shapes} ({_first_line(error)}); give images as it takes them"
        ) from error


def _program(model: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    # A batch of one would be specialized to a constant. A tensor that is given twice would become one input.
    args, kwargs = torch.utils._pytree.tree_map(
        lambda x: x.expand(2, *x.shape[1:]) if len(x) == 1 else x.clone(), (args, kwargs)
    )
    free = free_axes(model, args, kwargs)
    with _silence(), _traceable():
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=free, strict=False)
            return program.run_decompositions({})  # in-place writes become values of their own
        except Exception as error:  # the model's code may raise anything on a traced tensor
            raise Qwt2Error(
                f"{type(model).__name__} cannot be captured: {_reason(error)}; torch.export must be able to trace its "
                "forward, which excludes branches on the values of tensors"
            ) from error


def free_axes(model: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> dict[str, Any]:
    """Return the first axis of every input as dynamic, in torch.export's form: by parameter of the forward method."""
    batch = torch.export.Dim("batch")
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return torch.utils._pytree.tree_map(lambda x: {0: batch}, dict(bound))


def _length(x: Any) -> int | torch.SymInt:
    """Return ``len(x)``, symbolic for tensors: Python's own would fix the batch size to a number."""
    return x.shape[0] if isinstance(x, Tensor) and x.dim() else _PYTHONS_LEN(x)


_PYTHONS_LEN = len
_ONE_CAPTURE = threading.RLock()


def _reason(error: Exception) -> str:
    """Return the exception's first line and the innermost line of code outside PyTorch in its traceback."""
    line, trace = "", error.__traceback__
    if "Constraints violated (batch)" in str(error):
        return "its code takes the number of images for a constant (int(x.shape[0]), or a reshape to a number of rows)"
    if unknown := _UNKNOWN_OUTPUT.search(str(error)):
        name = unknown[1].rpartition(".")[2]
        return f"it returns a {name}, unknown to PyTorch; call torch.export.register_dataclass({name}) once"
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and "qwt2/capture" not in file:
            line = f" at {file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return _first_line(error) + line


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def _silence() -> Iterator[None]:
    """Silence torch.export's warnings, log messages, and the graph that it prints when it fails."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def _traceable() -> Iterator[None]:
    """Make PyTorch's own transformers run plain operations, and make ``len(x)`` return the symbolic batch size.

    The fast path of the transformers reads the values of masks, which a graph cannot do. Both changes apply to the
    whole process. Captures therefore wait for each other, and other threads see a different ``len`` only on traced
    tensors.
    """
    from torch._dynamo import trace_rules

    transformer = torch.nn.modules.transformer
    trace_rules.is_builtin_callable(len)  # torch keeps the set of Python's functions from the first such question
    with _ONE_CAPTURE:
        fast, detect = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask
        torch.backends.mha.set_fastpath_enabled(False)
        # The mask itself is always passed; knowing that it is causal would only select another kernel.
        transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
        builtins.len = _length  # type: ignore[assignment]
        try:
            yield
        finally:
            builtins.len = _PYTHONS_LEN
            torch.backends.mha.set_fastpath_enabled(fast)
            transformer._detect_is_causal_mask = detect


def _graph_model(model: nn.Module, program: torch.export.ExportedProgram, signature: Signature) -> GraphModel:
    """Convert a program: parameters and buffers become ``get_attr`` nodes, and only light metadata is kept."""
    _refuse_mutation(model, program)
    first_names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    modules = {id(module): name for name, module in model.named_modules()}
    graph, values, used, taken = fx.Graph(), {}, {}, _interface_names(signature)
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        if (
            node.op == "placeholder"
            and kinds[node.name].kind == InputKind.USER_INPUT
            and isinstance(node.meta["val"], Tensor)
        ):
            values[node] = graph.placeholder(node.name)
            values[node].meta = _meta(node, "")
    for node in program.graph.nodes:
        if node.op == "placeholder":
            target = kinds[node.name].target
            if target is None or not node.users:
                continue
            tensor = program.state_dict[target] if target in program.state_dict else program.constants[target]
            name = _apart_from_methods(first_names.get(id(tensor), target))
            name = f"{name}_stored" if name in taken else name
            used[name] = _own(tensor)
            values[node] = graph.get_attr(name)
            values[node].meta = _meta(node, "")
        elif node.op == "get_attr":  # a graph of its own, which torch.cond or a loop runs
            raise Qwt2Error(
                f"{type(model).__name__} runs torch.cond or another operator of control flow, which integer engines "
                "lack; run one branch in evaluation mode, or compute both and choose with torch.where"
            )
        elif node.op == "output":
            outputs = [
                arg for arg, spec in zip(node.args[0], program.graph_signature.output_specs)
                if spec.kind == OutputKind.USER_OUTPUT
            ]  # fmt: skip
            graph.output([values.get(arg, arg) if isinstance(arg, fx.Node) else arg for arg in outputs])
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            module = _module_path(model, modules, node)
            values[node].meta = _meta(node, _apart_from_methods(module)) | {
                "call": _call_of(node),
                "leaf": _is_leaf(model, module),
            }
    return GraphModel(graph, used, signature, type(model).__name__)


def _apart_from_methods(name: str) -> str:
    """Return a name of the model, with "_" behind its first part if that is an attribute of every graph ("output")."""
    first, dot, rest = name.partition(".")
    return f"{first}_{dot}{rest}" if first in _ATTRIBUTES else name


def _interface_names(signature: Signature) -> set[str]:
    """Return the names that a file's inputs and outputs may have; nothing else in the file can be called so."""
    outputs = tree_unflatten([0] * signature.out_spec.num_leaves, signature.out_spec)
    return {"images", "logits", *signature.parameters.parameters, *(outputs if isinstance(outputs, Mapping) else ())}


def _own(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _refuse_mutation(model: nn.Module, program: torch.export.ExportedProgram) -> None:
    for spec in program.graph_signature.output_specs:
        if spec.kind == OutputKind.BUFFER_MUTATION:
            raise Qwt2Error(
                f"{type(model).__name__} writes its buffer {spec.target} in evaluation mode, so its calls depend "
                "on each other; leave that out"
            )


def _is_leaf(model: nn.Module, name: str) -> bool:
    """Return whether a module is a single layer."""
    module = model.get_submodule(name)
    is_layer = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))  # parametrized ones have children
    return bool(name) and (is_layer or not any(True for _ in module.children()))


def _meta(node: fx.Node, module: str) -> dict[str, Any]:
    value = node.meta.get("val")
    shape = dtype = None
    if isinstance(value, Tensor):
        shape, dtype = tuple(size if isinstance(size, int) else None for size in value.shape), value.dtype
    return {"module": module, "shape": shape, "dtype": dtype, "leaf": False, "call": ""}


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """Return (key, name) of the modules that a node lies in, starting with the outermost."""
    entries = [(key, value[0]) for key, value in (node.meta.get("nn_module_stack") or {}).items()]
    return [] if entries and entries[0][0].startswith("_empty") else entries


def _module_path(model: nn.Module, first_names: dict[int, str], node: fx.Node) -> str:
    """Return the first name of the module that a node comes from."""
    stack = _stack(node)
    if not stack:
        return ""
    name = _REPEATED.sub("", stack[-1][1])
    return first_names[id(model.get_submodule(name))]


def _call_of(node: fx.Node) -> str:
    """Return the calls of the modules around a node, joined by "/"; "@n" marks a module's n-th repeated call."""
    return "/".join(key.removeprefix("L__self__") for key, _ in _stack(node))
