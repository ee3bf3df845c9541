"""Noisy scans of digits, diffusion transformers, and the task that scores the noise that they predict."""

import numpy as np
import pytest
import torch

import qwt2
from pipeline.common.stage import Cell
from pipeline.experimental import dit
from pipeline.experimental.diffusion import STEPS
from pipeline.experimental.noise import SIGNAL, draw, noisy
from pipeline.tasks import open_task
from qwt2.data import open_dataset, write_dataset
from qwt2.errors import Qwt2Error
from qwt2.evaluation.mismatch import engine_mismatch, record_modules
from qwt2.io import save_tensors, write_array
from qwt2.onnx.file import load_onnx
from tests.support.tasks import opened

OVERRIDES = [
    "model=dit_micro", "data.val_images=20", "model.train.steps=80", "model.train.warmup_steps=10",
    "model.dit={embed_dim: 32, depth: 1, num_heads: 2, patch_size: 2}",
    "calibration={images: 64, batch_size: 16, observer_images: 32}",
]  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return opened(OVERRIDES, tmp_path_factory.mktemp("diffusion"))


def test_the_splits_are_disjoint_and_drawn_alike(tmp_path):
    cfg = {"name": "digit_scans", "val_images": 300, "seed": 0}
    for folder in (tmp_path / "one", tmp_path / "two"):
        write_dataset(cfg, folder)
    one, two = (open_dataset(cfg, tmp_path / name) for name in ("one", "two"))
    assert all(np.array_equal(one[split]["images"], two[split]["images"]) for split in ("train", "val"))
    train, val = ({image.tobytes() for image in one[split]["images"]} for split in ("train", "val"))
    assert not train & val and len(one["val"]["labels"]) == 300
    assert one["train"]["images"].min() == -1 and one["train"]["images"].max() == 1
    with pytest.raises(Qwt2Error, match=r"data.val_images is 1000, but there are \d+ scans for validation"):
        write_dataset(cfg | {"val_images": 1000}, tmp_path / "three")


def test_noise_replaces_the_image_and_keeps_unit_variance():
    rng = np.random.default_rng(0)
    images, noise = rng.normal(size=(2, 2000, 1, 8, 8))
    steps = np.repeat(np.array([0, 999]), 1000)
    mixed = noisy(images, np.zeros(2000, np.int64), steps, noise)["images"]
    assert mixed.std() == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(mixed[:1000], images[:1000], atol=0.1)  # 0.01 of the standard deviation is noise
    np.testing.assert_allclose(mixed[1000:], noise[1000:], atol=0.05)
    np.testing.assert_allclose(SIGNAL[:2], [1 - 1e-4, (1 - 1e-4) * (1 - 1e-4 - 0.0199 / 999)])
    inputs, drawn = draw(images[:5], np.arange(5), np.random.default_rng(1))
    signal = SIGNAL[inputs["timesteps"]].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(inputs["images"] - np.sqrt(signal) * images[:5], np.sqrt(1 - signal) * drawn, atol=1e-5)


def test_the_share_of_the_noise_in_closed_form(task, tmp_path):
    task = open_task(task.cfg, Cell("", task.cell.data, tmp_path))
    noise = task._noise
    write_array(tmp_path / "half.npy", 0.5 * noise)  # leaves a quarter of the variance
    write_array(task.cell.predictions.with_suffix(".npy"), noise)
    figures = task.figures(tmp_path / "half")
    assert figures["noise_explained"] == pytest.approx(75)
    assert figures["noise_mse"] == pytest.approx(0.25 * np.square(noise).mean(), rel=1e-5)
    at_last = np.square(noise[-20:]).mean()
    assert figures[f"noise_mse_{STEPS[-1]}"] == pytest.approx(0.25 * at_last, rel=1e-5)
    assert task.scores(tmp_path / "half").mean() == pytest.approx(75, abs=1e-4)
    assert figures["logits_sqnr_db"] == pytest.approx(20 * np.log10(2), abs=1e-5)


def test_every_patch_comes_back_to_its_place():
    network = dit.DiT(embed_dim=16, depth=0, num_heads=2, patch_size=2)
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    squares = image.unfold(2, 2, 2).unfold(3, 2, 2).reshape(1, 16, 4)
    network.last.forward = lambda x, condition: (squares,)
    network.head = torch.nn.Identity()
    zero = torch.zeros(1, dtype=torch.int64)
    assert torch.equal(network(image, zero, zero), image)


@pytest.mark.slow
def test_a_diffusion_transformer_goes_through_quantization_to_an_engine(task, tmp_path):
    network = task.trained()
    save_tensors(task.cell.baseline / "model.safetensors", task.weights(network))
    task.predict(network, task.cell.predictions)
    own = task.fp32_figures()
    assert 20 < own["noise_explained"] < 100
    for name in ("timesteps", "labels"):  # the network reads its conditions
        inputs = task.example(network)
        changed = inputs | {name: (inputs[name] + 3) % 10}
        with torch.no_grad():
            assert not torch.allclose(network(**inputs), network(**changed), atol=1e-5)
    batches = task.calibration(network, seed=1)
    quantized = qwt2.quantize(task.captured(task.baseline()), batches, "repq", qwt2.Precision(4, 8))
    qwt2.compensate(quantized, batches, "cwac")
    task.predict(quantized, tmp_path / "quantized")
    simulated = task.figures(tmp_path / "quantized")
    assert simulated["logits_sqnr_db"] > 10
    folded = qwt2.fold(quantized)
    path = qwt2.export_onnx(folded, tmp_path / "model.onnx", task.example(network))
    on_engine = task.engine_figures({"": qwt2.load_engine(path, "onnxruntime")})
    assert on_engine["noise_explained"] == pytest.approx(simulated["noise_explained"], abs=0.1)
    records = record_modules(folded, task.mismatch_inputs(network))
    steps = {name: found.steps for name, found in engine_mismatch(load_onnx(path), "onnxruntime", records).items()}
    assert len(steps) == len(quantized.quantization.modules) and max(steps.values()) <= 1
