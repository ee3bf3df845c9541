"""The source text of the standard library, decoder-only transformers, and the task that scores them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import qwt2
from pipeline.build.compose import compose_cell
from pipeline.experimental import gpt
from pipeline.experimental.language import negative_log_likelihood
from pipeline.experimental.stdlib_text import CHARACTERS, tokenize, windows
from pipeline.sweeps import cells
from pipeline.tasks import open_task
from qwt2.data import open_dataset, write_dataset
from qwt2.errors import Qwt2Error
from qwt2.evaluation.mismatch import engine_mismatch, record_modules
from qwt2.onnx.file import load_onnx
from tests.support.tasks import opened

OVERRIDES = [
    "model=gpt_micro", "data.train_modules=[textwrap]", "data.val_modules=[heapq]", "data.val_images=40",
    "model.decoder={embed_dim: 32, depth: 1, num_heads: 2, context: 16}", "model.train.steps=60",
    "model.train.warmup_steps=10", "calibration={images: 64, batch_size: 16, observer_images: 32}",
]  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return opened(OVERRIDES, tmp_path_factory.mktemp("language"))


def test_tokens_spell_the_text_without_other_characters():
    tokens = tokenize("def f():\n\treturn 'ä~'\n")
    assert "".join(CHARACTERS[token] for token in tokens) == "def f():\nreturn '~'\n"
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 96
    assert windows(tokens, 3, np.array([0, 4])).tolist() == [tokens[:3].tolist(), tokens[4:7].tolist()]


def test_the_text_is_that_of_the_modules_in_order_and_the_splits_share_none(tmp_path):
    import heapq
    import inspect
    import json

    keys = {"name": "stdlib_text", "val_images": 1}
    cfg = keys | {"train_modules": ["heapq", "json"], "val_modules": ["textwrap"]}
    for folder in (tmp_path / "one", tmp_path / "two"):
        write_dataset(cfg, folder)
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in ("train.npy", "val.npy"))
    expected = tokenize(inspect.getsource(heapq) + inspect.getsource(json))
    assert np.array_equal(open_dataset(cfg, tmp_path / "one")["train"], expected)
    with pytest.raises(Qwt2Error, match=r"'heapq' is in data.train_modules and in data.val_modules"):
        write_dataset(cfg | {"val_modules": ["heapq"]}, tmp_path / "three")
    with pytest.raises(Qwt2Error, match=r"has no source of module 'no_such'; take it out of data.train_modules"):
        write_dataset(cfg | {"train_modules": ["no_such"]}, tmp_path / "three")
    assert not (tmp_path / "three").exists()
    published = compose_cell(["model=gpt_micro"])["data"]
    assert not set(published["train_modules"]) & set(published["val_modules"])


def test_perplexity_in_closed_form():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    logits, targets = np.log(probabilities) + 1000, np.array([0, 1])  # softmax does not see the constant
    assert np.exp(negative_log_likelihood(logits, targets)) == pytest.approx((0.5 * 0.8) ** -0.5)
    random = np.random.default_rng(0).normal(0, 3, (4, 5, 7)).astype(np.float32)
    targets = np.random.default_rng(1).integers(0, 7, (4, 5))
    expected = F.cross_entropy(torch.from_numpy(random).flatten(0, 1), torch.from_numpy(targets).flatten())
    assert negative_log_likelihood(random, targets) == pytest.approx(expected.item(), rel=1e-6)


def test_no_token_sees_those_after_it():
    torch.manual_seed(0)
    network = gpt.build({"embed_dim": 16, "depth": 2, "num_heads": 2, "context": 8})
    tokens = torch.randint(0, 96, (1, 8))
    changed = tokens.clone()
    changed[:, 5:] = (tokens[:, 5:] + 1) % 96
    with torch.no_grad():
        before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_the_table_of_a_sweep_has_perplexity_beside_accuracy_for_everything_measured():
    rows = {"token_accuracy": 50.0, "perplexity": 6.0, "bits_per_token": 2.6}
    figures = {name: {f"{engine}/{metric}": value + shift for engine, shift in (("torch", 0), ("openvino", 1)) for metric, value in rows.items()}
               | {"openvino/latency_ratio_to_ptq": 1.0} for name in ("gptq", "gptq+cwac")}  # fmt: skip
    record = {"config": {"model": compose_cell(OVERRIDES)["model"]}, "method": "gptq+cwac", "fp32": rows, "figures": figures}
    assert cells.figures(record) == {
        "fp32_token_accuracy": 50, "ptq_token_accuracy": 50, "token_accuracy": 50, "openvino_token_accuracy": 51,
        "fp32_perplexity": 6, "ptq_perplexity": 6, "perplexity": 6, "openvino_perplexity": 7, "openvino_latency_ratio": 1,
    }  # fmt: skip


def test_more_windows_than_the_text_has(task):
    cfg = compose_cell([*OVERRIDES, "data.val_images=100000"])
    with pytest.raises(Qwt2Error, match=r"data.val_images is 100000, but the text has \d+ windows of 16 tokens"):
        open_task(cfg, task.cell).latency_input(1)


@pytest.mark.slow
def test_a_language_model_goes_through_quantization_to_an_engine(task, tmp_path):
    from qwt2.io import save_tensors

    network = task.trained()
    save_tensors(task.cell.baseline / "model.safetensors", task.weights(network))
    task.predict(network, task.cell.predictions)
    own = task.fp32_figures()
    assert own["perplexity"] < 40 and own["bits_per_token"] == pytest.approx(np.log2(own["perplexity"]))  # 96 by chance
    assert task.scores(task.cell.predictions).mean() == pytest.approx(own["token_accuracy"], abs=1e-4)
    batches = task.calibration(network, seed=1)
    assert [batch["tokens"].shape for batch in batches] == [(16, 16)] * 4
    quantized = qwt2.quantize(task.captured(task.baseline()), batches, "gptq", qwt2.Precision(4, 8))
    qwt2.compensate(quantized, batches, "cwac")
    task.predict(quantized, tmp_path / "quantized")
    simulated = task.figures(tmp_path / "quantized")
    assert simulated["agreement"] > 80 and simulated["logits_sqnr_db"] > 10
    folded = qwt2.fold(quantized)
    path = qwt2.export_onnx(folded, tmp_path / "model.onnx", task.example(network))
    on_engine = task.engine_figures({"": qwt2.load_engine(path, "onnxruntime")})
    assert on_engine["perplexity"] == pytest.approx(simulated["perplexity"], rel=1e-3)
    assert on_engine["agreement"] == pytest.approx(simulated["agreement"], abs=0.5)
    records = record_modules(folded, task.mismatch_inputs(network))
    steps = {name: found.steps for name, found in engine_mismatch(load_onnx(path), "onnxruntime", records).items()}
    assert len(steps) == len(quantized.quantization.modules) and max(steps.values()) <= 1
