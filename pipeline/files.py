"""The files that an exported model consists of: one, or one for every part of a detector."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qwt2.onnx.export import Exporter, structure
from qwt2.capture.batch import Inputs


class FileExporter:
    """Writes files of whole networks.

    Args:
        example_input: one input batch.
    """

    def __init__(self, example_input: Inputs):
        self.exporter = Exporter(example_input)

    def export(self, folded: nn.Module, path: Path) -> Path:
        return self.exporter.export(folded, path)

    def learn(self, path: Path) -> None:
        """Write files of its structure into copies of a file that another process exported."""
        self.exporter.learn(path)

    def structure(self, folded: nn.Module) -> str:
        """The same for networks whose files differ in stored numbers alone."""
        return structure(folded)

    def holds(self, folded: nn.Module, module: str) -> bool:
        """Whether the file holds a module of the network."""
        return True


class PartExporter(FileExporter):
    """Writes files of one part of a detector.

    Args:
        name: of the part.
        example_input: what the part is called with.
    """

    def __init__(self, name: str, example_input):
        self.name, self.exporter = name, Exporter(example_input, output_names=None)

    def export(self, folded: nn.Module, path: Path) -> Path:
        return self.exporter.export(self._part(folded), path)

    def structure(self, folded: nn.Module) -> str:
        return structure(self._part(folded))

    def holds(self, folded: nn.Module, module: str) -> bool:
        return self._part(folded).holds(module)

    def _part(self, folded: nn.Module) -> nn.Module:
        from qwt2.detection.parts import Part

        return Part(folded, self.name)


def file_exporters(network: nn.Module, inputs: Inputs) -> dict[str, FileExporter]:
    """One for every file of an exported model, by its name in `Cell.onnx`; a detector's inputs have names."""
    if not isinstance(inputs, dict):
        return {"": FileExporter(inputs)}
    from qwt2.detection.parts import part_inputs

    return {name: PartExporter(name, example) for name, example in part_inputs(network, inputs).items()}
