"""Detectors by configuration: operators, building, weights, and the full-size ones on small images."""

import contextlib
import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from pipeline.build.compose import compose_cell
from qwt2.detection.models import build_detector, convert_swin, detector_config, load_detector, quiet
from qwt2.detection.ops import ensure_operators
from qwt2.errors import Qwt2Error
from qwt2.io import save_tensors
from tests.support import tiny_detectors

pytestmark = pytest.mark.slow

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
CONFIGS = {path.stem: cfg for path in sorted(CONF.glob("*.yaml")) if "mmdet" in (cfg := yaml.safe_load(path.read_text()))}
FULL_SIZE = [name for name, cfg in CONFIGS.items() if cfg["train"] is None]


def settings(name: str) -> dict:
    """Of a configuration in `conf`, with random weights."""
    overrides = ["data.path=some/folder"] if name in FULL_SIZE else []
    return compose_cell([f"model={name}", *overrides])["model"] | {"checkpoint": None}


# mmcv's operators.


def test_operators_are_compiled_ones_or_torchvisions():
    """In an interpreter that nobody has changed: what is installed decides, and asking again changes nothing."""
    code = (
        "import importlib.util\n"
        "installed = importlib.util.find_spec('mmcv._ext') is not None\n"
        "from qwt2.detection.ops import ensure_operators\n"
        "assert [ensure_operators(), ensure_operators()] == 2 * ['mmcv' if installed else 'torchvision']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_mmengines_own_logger_is_quiet(caplog):
    from mmengine.logging import MMLogger

    said = io.StringIO()  # mmengine's own handler writes into whatever was standard output when it was made
    handler = logging.StreamHandler(said)
    MMLogger.get_current_instance().addHandler(handler)
    for message in ("before", "inside", "after"):
        with quiet() if message == "inside" else contextlib.nullcontext():
            MMLogger.get_current_instance().warning(f"mmengine {message}")
            logging.getLogger("somebody").warning(f"somebody {message}")
    assert [record.message for record in caplog.records] == ["somebody before", "somebody inside", "somebody after"]
    MMLogger.get_current_instance().removeHandler(handler)
    assert said.getvalue().split("\n") == ["mmengine before", "mmengine after", ""]


def test_compiled_operators_are_used_where_present():
    """The path with a compiled mmcv, on a stand-in for its extension module: it must be left alone."""
    code = (
        "import sys, types, importlib.machinery\n"
        "ext = types.ModuleType('mmcv._ext'); ext.__spec__ = importlib.machinery.ModuleSpec('mmcv._ext', None)\n"
        "sys.modules['mmcv._ext'] = ext\n"
        "from qwt2.detection.ops import ensure_operators\n"
        "assert ensure_operators() == 'mmcv' and sys.modules['mmcv._ext'] is ext\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nms_keeps_what_the_definition_keeps():
    ensure_operators()
    from mmcv.ops import nms

    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 5 + torch.rand(60, 2, generator=generator) * 20], 1)
    scores = torch.rand(60, generator=generator)
    for threshold in (0.3, 0.7):
        for offset in (0, 1):
            kept = nms(boxes, scores, threshold, offset=offset)[1]
            assert kept.tolist() == greedy_nms(boxes, scores, threshold, offset)


def greedy_nms(boxes, scores, threshold: float, offset: int) -> list[int]:
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(overlap(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def overlap(a, b, offset: int) -> float:
    def area(box):
        return float((box[2:] - box[:2] + offset).clamp(min=0).prod())

    shared = area(torch.cat([torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])]))
    return shared / (area(a) + area(b) - shared)


def test_roi_align_of_a_plane_is_the_plane_and_its_gradient_is_the_adjoint():
    ensure_operators()
    from mmcv.ops import RoIAlign

    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    plane = (2 * rows + 3 * columns)[None, None].double().float().requires_grad_()
    rois = torch.tensor([[0, 8.0, 12.0, 40.0, 28.0]])  # at a quarter of the image's size: x 2..10, y 3..7, minus a half
    align = RoIAlign(output_size=4, spatial_scale=0.25, sampling_ratio=2, aligned=True)
    features = align(plane, rois)
    centres_y, centres_x = 3 - 0.5 + (torch.arange(4) + 0.5), 2 - 0.5 + 2 * (torch.arange(4) + 0.5)
    torch.testing.assert_close(features[0, 0], 2 * centres_y[:, None] + 3 * centres_x[None], rtol=1e-5, atol=1e-4)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    features.backward(weights)
    other = torch.randn(plane.shape, generator=torch.Generator().manual_seed(1))
    # <align(x), w> = <x, align'(w)>, because the operator is linear.
    torch.testing.assert_close((align(other, rois) * weights).sum(), (other * plane.grad).sum(), rtol=1e-4, atol=1e-4)


def test_operators_that_only_a_compiled_mmcv_has_are_named_when_called():
    if ensure_operators() == "mmcv":
        pytest.skip("a compiled mmcv has all operators")
    from mmcv.ops import RoIAlign, sigmoid_focal_loss

    with pytest.raises(Qwt2Error, match="needs a compiled mmcv; use pool_mode='avg'"):
        RoIAlign(output_size=2, pool_mode="max")(torch.zeros(1, 1, 8, 8), torch.zeros(1, 5))
    with pytest.raises(Qwt2Error, match="mmcv's operator sigmoid_focal_loss_forward, which mmcv-lite does not have"):
        sigmoid_focal_loss(torch.zeros(2, 3, requires_grad=True), torch.zeros(2, dtype=torch.long))


# Building and weights.


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mmdet": "mask_rcnn/none.py"}, "mmdet has no configuration 'mask_rcnn/none.py', and there is no such file"),
        ({"options": {"model": {"backbone": {"depth": 17}}}}, "mmdet refuses the model of .*17"),
        ({"options": {"model": {"type": "MaskXCNN"}}}, "mmdet refuses the model of .*MaskXCNN"),
        ({"checkpoint": "gone.pth"}, "gone.pth does not exist"),
    ],
)
def test_what_mmdet_refuses_is_one_sentence(change, message):
    cfg = {"mmdet": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "options": {}, "checkpoint": None} | change
    with pytest.raises(Qwt2Error, match=message) as caught:
        build_detector(cfg)
    assert "\n" not in str(caught.value)


def test_weights_follow_the_seed_and_survive_a_file(tmp_path):
    cfg = tiny_detectors.settings("swin")
    first, again, other = (build_detector(cfg, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    save_tensors(tmp_path / "weights.safetensors", other)
    loaded = build_detector(cfg | {"checkpoint": tmp_path / "weights.safetensors"}).state_dict()
    assert all(torch.equal(loaded[name], other[name]) for name in other)


def test_weights_of_another_detector_are_refused(tmp_path):
    save_tensors(tmp_path / "swin.safetensors", build_detector(tiny_detectors.settings("swin")).state_dict())
    with pytest.raises(Qwt2Error, match="swin.safetensors does not fit the model: it lacks backbone"):
        load_detector(build_detector(tiny_detectors.settings("resnet")), tmp_path / "swin.safetensors")


# Checkpoints in the layout of Swin-Transformer-Object-Detection.


def original_swin(seed: int = 0) -> nn.Module:
    """timm's Swin: it takes patches apart and names its modules as the original code does, except for `downsample`."""
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(seed)
    model = SwinTransformer(
        img_size=128, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2, 2), num_heads=(1, 2, 4), drop_path_rate=0.0
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def original_state(model: nn.Module, norms: list[nn.LayerNorm]) -> dict[str, torch.Tensor]:
    """Its weights in the original names: patch merging ends a stage (timm's begins one); an output norm a stage."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(("norm.", "head.")):
            continue
        stage = name.split(".")[1]
        if ".downsample." in name:
            name = name.replace(f"layers.{stage}.", f"layers.{int(stage) - 1}.", 1)
        state[f"backbone.{name}"] = tensor
    for name, module in model.named_modules():  # the original stores the index too, timm does not
        if hasattr(module, "relative_position_index"):
            state[f"backbone.{name}.relative_position_index"] = module.relative_position_index.reshape(16, 16)
    for number, norm in enumerate(norms):
        state |= {f"backbone.norm{number}.{name}": tensor for name, tensor in norm.state_dict().items()}
    return state


@torch.no_grad()
def original_features(model: nn.Module, norms: list[nn.LayerNorm], images: torch.Tensor) -> list[torch.Tensor]:
    x, features = model.patch_embed(images), []
    for layer, norm in zip(model.layers, norms):
        x = layer(x)
        features.append(norm(x).permute(0, 3, 1, 2))
    return features


def test_original_swin_checkpoint_computes_the_same_after_conversion(tmp_path):
    model = original_swin()
    norms = [nn.LayerNorm(16 * 2**i) for i in range(3)]
    for norm in norms:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    options = {
        "model": {
            "backbone": {
                "_delete_": True, "type": "SwinTransformer", "embed_dims": 16, "depths": [2, 2, 2], "num_heads": [1, 2, 4],
                "strides": [4, 2, 2], "patch_size": 4, "window_size": 4, "out_indices": [0, 1, 2], "drop_path_rate": 0.0,
            },
            "neck": {"in_channels": [16, 32, 64], "num_outs": 4},
        }
    }  # fmt: skip
    cfg = {"mmdet": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "options": options, "checkpoint": None}
    detector = build_detector(cfg)
    heads = {name: tensor for name, tensor in detector.state_dict().items() if not name.startswith("backbone.")}
    state = original_state(model, norms) | heads
    state |= {"backbone.layers.0.blocks.1.attn_mask": torch.zeros(16, 16, 16)}  # older files store it
    torch.save({"state_dict": state, "meta": {"epoch": 36}}, tmp_path / "published.pth")
    load_detector(detector, tmp_path / "published.pth")
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        converted = detector.backbone(images)
    for before, after in zip(original_features(model, norms, images), converted, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    # Without the patches' new order, the second stage would differ.
    unordered = convert_swin(state)
    for name in ("reduction.weight", "norm.weight", "norm.bias"):
        unordered[f"backbone.stages.0.downsample.{name}"] = state[f"backbone.layers.0.downsample.{name}"]
    detector.load_state_dict(unordered)
    with torch.no_grad():
        assert not torch.allclose(detector.backbone(images)[1], converted[1], rtol=1e-2, atol=1e-2)


# Full size.


def test_every_detector_of_the_model_zoo_has_its_configuration():
    swin = {f"{kind}_swin_{size}" for kind in ("mask_rcnn", "cascade_mask_rcnn") for size in ("tiny", "small")}
    micro = {"mask_rcnn_swin_micro", "mask_rcnn_resnet_micro"}
    assert set(CONFIGS) == swin | {"mask_rcnn_resnet50", "detr_resnet50"} | micro


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_detectors_are_the_published_ones(name):
    """By their number of parameters, as the papers and model zoos give them in millions."""
    known = {
        "mask_rcnn_swin_tiny": 48, "mask_rcnn_swin_small": 69, "cascade_mask_rcnn_swin_tiny": 86,
        "cascade_mask_rcnn_swin_small": 107, "mask_rcnn_resnet50": 44, "detr_resnet50": 41,
    }  # fmt: skip
    from mmdet.registry import MODELS

    config = detector_config(settings(name))
    config.model.backbone.init_cfg = None
    parameters = sum(parameter.numel() for parameter in MODELS.build(config.model).parameters())
    assert round(parameters / 1e6) == pytest.approx(known[name], abs=1)
