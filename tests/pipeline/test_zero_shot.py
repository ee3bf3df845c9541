"""Captions of digits, both encoders of a CLIP, and the task that classifies by their agreement."""

import numpy as np
import pytest
import torch

import qwt2
from pipeline.build.compose import compose_cell
from pipeline.experimental import clip
from pipeline.experimental.captions import DIGITS, LENGTH, TEMPLATES, VOCABULARY, captions
from qwt2.data import open_dataset, write_dataset
from qwt2.evaluation.mismatch import engine_mismatch, record_modules
from qwt2.io import save_arrays, save_tensors
from qwt2.onnx.file import load_onnx
from tests.support.tasks import opened

OVERRIDES = [
    "model=clip_micro", "data.train_images=200", "data.val_images=40", "model.clip.dimensions=16",
    "model.clip.image={img_size: 32, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
    "model.clip.text={embed_dim: 16, depth: 1, num_heads: 2}", "model.train.steps=300", "model.train.warmup_steps=10",
    "calibration={images: 64, batch_size: 16, observer_images: 32}", "evaluate.batch_size=15",
]  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return opened(OVERRIDES, tmp_path_factory.mktemp("clip"))


def test_captions_spell_their_class_and_end_alike():
    for template in TEMPLATES:
        tokens = captions(template)
        words = [" ".join(VOCABULARY[token] for token in row).replace("<padding> ", "") for row in tokens]
        assert words == [f"{template.format(digit)} <end>" for digit in DIGITS]
        assert tokens.shape == (10, LENGTH)


def test_the_images_are_those_of_the_digits(task, tmp_path):
    digits = {**compose_cell(OVERRIDES)["data"], "name": "digits"}
    write_dataset(digits, tmp_path)
    stored = open_dataset(digits, tmp_path)
    assert np.array_equal(stored.images("val", np.arange(40)), task.dataset.images("val", np.arange(40)))


def test_zero_shot_top1_in_closed_form(task, tmp_path):
    labels = task.dataset.labels("val")
    texts = np.eye(10, 16, dtype=np.float32)
    images = texts[labels]
    images[:10] = texts[(labels[:10] + 1) % 10]  # a quarter agrees with the caption of another class
    save_arrays(tmp_path / "p.vectors.safetensors", {"image_vectors": images, "text_vectors": texts})
    assert task.scores(tmp_path / "p").tolist() == [0.0] * 10 + [100.0] * 30
    assert task._top1({"image_vectors": images, "text_vectors": texts}) == 75


@pytest.mark.slow
def test_both_encoders_go_through_quantization_to_an_engine(task, tmp_path):
    network = task.trained()
    save_tensors(task.cell.baseline / "model.safetensors", task.weights(network))
    task.predict(network, task.cell.predictions)
    vectors = task._stored(task.cell.predictions)
    assert vectors["image_vectors"].shape == (40, 16) and vectors["text_vectors"].shape == (10, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors["image_vectors"], axis=1), 1, rtol=1e-5)
    with torch.no_grad():  # a text's vector does not depend on the images beside it
        alone = torch.nn.functional.normalize(network.text(torch.from_numpy(captions(TEMPLATES[0]))), dim=-1)
    np.testing.assert_allclose(alone.numpy(), vectors["text_vectors"], atol=1e-5)
    assert task.fp32_figures()["zero_shot_top1"] > 20  # 10 by chance
    batches = task.calibration(network, seed=1)
    assert [batch["tokens"].shape for batch in batches] == [(16, LENGTH)] * 4
    quantized = qwt2.quantize(task.captured(task.baseline()), batches, "repq", qwt2.Precision(4, 8))
    assert {name.partition(".")[0] for name in quantized.quantization.layers} == {"image", "text"}
    qwt2.compensate(quantized, batches, "cwac")
    task.predict(quantized, tmp_path / "quantized")
    simulated = task.figures(tmp_path / "quantized")
    assert simulated["cosine"] > 0.97
    folded = qwt2.fold(quantized)
    path = qwt2.export_onnx(folded, tmp_path / "model.onnx", task.example(network))
    on_engine = task.engine_figures({"": qwt2.load_engine(path, "onnxruntime")})
    assert on_engine["cosine"] == pytest.approx(simulated["cosine"], abs=1e-3)
    assert on_engine["zero_shot_top1"] == pytest.approx(simulated["zero_shot_top1"], abs=2.5)  # one of 40 images
    records = record_modules(folded, task.mismatch_inputs(network))
    steps = {name: found.steps for name, found in engine_mismatch(load_onnx(path), "onnxruntime", records).items()}
    assert len(steps) == len(quantized.quantization.modules) and max(steps.values()) <= 1


def test_a_text_s_vector_reads_every_token():
    network = clip.build(compose_cell(OVERRIDES)["model"]["clip"])
    tokens = torch.from_numpy(captions(TEMPLATES[0])[:1])
    with torch.no_grad():
        before = network.text(tokens)
        for place in range(LENGTH):
            changed = tokens.clone()
            changed[0, place] = (changed[0, place] + 1) % len(VOCABULARY)
            assert not torch.allclose(network.text(changed), before)
