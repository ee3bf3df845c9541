"""Language modelling: decoder-only transformers, scored by the next token and by perplexity (experimental)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.common.stage import Cell
from pipeline.experimental.figures import show
from pipeline.experimental.settings import Train
from pipeline.experimental.stdlib_text import windows
from pipeline.tasks import TASKS, Figures, Task, calibration_size
from qwt2.data import open_dataset
from qwt2.errors import Qwt2Error
from qwt2.evaluation.metrics import agreement_percent, sqnr_db
from qwt2.io import read_array, write_array
from qwt2.report.metrics import Metric, signed

if TYPE_CHECKING:
    from torch import nn

    from qwt2.capture.batch import Inputs
    from qwt2.engines import Engine

show(
    "language",
    ("token_accuracy", "perplexity", "bits_per_token"),
    hard_loss=1.0,
    metrics={
        "token_accuracy": Metric("percent", "next token %", "share of tokens predicted correctly", "{:.2f}".format),
        "perplexity": Metric(
            "ratio", "perplexity", "exponential of the mean negative log-likelihood per token", "{:.3f}".format
        ),
        "bits_per_token": Metric(
            "bits", "bits/token", "mean negative log2-likelihood per token", "{:.3f}".format, "everywhere"
        ),
        "engine_token_accuracy_delta": Metric(
            "points", "Δ sim", "next-token accuracy of the engine minus that of the simulation, points", signed
        ),
        "engine_perplexity_delta": Metric(
            "ratio", "Δ sim perplexity", "perplexity of the engine minus that of the simulation", "{:+.4f}".format,
            "everywhere",
        ),
    },
)  # fmt: skip


@dataclass
class Decoder:
    """Keys of ``decoder``: the arguments of :class:`pipeline.experimental.gpt.GPT`."""

    embed_dim: int
    depth: int
    num_heads: int
    context: int


@dataclass
class LanguageModel:
    """Keys of the configuration of a language model."""

    name: str
    decoder: Decoder
    train: Train


@TASKS.register("language")
class Language(Task):
    """Networks that take tokens and give, at each place, one score per next token.

    A window has ``context`` tokens and the one after them. Windows do not overlap, so that every token is predicted
    once, from the tokens before it in its window. Validation windows are spread evenly over the text.
    """

    NAME = "language"
    MODELS = {"decoder": LanguageModel}
    DELTAS = {"token_accuracy": "engine_token_accuracy_delta", "perplexity": "engine_perplexity_delta"}

    def __init__(self, cfg: Any, cell: Cell):
        super().__init__(cfg, cell)
        self.text = open_dataset(cfg["data"], self.folder)
        self.context: int = cfg["model"]["decoder"]["context"]

    def trained(self) -> nn.Module:
        from pipeline.experimental import gpt

        training = self.cfg["model"]["train"]
        return gpt.train(gpt.build(self.cfg["model"]["decoder"], training["seed"]), self.text["train"], training)

    def baseline(self) -> nn.Module:
        from pipeline.experimental import gpt
        from qwt2.classification.models import load_weights

        network = gpt.build(self.cfg["model"]["decoder"])
        load_weights(network, self.cell.baseline / "model.safetensors")
        return network

    def predict(self, network: nn.Module, path: Path) -> None:
        """Store the logits (windows, context, tokens), float32, as ``.npy``."""
        import torch

        from qwt2.capture.batch import call

        inputs = np.array_split(self._val[:, :-1], max(1, len(self._val) // 100))
        with torch.inference_mode():
            logits = [call(network, {"tokens": torch.from_numpy(part)}).numpy() for part in inputs]
        write_array(path.with_suffix(".npy"), np.concatenate(logits))

    def fp32_figures(self) -> Figures:
        return self._accuracy(self._reference)

    def figures(self, path: Path) -> Figures:
        return self._compared(read_array(path.with_suffix(".npy")))

    def scores(self, path: Path) -> np.ndarray:
        """Return each window's share of tokens predicted correctly, in percent, float32 (windows,)."""
        logits = read_array(path.with_suffix(".npy"))
        return 100 * (logits.argmax(-1) == self._targets).mean(1, dtype=np.float32)

    def engine_figures(self, engines: dict[str, Engine]) -> Figures:
        [model] = engines.values()
        size = self.cfg["evaluate"]["batch_size"]
        starts = range(0, len(self._val), size)
        return self._compared(np.concatenate([model({"tokens": self._val[i : i + size, :-1]}) for i in starts]))

    def _compared(self, logits: np.ndarray) -> Figures:
        ours, theirs = (array.reshape(-1, array.shape[-1]) for array in (logits, self._reference))
        distance = {"agreement": agreement_percent(ours, theirs), "logits_sqnr_db": sqnr_db(ours, theirs)}
        return self._accuracy(logits) | distance

    def _accuracy(self, logits: np.ndarray) -> Figures:
        nats = negative_log_likelihood(logits, self._targets)
        return {
            "token_accuracy": 100 * float((logits.argmax(-1) == self._targets).mean()),
            "perplexity": float(np.exp(nats)), "bits_per_token": float(nats / np.log(2)),
        }  # fmt: skip

    @cached_property
    def _reference(self) -> np.ndarray:
        return read_array(self.cell.predictions.with_suffix(".npy"))

    @cached_property
    def _val(self) -> np.ndarray:
        """The validation windows (windows, context + 1), int64.

        Raises:
            Qwt2Error: the validation text has fewer.
        """
        count, tokens = self.cfg["data"]["val_images"], self.text["val"]
        available = (len(tokens) - 1) // self.context
        if count > available:
            raise Qwt2Error(
                f"data.val_images is {count}, but the text has {available} windows of {self.context} tokens"
            )
        return windows(tokens, self.context + 1, self.context * (np.arange(count) * available // count))

    @property
    def _targets(self) -> np.ndarray:
        return self._val[:, 1:]

    def calibration(self, network: nn.Module, seed: int) -> list[Inputs]:
        """Return windows of the training text, which do not overlap, in random order."""
        import torch

        images, batch_size = calibration_size(self.cfg)
        tokens = self.text["train"]
        order = np.random.default_rng(seed).permutation(len(tokens) // self.context)
        drawn = windows(tokens, self.context, self.context * order[:images])
        return [{"tokens": part} for part in torch.from_numpy(drawn).split(batch_size)]

    def example(self, network: nn.Module) -> Inputs:
        return self._first(2)

    def mismatch_inputs(self, network: nn.Module) -> Inputs:
        return self._first(self.cfg["evaluate"]["mismatch_images"])

    def _first(self, count: int) -> Inputs:
        import torch

        return {"tokens": torch.from_numpy(self.latency_input(count)["tokens"])}

    def latency_input(self, batch_size: int) -> dict[str, np.ndarray]:
        return {"tokens": self._val[:batch_size, :-1]}


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean negative log-likelihood in nats of targets (...) under the softmax of logits (..., tokens)."""
    logits = logits.astype(np.float64)
    top = logits.max(-1)
    log_sum = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    return float((log_sum - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean())
