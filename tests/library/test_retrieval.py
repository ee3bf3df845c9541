"""Docstrings as queries and documents, sentence encoders, and the task that scores them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qwt2
from pipeline.build.compose import compose_cell
from pipeline.common.stage import Cell
from pipeline.tasks import retrieval
from qwt2.data import open_dataset, write_dataset
from qwt2.data.docstrings import read_pairs
from qwt2.errors import Qwt2Error
from qwt2.evaluation.metrics import cosine, recall_at_1_percent
from qwt2.retrieval import encoder
from qwt2.retrieval.encoder import SentenceEncoder

MODULE = '''"""What this whole module does. It does one two three four five six seven."""
class A:
    """Too short. One two three four five six seven eight."""
    def f(self):
        """Is this a full query here? One two three
        four five six seven eight."""
    async def g(self):
        """Version 1.5 is no end of it! One two three four five six seven nine."""
def same():
    """What this whole module does. Another document that has quite enough words in it."""
def copied():
    """Some other query of words. One two three four five six seven eight."""
'''


def test_the_first_sentence_is_the_query_and_the_rest_the_document(tmp_path):
    (tmp_path / "a.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text('"""A module of the tests. One two three four five six seven ten."""')
    assert read_pairs(tmp_path) == [
        ("What this whole module does.", "It does one two three four five six seven."),
        ("Is this a full query here?", "One two three four five six seven eight."),
        ("Version 1.5 is no end of it!", "One two three four five six seven nine."),
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    cfg = {"name": "docstrings", "train_images": 40, "val_images": 30, "seed": 0}
    write_dataset(cfg, folder / "docstrings")
    return folder, cfg


@pytest.mark.slow
def test_the_splits_are_disjoint_and_of_the_asked_sizes(pairs):
    folder, cfg = pairs
    stored = open_dataset(cfg, folder / "docstrings")
    assert [len(stored[split]) for split in ("train", "val")] == [40, 30]
    queries, documents = zip(*stored["train"], *stored["val"])
    assert len(set(queries)) == len(set(documents)) == 70


def test_more_pairs_than_there_are(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(MODULE)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    cfg = {"name": "docstrings", "train_images": 2, "val_images": 2, "seed": 0}
    with pytest.raises(Qwt2Error, match=r"has 3 pairs, fewer than data.train_images \+ data.val_images \(4\)"):
        write_dataset(cfg, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recall_and_cosine_in_closed_form():
    documents = np.eye(4)
    queries = documents[[0, 1, 3, 2]]
    assert recall_at_1_percent(queries, documents) == 50 and recall_at_1_percent(documents, documents) == 100
    turned = np.array([[np.cos(a), np.sin(a)] for a in (0.1, 0.3)])
    assert cosine(3 * turned, np.array([[1.0, 0], [1, 0]])) == pytest.approx((np.cos(0.1) + np.cos(0.3)) / 2)


class Embedding(nn.Module):
    """Stands for BERT: a token's state depends on the token only."""

    def __init__(self):
        super().__init__()
        self.words, self.linear = nn.Embedding(1000, 16), nn.Linear(16, 24)

    def forward(self, input_ids, attention_mask):
        from types import SimpleNamespace

        return SimpleNamespace(last_hidden_state=self.linear(self.words(input_ids)))


def test_a_texts_vector_is_the_mean_over_its_tokens_and_not_over_the_padding():
    torch.manual_seed(0)
    model = SentenceEncoder(Embedding())
    tokens, mask = torch.tensor([[5, 7, 0, 0], [5, 7, 9, 3]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    states = model.bert.linear(model.bert.words(tokens))
    expected = torch.stack([states[0, :2].mean(0), states[1].mean(0)])
    expected /= expected.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(model(tokens, mask), expected)


def words(package, texts, length):
    """Stands for a tokenizer: a word's number is the sum of its letters' codes."""
    rows = [[sum(map(ord, word)) % 999 + 1 for word in text.split()][:length] for text in texts]
    padded = np.array([row + [0] * (length - len(row)) for row in rows], np.int64)
    return {"input_ids": padded, "attention_mask": (padded > 0).astype(np.int64)}


@pytest.mark.slow
def test_the_task_takes_an_encoder_through_quantization_to_an_engine(pairs, tmp_path, monkeypatch):
    def built(package):
        torch.manual_seed(0)
        return SentenceEncoder(Embedding()).eval()

    monkeypatch.setattr(encoder, "build_encoder", built)
    monkeypatch.setattr(encoder, "load_bert", lambda model, weights: None)
    monkeypatch.setattr(encoder, "tokenize", words)
    folder, data = pairs
    cfg = compose_cell(["model=minilm", "calibration.images=32", "calibration.batch_size=8"]) | {"data": data}
    task = retrieval.Retrieval(cfg, Cell("", folder, tmp_path))
    network = task.trained()
    task.predict(network, task.cell.predictions)
    assert task.fp32_figures()["recall1"] > 100 / 30  # better than chance
    batches = task.calibration(network, seed=1)
    assert [len(batch["input_ids"]) for batch in batches] == [8] * 4
    quantized = qwt2.quantize(task.captured(network), batches, "minmax", qwt2.Precision(8, 8))
    task.predict(quantized, tmp_path / "quantized")
    figures = task.figures(tmp_path / "quantized")
    assert figures["cosine"] > 0.999 and figures["logits_sqnr_db"] > 25
    path = qwt2.export_onnx(qwt2.fold(quantized), tmp_path / "model.onnx", task.example(network))
    on_engine = task.engine_figures({"": qwt2.load_engine(path, "onnxruntime")})
    assert on_engine["cosine"] == pytest.approx(figures["cosine"], abs=1e-4)
    assert {name: array.shape for name, array in task.latency_input(1).items()} == {
        "input_ids": (1, 64), "attention_mask": (1, 64)
    }  # fmt: skip


def test_a_package_that_is_not_installed():
    for call in (encoder.build_encoder, lambda name: encoder.tokenize(name, ["text"], 8)):
        with pytest.raises(Qwt2Error, match=r"no_model is not installed.*pip install 'qwt2\[real\]'"):
            call("no_model:model")


def test_a_packages_bert_is_transformers_own(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="the package transformers (extra real) is not installed")
    from qwt2.io import save_tensors

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    bert = transformers.BertModel(config).eval()
    folder = Path(tmp_path) / "some_bert" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    config.to_json_file(folder / "config.json")
    save_tensors(folder / "model.safetensors", bert.state_dict())
    monkeypatch.syspath_prepend(tmp_path)
    model = encoder.build_encoder("some_bert:model")
    encoder.load_bert(model, "some_bert:model/model.safetensors")
    tokens = torch.randint(0, 50, (3, 7))
    states = bert(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    torch.testing.assert_close(model(tokens, torch.ones_like(tokens)), nn.functional.normalize(states.mean(1), dim=1))
