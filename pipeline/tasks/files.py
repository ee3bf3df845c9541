"""The files that an exported model consists of: one, or one for every part of a detector."""

from __future__ import annotations

from pathlib import Path

from qwt2.capture.batch import Inputs
from qwt2.capture.graph import GraphModel
from qwt2.onnx.export import Exporter, structure


class FileExporter:
    """Writes files of whole networks.

    Args:
        example_input: one input batch.
    """

    def __init__(self, example_input: Inputs):
        self.exporter = Exporter(example_input)

    def export(self, folded: GraphModel, path: Path) -> Path:
        return self.exporter.export(folded, path)

    def learn(self, path: Path) -> None:
        """Write files of its structure into copies of a file that another process exported."""
        self.exporter.learn(path)

    def structure(self, folded: GraphModel) -> str:
        """The same for networks whose files differ in stored numbers alone."""
        return structure(folded)

    def holds(self, module: str) -> bool:
        """Whether the file holds a module of the network."""
        return True


class PartExporter(FileExporter):
    """Writes files of one part of a detector.

    Args:
        name: of the part.
        inputs: of the whole detector.
        example_input: what the part is called with then.
        heads: names of the parts that are heads.
    """

    def __init__(self, name: str, inputs: Inputs, example_input: Inputs, heads: list[str]):
        super().__init__(example_input)
        self.name, self.inputs, self.heads = name, inputs, heads

    def export(self, folded: GraphModel, path: Path) -> Path:
        return super().export(self._part(folded), path)

    def structure(self, folded: GraphModel) -> str:
        return super().structure(self._part(folded))

    def holds(self, module: str) -> bool:
        inside = [head for head in self.heads if module.startswith(f"{head}.")]
        return inside == ([self.name] if self.name in self.heads else [])

    def _part(self, folded: GraphModel) -> GraphModel:
        from qwt2.detection.parts import split

        return split(folded.of_size(list(self.inputs.values())))[self.name]


def file_exporters(captured: GraphModel, inputs: Inputs) -> dict[str, FileExporter]:
    """One for every file of an exported model, by its name in `Cell.onnx`; a detector's inputs have names."""
    if not isinstance(inputs, dict):
        return {"": FileExporter(inputs)}
    from qwt2.detection.parts import DENSE, part_inputs

    examples = part_inputs(captured.of_size(list(inputs.values())), inputs)
    return {
        name: PartExporter(name, inputs, example, [n for n in examples if n != DENSE])
        for name, example in examples.items()
    }
