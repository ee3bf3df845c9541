"""Writing the files of an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwt2.capture.batch import Inputs
    from qwt2.capture.graph import GraphModel


class FileExporter:
    """Writes files of whole networks.

    Args:
        example_input: one input batch.
    """

    def __init__(self, example_input: Inputs):
        from qwt2.onnx.templates import Exporter

        self.exporter = Exporter(example_input)

    def export(self, folded: GraphModel, path: Path) -> Path:
        """Write a folded model as an ONNX file and return its path."""
        return self.exporter.export(folded, path)

    def learn(self, path: Path) -> None:
        """Take a file that another process exported as the template for later files of the same structure."""
        self.exporter.learn(path)

    def structure(self, folded: GraphModel) -> str:
        """Return a text that is equal for networks whose files differ only in stored numbers."""
        from qwt2.onnx.metadata import structure

        return structure(folded)

    def holds(self, module: str) -> bool:
        """Return whether the file holds this module of the network."""
        return True
