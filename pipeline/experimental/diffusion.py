"""Diffusion: networks that predict the noise in an image, scored by how much of it they predict (experimental)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import pipeline.experimental.scans  # noqa: F401 - the dataset registers itself
from pipeline.common.stage import Cell
from pipeline.experimental.arrays import Arrays, split, tensors
from pipeline.experimental.figures import show
from pipeline.experimental.noise import draw, noisy
from pipeline.experimental.settings import Train
from pipeline.tasks import TASKS, Figures, Task, calibration_size
from qwt2.data import open_dataset
from qwt2.evaluation.metrics import sqnr_db
from qwt2.io import read_array, write_array
from qwt2.report.metrics import Metric, signed

if TYPE_CHECKING:
    from torch import nn

    from qwt2.capture.batch import Inputs
    from qwt2.engines import Engine

STEPS = (20, 100, 250, 500, 750, 950)  # timesteps at which the error is measured, on every validation image

show(
    "diffusion",
    ("noise_explained", "noise_mse"),
    hard_loss=1.0,
    metrics={
        "noise_explained": Metric(
            "percent", "noise %", "share of the noise's variance that is predicted, over all timesteps", "{:.2f}".format
        ),
        "noise_mse": Metric(
            "ratio", "noise MSE", "mean squared error of the predicted noise, over all timesteps", "{:.4f}".format
        ),
        **{
            f"noise_mse_{step}": Metric(
                "ratio", f"MSE t={step}", f"mean squared error of the predicted noise at timestep {step}",
                "{:.4f}".format, "everywhere",
            )
            for step in STEPS
        },
        "engine_noise_explained_delta": Metric(
            "points", "Δ sim", "predicted share of the noise on the engine minus that of the simulation, points", signed
        ),
    },
)  # fmt: skip


@dataclass
class Transformer:
    """Keys of ``dit``: the arguments of :class:`pipeline.experimental.dit.DiT`."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int


@dataclass
class DiffusionModel:
    """Keys of the configuration of a diffusion transformer."""

    name: str
    dit: Transformer
    train: Train


@TASKS.register("diffusion")
class Diffusion(Task):
    """Networks that take noisy images, timesteps and classes, and give the noise.

    Every validation image is seen at each of :data:`STEPS`, with noise of its own that never changes.
    """

    NAME = "diffusion"
    MODELS = {"dit": DiffusionModel}
    DELTAS = {"noise_explained": "engine_noise_explained_delta"}

    def __init__(self, cfg: Any, cell: Cell):
        super().__init__(cfg, cell)
        self.scans = open_dataset(cfg["data"], self.folder)

    def trained(self) -> nn.Module:
        from pipeline.experimental import dit

        training = self.cfg["model"]["train"]
        return dit.train(dit.build(self.cfg["model"]["dit"], training["seed"]), self.scans["train"], training)

    def baseline(self) -> nn.Module:
        from pipeline.experimental import dit
        from qwt2.classification.models import load_weights

        network = dit.build(self.cfg["model"]["dit"])
        load_weights(network, self.cell.baseline / "model.safetensors")
        return network

    def predict(self, network: nn.Module, path: Path) -> None:
        """Store the predicted noise (timesteps x images, 1, 8, 8), float32, as ``.npy``."""
        import torch

        from qwt2.capture.batch import call

        with torch.inference_mode():
            noise = [call(network, tensors(inputs)).numpy() for inputs in split(self._val, 300)]
        write_array(path.with_suffix(".npy"), np.concatenate(noise))

    def fp32_figures(self) -> Figures:
        return self._errors(self._reference)

    def figures(self, path: Path) -> Figures:
        return self._compared(read_array(path.with_suffix(".npy")))

    def scores(self, path: Path) -> np.ndarray:
        """Return the predicted share of the noise per image, in percent, float32 (images,); its mean is the figure."""
        errors = self._squared_errors(read_array(path.with_suffix(".npy"))).mean(0)
        return (100 * (1 - errors / np.square(self._noise, dtype=np.float64).mean())).astype(np.float32)

    def engine_figures(self, engines: dict[str, Engine]) -> Figures:
        [model] = engines.values()
        batches = split(self._val, self.cfg["evaluate"]["batch_size"])
        return self._compared(np.concatenate([model(inputs) for inputs in batches]))

    def _compared(self, predicted: np.ndarray) -> Figures:
        return self._errors(predicted) | {"logits_sqnr_db": sqnr_db(predicted, self._reference)}

    def _errors(self, predicted: np.ndarray) -> Figures:
        by_step = self._squared_errors(predicted).mean(1)
        share = 1 - by_step.mean() / np.square(self._noise, dtype=np.float64).mean()
        errors = {f"noise_mse_{step}": float(error) for step, error in zip(STEPS, by_step)}
        return {"noise_explained": float(100 * share), "noise_mse": float(by_step.mean())} | errors

    def _squared_errors(self, predicted: np.ndarray) -> np.ndarray:
        """Return the mean squared errors (timesteps, images)."""
        errors = np.square(predicted.astype(np.float64) - self._noise).mean((1, 2, 3))
        return errors.reshape(len(STEPS), -1)

    @cached_property
    def _reference(self) -> np.ndarray:
        return read_array(self.cell.predictions.with_suffix(".npy"))

    @cached_property
    def _noise(self) -> np.ndarray:
        """The noise (timesteps x images, 1, 8, 8) in the validation images."""
        images = self.scans["val"]["images"]
        rng = np.random.default_rng(self.cfg["data"]["seed"])
        return rng.standard_normal((len(STEPS) * len(images), *images.shape[1:]), np.float32)

    @cached_property
    def _val(self) -> Arrays:
        """The inputs at all timesteps, one timestep after another."""
        images, labels = (self.scans["val"][name] for name in ("images", "labels"))
        timesteps = np.repeat(np.array(STEPS, np.int64), len(images))
        return noisy(np.tile(images, (len(STEPS), 1, 1, 1)), np.tile(labels, len(STEPS)), timesteps, self._noise)

    def calibration(self, network: nn.Module, seed: int) -> list[Inputs]:
        """Return training images, drawn with repetition, with noise of random timesteps."""
        images, batch_size = calibration_size(self.cfg)
        rng = np.random.default_rng(seed)
        chosen = rng.integers(0, len(self.scans["train"]["labels"]), images)
        inputs, _ = draw(self.scans["train"]["images"][chosen], self.scans["train"]["labels"][chosen], rng)
        return [tensors(part) for part in split(inputs, batch_size)]

    def example(self, network: nn.Module) -> Inputs:
        return tensors(self.latency_input(2))

    def mismatch_inputs(self, network: nn.Module) -> Inputs:
        return tensors(self.latency_input(self.cfg["evaluate"]["mismatch_images"]))

    def latency_input(self, batch_size: int) -> Arrays:
        """Return inputs at different timesteps."""
        spread = np.linspace(0, len(self._noise) - 1, batch_size).astype(int)
        return {name: array[spread] for name, array in self._val.items()}
