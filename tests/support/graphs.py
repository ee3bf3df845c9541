"""Captured graphs under test: without normalization, after each pass, and the operations that are left in them."""

from unittest.mock import patch

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from qwt2.capture import export
from qwt2.capture.batch import call
from qwt2.capture.graph import GraphModel
from qwt2.capture.normalise import PASSES

ATOL = 2e-5


def raw(model: nn.Module, example) -> GraphModel:
    """Return the graph that ``torch.export`` gives, before any pass."""
    with patch.object(export, "normalise", lambda graph: None):
        return export.capture(model, example)


def assert_same(graph: GraphModel, model: nn.Module, inputs, atol: float = ATOL) -> None:
    """Assert that the graph computes what the model computes, and that every node has its recorded shape."""
    with torch.no_grad():
        expected, found = (tree_flatten(call(network, inputs)) for network in (model, graph))
    assert found[1] == expected[1]
    for e, f in zip(expected[0], found[0], strict=True):
        if not isinstance(e, torch.Tensor):
            assert f == e
            continue
        torch.testing.assert_close(f, e, rtol=1e-4, atol=atol * max(1.0, float(e.abs().max())) if e.is_floating_point() else 0)

    def look(node, values):
        value = graph.evaluate(node, values)
        if node.op not in ("output", "get_attr") and isinstance(value, torch.Tensor):
            written = node.meta["shape"]
            assert len(written) == value.dim(), node
            assert all(w in (None, n) for w, n in zip(written, value.shape)), (node, written, value.shape)
        return value

    with torch.no_grad():
        graph.walk(inputs, look)


def pass_after_pass(model: nn.Module, inputs, passes=PASSES, atol: float = ATOL) -> GraphModel:
    """Apply the passes one by one; each must leave the function unchanged, also for another batch size."""
    example = {n: t[:2] for n, t in inputs.items()} if isinstance(inputs, dict) else inputs[:2]
    graph = raw(model.eval(), example)
    assert_same(graph, model, inputs, atol)
    for rewrite in passes:
        rewrite(graph)
        graph.prune()
        graph.graph.lint()
        try:
            assert_same(graph, model, inputs, atol)
        except Exception as error:
            raise AssertionError(f"after {rewrite.__name__}: {error}") from error
    return graph


def operations(graph: GraphModel) -> list[str]:
    """Return the names of the ATen operations that are left, in order."""
    return [node.target.__name__.partition(".")[0] for node in graph.graph.nodes if node.op == "call_function"]


def kinds(graph: GraphModel) -> dict[str, str]:
    """Return module name -> class name, for the modules that run."""
    return {name: type(graph.get_submodule(name)).__name__ for name in graph.calls(nn.Module)}


class Calling(nn.Module):
    """A module whose forward calls a function with the module itself; submodules and parameters are given by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)
