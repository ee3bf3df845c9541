"""Metadata of the ONNX files of this library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import onnx

from qwt2.quantization.targets import TARGETS

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

PRODUCER_KEY = "qwt2"
TARGET_KEY = "qwt2_target"  # the target that the model was quantized for
STRUCTURE_KEY = "qwt2_structure"
SHARED_KEY = "qwt2_shared"  # quantizers that are not in the file -> equal ones that do their work
SHARED = "shared quantizers"  # that mapping in Graph.meta, where qwt2.onnx.passes.quantizers.share_quantizers puts it
PADS_KEY = "qwt2_pads"  # of a convolution: the part of its ``pads`` that was a Pad in front of it
INT4_KEY = "qwt2_int4"  # the opset of the int8 model, and by how many bits its codes are shifted left


def properties(model: onnx.ModelProto) -> dict[str, str]:
    """Return the metadata of a file."""
    return {entry.key: entry.value for entry in model.metadata_props}


def stamp(model: ir.Model, folded: nn.Module, target: str = "portable") -> None:
    """Write into a file's metadata which model it holds and how that model was quantized."""
    info = getattr(folded, "quantization", None)
    label = "float" if info is None else f"{info.method} W{info.precision.weight_bits}A{info.precision.activation_bits}"
    # Models with equal names and types give different files if only one of the targets has float biases.
    form = f"{target} {structure(folded)}" if TARGETS[target].float_biases else structure(folded)
    shared = model.graph.meta.get(SHARED) or shared_quantizers(model.metadata_props)
    notes = {PRODUCER_KEY: label, STRUCTURE_KEY: form, TARGET_KEY: info and info.target}
    notes[SHARED_KEY] = json.dumps(shared, sort_keys=True) if shared else None
    model.metadata_props.clear()
    model.metadata_props.update({key: note for key, note in notes.items() if note is not None})


def structure(model: nn.Module) -> str:
    """Return a digest of the names, shapes and types of everything that a model stores."""
    stored = [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()]
    return hashlib.sha256(json.dumps(stored).encode()).hexdigest()


def shared_quantizers(notes: Mapping[str, str]) -> dict[str, str]:
    """Return which quantizers are not in a file, each with the equal one that does its work; see :data:`SHARED`.

    Args:
        notes: the file's metadata.
    """
    return json.loads(notes.get(SHARED_KEY, "{}"))


def note_folded_pads(convolution: ir.Node, widths: Sequence[int]) -> None:
    """Note that ``pads`` of a convolution have grown by these widths, beside those that are noted already."""
    noted = folded_pads(convolution) or [0] * len(widths)
    convolution.metadata_props[PADS_KEY] = json.dumps([a + b for a, b in zip(noted, widths)])


def folded_pads(node: ir.Node) -> list[int]:
    """Return the part of a convolution's ``pads`` that was a Pad in front of it; empty for any other node."""
    return json.loads(node.metadata_props.get(PADS_KEY, "[]"))
