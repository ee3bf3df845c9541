"""Names and notes of an exported graph."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

# In Graph.meta: stored tensor -> its name in `named_modules`, where the exporter used another one.
FIRST_NAMES = "first names"


def strip_notes(graph: ir.Graph) -> None:
    """Drop what the exporter notes about its run: paths and stack traces of the exporting machine.

    onnx-ir's own pass leaves the notes of values.
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
    """Name stored tensors as `named_modules` does, so that files can be written anew from a model's tensors.

    The exporter may use another name of a module that has several.
    """
    for name, first in graph.meta.get(FIRST_NAMES, {}).items():
        if name in graph.initializers:
            graph.initializers[name].name = first


def drop_unread(graph: ir.Graph) -> None:
    """Drop nodes and stored tensors that nothing reads, which other passes have left."""
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))
