"""Export of many models of one structure: the first is exported, the others are written into copies of its file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import nn

from qwt2.capture.batch import Inputs
from qwt2.errors import Qwt2Error
from qwt2.onnx.export import write_onnx
from qwt2.onnx.file import load_onnx, save_onnx
from qwt2.onnx.graph import store
from qwt2.onnx.metadata import STRUCTURE_KEY, properties, shared_quantizers, stamp, structure
from qwt2.onnx.names import stored_values
from qwt2.onnx.passes import rewrite_numbers


class Exporter:
    """Exports many models. A model whose structure was exported before is written into a copy of that file.

    Args:
        example_input: as in :func:`write_onnx`.
    """

    def __init__(self, example_input: Inputs):
        self.example_input = example_input
        self._templates: dict[str, Path] = {}

    def export(self, folded: nn.Module, path: str | os.PathLike) -> Path:
        """Export a model as :func:`write_onnx` does and return ``path``. Earlier files must still exist."""
        known = self._templates.get(structure(folded))
        if known is not None:
            return rewrite_onnx(known, folded, path)
        return self.learn(write_onnx(folded, path, self.example_input))

    def learn(self, path: Path) -> Path:
        """Use a file that was exported elsewhere as the template for models of its structure, and return ``path``."""
        self._templates[properties(load_onnx(path)).get(STRUCTURE_KEY, "")] = path
        return path


def rewrite_onnx(template: str | os.PathLike, folded: nn.Module, path: str | os.PathLike) -> Path:
    """Write ``folded`` into a copy of an exported file of a model of the same structure.

    Only stored numbers change, so both files have the same operators in the same order. This takes a fraction of the
    time of an export.

    Args:
        template: the exported file.
        folded: the folded model.
        path: the new file; written atomically.

    Returns:
        ``path``.

    Raises:
        Qwt2Error: the file was not exported by this library, or holds a model of another structure; or quantizers
            that share one in the file have different numbers in ``folded``.
    """
    model = ir.from_proto(load_onnx(template))
    if structure(folded) != model.metadata_props.get(STRUCTURE_KEY):
        raise Qwt2Error(f"{template} holds a model of another structure; export this one with qwt2.export_onnx")
    state = {name: tensor.detach().cpu().numpy() for name, tensor in folded.state_dict().items()}
    for value in model.graph.initializers.values():
        array = stored_values(value.name, state)
        if array is not None:
            store(value, array)
    _check_shared(shared_quantizers(model.metadata_props), state)
    rewrite_numbers(model.graph)
    stamp(model, folded)
    return save_onnx(model, path)


def _check_shared(shared: dict[str, str], state: dict[str, np.ndarray]) -> None:
    """Raise if quantizers that share one in the file have different numbers in ``state``."""
    for name, other in shared.items():
        for key in [key for key in state if key.rpartition(".")[0] == name]:
            if not np.array_equal(state[key], state[f"{other}.{key.rpartition('.')[2]}"]):
                raise Qwt2Error(
                    f"{name} and {other} differ, which share a quantizer in the file; "
                    "export the model with qwt2.export_onnx again"
                )
