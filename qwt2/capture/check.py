"""Check that a captured graph computes the same as its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from qwt2.capture.batch import Inputs, call, single_images
from qwt2.capture.graph import GraphModel
from qwt2.errors import Qwt2Error

# Outputs whose SQNR is at least this (dB) count as equal; the SQNR after rounding in float32 is far higher.
SAME_DB = 60.0
# The same for the output of one module for the same input. The errors of many modules add up in a network's outputs.
_SAME_MODULE_DB = 80.0


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode, and restore its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, nn.Module, tuple, Any], None]) -> Iterator[None]:
    """Call ``see(name, module, arguments, output)`` after each run of these modules."""

    def hook(name: str) -> Callable:
        return lambda module, args, output: see(name, module, args, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outputs_of(model: nn.Module, inputs: Inputs) -> list[Any]:
    """Return all of a model's outputs in evaluation mode, as a flat list."""
    with torch.no_grad(), evaluation_mode(model):
        return tree_flatten(call(model, inputs))[0]


def check_captured(model: nn.Module, captured: GraphModel, inputs: Inputs) -> list[Any]:
    """Refuse a graph that does not compute the same as its model.

    Returns:
        The model's outputs.

    Raises:
        Qwt2Error: if the outputs differ by more than rounding; the message names the first module that differs.
    """
    exact = outputs_of(model, inputs)
    if same_outputs(exact, outputs_of(captured, inputs)):
        return exact
    with torch.no_grad(), evaluation_mode(model):
        name = _first_difference(model, captured, inputs)
    raise Qwt2Error(
        f"{type(model).__name__} computes something else when it is traced, "
        f"first in {name or 'its own forward method'}; random numbers, and branches on values, cannot be captured: "
        "leave them out in evaluation mode"
    )


def same_outputs(exact: list[Any], found: list[Any]) -> bool:
    """Return whether the outputs of two calls agree up to rounding in float32."""
    return len(exact) == len(found) and all(map(_same, exact, found))


def differing_modules(exact: GraphModel, changed: GraphModel, inputs: Inputs) -> list[str]:
    """Return the modules with operations that do not give, for the values in the original graph, what they gave there.

    If there is none, the two graphs compute the same up to rounding, even if a network turns small differences into
    other outputs (a choice of the best among almost equal scores).

    Args:
        exact: the original graph.
        changed: a copy of it with some modules replaced and some BatchNorms folded into the layers before them.
        inputs: a batch; the images are taken one by one, because all values of one image are kept.
    """
    found: dict[str, None] = {}
    left = {node.name: node for node in changed.graph.nodes}
    for image in single_images(inputs):
        values: dict[fx.Node, Any] = dict(zip(exact.inputs, exact.tensors_of(image)))
        with torch.no_grad():
            for node in exact.graph.nodes:
                if node.op != "placeholder":
                    values[node] = exact.evaluate(node, values)
            given = {left[node.name]: values[_replaced(node, left)] for node in values if node.name in left}
            for node, value in given.items():
                if node.op.startswith("call") and not _same_value(value, changed.evaluate(node, given)):
                    found[str(node.target if node.op == "call_module" else node.meta["module"])] = None
    return list(found)


def _same_value(exact: Any, found: Any) -> bool:
    return all(_same(e, f, _SAME_MODULE_DB) for e, f in zip(tree_flatten(exact)[0], tree_flatten(found)[0]))


def _replaced(node: fx.Node, left: Mapping[str, fx.Node]) -> fx.Node:
    """Return the last node that a node of the changed graph stands for: of a layer's BatchNorm, if it was folded."""
    while node.op == "call_module" or node.name not in left:
        erased = [user for user in node.users if user.name not in left]
        if not erased:
            break
        node = erased[0]
    return node


def _same(exact: Any, found: Any, same_db: float = SAME_DB) -> bool:
    if not isinstance(exact, Tensor):
        return exact == found
    if exact.shape != found.shape or not exact.is_floating_point():
        return exact.shape == found.shape and torch.equal(exact, found)
    signal, error = exact.double().square().sum(), (exact.double() - found.double()).square().sum()
    return bool(torch.allclose(exact, found, 0, 0, equal_nan=True) or error <= signal * 10 ** (-same_db / 10))


def _first_difference(model: nn.Module, captured: GraphModel, inputs: Inputs) -> str:
    """Return the first module whose output tensor is not among the values of its part of the graph, or ""."""
    given: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            given.setdefault(name, []).append(output)

    with watching(dict(model.named_modules()), keep):
        call(model, inputs)
    values: dict[str, list[Tensor]] = {}

    def note(node, known):
        value = captured.evaluate(node, known)
        module = node.meta.get("module", "")
        while isinstance(value, Tensor):  # a module's output may be computed by a module inside it
            values.setdefault(module, []).append(value)
            if not module:
                break
            module = module.rpartition(".")[0]
        return value

    captured.walk(inputs, note)
    for name, outputs in given.items():
        if name in values and not any(
            _same(outputs[0], value) for value in values[name] if value.dtype == outputs[0].dtype
        ):
            return name
    return ""
