"""Passes that clean up the names and notes of an exported graph."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

# Key in Graph.meta: stored tensor -> its name in ``named_modules``, where the exporter used another name.
FIRST_NAMES = "first names"


def strip_notes(graph: ir.Graph) -> None:
    """Remove the exporter's notes about its run, such as paths and stack traces of the exporting machine.

    onnx-ir's own pass does not remove the notes of values.
    """
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
    outputs = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        value.metadata_props.clear()
    for tensor in graph.initializers.tensors():
        tensor.metadata_props.clear()


def use_first_names(graph: ir.Graph) -> None:
    """Name stored tensors as ``named_modules`` does, so that files can be rewritten from a model's tensors.

    For a module with several names, the exporter may use another one.
    """
    for name, first in graph.meta.get(FIRST_NAMES, {}).items():
        if name in graph.initializers:
            graph.initializers[name].name = first


def separate_names(graph: ir.Graph) -> None:
    """Rename computed values that are called like a stored tensor, such as a buffer "mean" and the mean of an input."""
    for node in graph:
        for value in node.outputs:
            while value.name in graph.initializers:
                value.name = f"{value.name}/computed"


def drop_unread(graph: ir.Graph) -> None:
    """Remove nodes and stored tensors that nothing reads any more after the other passes."""
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))
