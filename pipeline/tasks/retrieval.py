"""Retrieval: sentence encoders, scored by how often a query's nearest document is its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.common.stage import Cell
from pipeline.tasks import TASKS, Figures, Task, calibration_size
from qwt2.data import open_dataset
from qwt2.evaluation.metrics import cosine, own_document_is_nearest, recall_at_1_percent, sqnr_db
from qwt2.io import read_array, write_array

if TYPE_CHECKING:
    from torch import nn

    from qwt2.capture.batch import Inputs
    from qwt2.engines import Engine

Tokens = dict[str, np.ndarray]
PREDICTED = 100  # texts per batch in simulation


@dataclass
class Encoder:
    """Keys of the configuration of a sentence encoder."""

    name: str
    encoder: str  # package:folder of a BERT-like model in Hugging Face's layout
    tokens: int  # length that every text is cut or padded to
    checkpoint: str  # package:file of its weights


@TASKS.register("retrieval")
class Retrieval(Task):
    """Networks that take texts and give one vector of unit length per text."""

    NAME = "retrieval"
    MODELS = {"encoder": Encoder}
    DELTAS = {"recall1": "engine_recall1_delta"}

    def __init__(self, cfg: Any, cell: Cell):
        super().__init__(cfg, cell)
        self.pairs = open_dataset(cfg["data"], self.folder)

    def trained(self) -> nn.Module:
        from qwt2.retrieval.encoder import build_encoder, load_bert

        encoder = build_encoder(self.cfg["model"]["encoder"])
        load_bert(encoder, self.cfg["model"]["checkpoint"])
        return encoder

    def baseline(self) -> nn.Module:
        from qwt2.classification.models import load_weights
        from qwt2.retrieval.encoder import build_encoder

        encoder = build_encoder(self.cfg["model"]["encoder"])
        load_weights(encoder, self.cell.baseline / "model.safetensors")
        return encoder

    def predict(self, network: nn.Module, path: Path) -> None:
        """Store the vectors (2 N, hidden), float32, as ``.npy``: those of all queries, then those of all documents."""
        import torch

        from qwt2.capture.batch import call

        with torch.inference_mode():
            vectors = [call(network, _tensors(tokens)).numpy() for tokens in _split(self._val, PREDICTED)]
        write_array(path.with_suffix(".npy"), np.concatenate(vectors))

    def fp32_figures(self) -> Figures:
        return {"recall1": self._recall(self._reference)}

    def figures(self, path: Path) -> Figures:
        return self._compared(read_array(path.with_suffix(".npy")))

    def scores(self, path: Path) -> np.ndarray:
        """Return 100 for every query whose nearest document is its own, and 0 for the others, float32 (N,)."""
        return 100 * own_document_is_nearest(*np.split(read_array(path.with_suffix(".npy")), 2)).astype(np.float32)

    def engine_figures(self, engines: dict[str, Engine]) -> Figures:
        [model] = engines.values()
        batches = _split(self._val, self.cfg["evaluate"]["batch_size"])
        return self._compared(np.concatenate([model(tokens) for tokens in batches]))

    def _compared(self, vectors: np.ndarray) -> Figures:
        return {
            "recall1": self._recall(vectors), "cosine": cosine(vectors, self._reference),
            "logits_sqnr_db": sqnr_db(vectors, self._reference),
        }  # fmt: skip

    def _recall(self, vectors: np.ndarray) -> float:
        return recall_at_1_percent(*np.split(vectors, 2))

    @cached_property
    def _reference(self) -> np.ndarray:
        return read_array(self.cell.predictions.with_suffix(".npy"))

    def calibration(self, network: nn.Module, seed: int) -> list[Inputs]:
        """Return tokens of training texts in random order; queries and documents alike."""
        images, batch_size = calibration_size(self.cfg)
        texts = [text for pair in self.pairs["train"] for text in pair]
        order = np.random.default_rng(seed).permutation(len(texts))[:images]
        tokens = self._tokens([texts[index] for index in order])
        return [_tensors(part) for part in _split(tokens, batch_size)]

    def example(self, network: nn.Module) -> Inputs:
        return _tensors(self.latency_input(2))

    def mismatch_inputs(self, network: nn.Module) -> Inputs:
        return _tensors(self.latency_input(self.cfg["evaluate"]["mismatch_images"]))

    def latency_input(self, batch_size: int) -> Tokens:
        return next(_split(self._val, batch_size))

    @cached_property
    def _val(self) -> Tokens:
        """Tokens of all queries, then of all documents."""
        queries, documents = zip(*self.pairs["val"])
        return self._tokens([*queries, *documents])

    def _tokens(self, texts: list[str]) -> Tokens:
        from qwt2.retrieval.encoder import tokenize

        return tokenize(self.cfg["model"]["encoder"], texts, self.cfg["model"]["tokens"])


def _split(tokens: Tokens, size: int) -> Iterator[Tokens]:
    """Yield batches of ``size`` texts; the last one may be smaller."""
    for start in range(0, len(tokens["input_ids"]), size):
        yield {name: array[start : start + size] for name, array in tokens.items()}


def _tensors(tokens: Tokens) -> Inputs:
    import torch

    return {name: torch.from_numpy(array) for name, array in tokens.items()}
