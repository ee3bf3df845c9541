"""Training of micro models: it learns, it repeats, it leaves nothing behind."""

import numpy as np
import pytest
import torch

from qwt2.classification.models import build_model
from qwt2.classification.training import initialize, predict, train, unfused_attention, warmup_cosine
from qwt2.data import open_dataset, write_dataset
from qwt2.evaluation.metrics import topk_percent

DATA = {"name": "digits", "num_classes": 10, "image_size": 16, "train_images": 256, "val_images": 64, "seed": 0}
VIT = {
    "name": "tiny",
    "timm": "vit_tiny_patch16_224",
    "kwargs": {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "num_classes": 10,
    "pretrained": False,
    "checkpoint": None,
}
CFG = {
    "steps": 6, "batch_size": 32, "learning_rate": 1e-3, "weight_decay": 0.05, "warmup_steps": 2,
    "label_smoothing": 0.1, "autocast": True, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_dataset(DATA, folder)
    return open_dataset(DATA, folder)


def test_same_seed_gives_the_same_network_whatever_was_drawn_before(dataset):
    def weights(seed):
        torch.rand(3)  # the global generator has no part in it
        return train(build_model(VIT), dataset, CFG | {"seed": seed}).state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.slow
def test_a_transformer_learns_its_training_images(dataset):
    model = train(build_model(VIT), dataset, CFG | {"steps": 240, "learning_rate": 3e-3, "warmup_steps": 20})
    assert not model.training
    assert topk_percent(predict(model, dataset, "train"), dataset.labels("train"), 1) > 60


def test_training_leaves_the_global_generator_and_attention_alone(dataset):
    model = build_model(VIT)
    fused = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    train(model, dataset, CFG)
    assert torch.equal(torch.rand(2), expected)
    assert [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")] == fused


def test_attention_is_fused_again_after_an_error():
    model = build_model(VIT)
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    assert fused
    with pytest.raises(RuntimeError), unfused_attention(model):
        assert not any(module.fused_attn for module in fused)
        raise RuntimeError
    assert all(module.fused_attn for module in fused)


def test_no_bar_off_the_terminal(dataset, capfd):
    train(build_model(VIT), dataset, CFG)
    assert capfd.readouterr() == ("", "")


def test_predict_is_the_model_in_the_datasets_order(dataset):
    model = build_model(VIT)
    logits = predict(model, dataset, "val", batch_size=10)
    (images, _), = dataset.batches("val", 1000)
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(images), atol=1e-5)
    assert logits.dtype == np.float32


def test_learning_rate_rises_then_falls_to_zero():
    factors = [warmup_cosine(step, 4, 20) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0 and factors[20] == pytest.approx(0)
    assert all(later <= earlier for earlier, later in zip(factors[4:], factors[5:]))


def test_initial_weights_keep_signals_and_positions_alive():
    model = build_model(VIT)
    initialize(model, seed=0)
    assert model.pos_embed.std().item() == pytest.approx(0.5, rel=0.2)
    weight = model.blocks[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.1)
