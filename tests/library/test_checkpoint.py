"""Stored quantized models: equal bit by bit when loaded, refused when damaged or foreign."""

import pytest
import torch

import qwt2
from qwt2.errors import Qwt2Error
from tests.support.tiny_models import BUILDERS, batches, captured, images, mlp, quantized

COMPENSATIONS = {
    "none": None,
    "cwac": ("cwac", {"gate": "none"}),
    "cwac by block": ("cwac", {"granularity": "block", "gate": "none"}),
    "qwt": ("qwt", {}),
    "qwt in float32": ("qwt", {"dtype": "float32", "kernel_size": 3}),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize("compensation", list(COMPENSATIONS))
def test_what_is_loaded_computes_what_was_saved(name, compensation, tmp_path):
    qmodel = quantized(name)
    if COMPENSATIONS[compensation]:
        method, options = COMPENSATIONS[compensation]
        qwt2.compensate(qmodel, batches(), method, **options)
    path = tmp_path / "model.safetensors"
    qwt2.save_quantized(qmodel, path)
    # The plain one into the model itself, the others into its graph, which was captured before.
    loaded = qwt2.load_quantized(BUILDERS[name]() if compensation == "none" else captured(BUILDERS[name]), path)
    assert torch.equal(loaded(images(4, seed=1)), qmodel(images(4, seed=1)))
    assert loaded.quantization == qmodel.quantization
    again = tmp_path / "again.safetensors"
    qwt2.save_quantized(loaded, again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_published_methods_are_stored_too(name, tmp_path):
    qmodel = quantized(name, published=True)
    qwt2.save_quantized(qmodel, tmp_path / "m.safetensors")
    loaded = qwt2.load_quantized(captured(BUILDERS[name]), tmp_path / "m.safetensors")
    assert torch.equal(loaded(images(4, seed=1)), qmodel(images(4, seed=1)))


def test_a_loaded_model_can_be_folded(tmp_path):
    qmodel = quantized("swin")
    qwt2.compensate(qmodel, batches(), "cwac")
    qwt2.save_quantized(qmodel, tmp_path / "m.safetensors")
    loaded = qwt2.load_quantized(captured(BUILDERS["swin"]), tmp_path / "m.safetensors")
    assert torch.equal(qwt2.fold(loaded)(images(2)), qwt2.fold(qmodel)(images(2)))


def test_another_architecture_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    qwt2.save_quantized(quantized("vit"), path)
    with pytest.raises(Qwt2Error, match=r"m\.safetensors|block"):
        qwt2.load_quantized(captured(BUILDERS["resnet"]), path)
    with pytest.raises(Qwt2Error, match="another architecture"):
        qwt2.load_quantized(deeper_vit(), path)


def deeper_vit():
    from tests.support.tiny_models import vit

    return vit(depth=3)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_damaged_files_are_named(keep, tmp_path):
    path = tmp_path / "m.safetensors"
    qwt2.save_quantized(quantized("vit"), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Qwt2Error, match=r"m\.safetensors is damaged .*; delete it and make it again"):
        qwt2.load_quantized(BUILDERS["vit"](), path)


def test_files_that_are_not_ours_and_missing_ones_are_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(Qwt2Error, match=r"other\.safetensors holds no quantized model; write one with"):
        qwt2.load_quantized(mlp(), tmp_path / "other.safetensors")
    with pytest.raises(Qwt2Error, match=r"missing\.safetensors does not exist"):
        qwt2.load_quantized(mlp(), tmp_path / "missing.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    qwt2.save_quantized(quantized("vit"), path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises((OSError, Qwt2Error)):
        qwt2.save_quantized(quantized("resnet"), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
