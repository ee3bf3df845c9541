"""Small mmdet detectors and scenes: the wiring of the default ones, with a few thousand weights, never trained."""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from pipeline.build.compose import compose_cell
from qwt2.capture.batch import Inputs
from qwt2.data import open_dataset, write_dataset
from qwt2.data.coco import Scenes
from qwt2.detection.models import build_detector, detector_config
from qwt2.detection.network import Detector, regions
from qwt2.detection.scenes import Batches, build_dataset

DATA = {"name": "digits_coco", "num_classes": 10, "image_size": 112, "train_images": 12, "val_images": 6, "seed": 0}
_SMALLER = {
    "model": {
        "neck": {"out_channels": 16},
        "rpn_head": {"in_channels": 16, "feat_channels": 16},
        "roi_head": {
            "bbox_roi_extractor": {"out_channels": 16},
            "bbox_head": {"in_channels": 16, "fc_out_channels": 32},
            "mask_roi_extractor": {"out_channels": 16},
            "mask_head": {"in_channels": 16, "conv_out_channels": 16, "num_convs": 1},
        },
        "test_cfg": {"rpn": {"nms_pre": 50, "max_per_img": 16}, "rcnn": {"score_thr": 0.0, "max_per_img": 5}},
    }
}
_BACKBONES = {
    "swin": {"embed_dims": 16, "depths": [2, 1, 1], "num_heads": [1, 2, 2]},
    "resnet": {"base_channels": 8, "stem_channels": 8},
}
_WIDTHS = {"swin": [16, 32, 64], "resnet": [8, 16, 32]}
_NARROW_CASCADE = {
    "backbone": {"embed_dims": 24, "depths": [2, 1, 1, 1]},
    "neck": {"in_channels": [24, 48, 96, 192], "out_channels": 16},
    "rpn_head": {"in_channels": 16, "feat_channels": 16},
    "roi_head": {
        "bbox_roi_extractor": {"out_channels": 16},
        "mask_roi_extractor": {"out_channels": 16},
        "mask_head": {"in_channels": 16, "conv_out_channels": 16, "num_convs": 1},
    },
    "test_cfg": {"rpn": {"nms_pre": 50, "max_per_img": 16}, "rcnn": {"score_thr": 0.0, "max_per_img": 5}},
}
_ATTENTION, _FFN = {"embed_dims": 32, "num_heads": 2}, {"embed_dims": 32, "feedforward_channels": 64}
_NARROW_DETR = {
    "num_queries": 10,
    "backbone": {"depth": 18, "base_channels": 8, "stem_channels": 8},
    "neck": {"in_channels": [64], "out_channels": 32},
    "encoder": {"num_layers": 1, "layer_cfg": {"self_attn_cfg": _ATTENTION, "ffn_cfg": _FFN}},
    "decoder": {"num_layers": 1, "layer_cfg": {"self_attn_cfg": _ATTENTION, "cross_attn_cfg": _ATTENTION, "ffn_cfg": _FFN}},
    "positional_encoding": {"num_feats": 16},
    "bbox_head": {"embed_dims": 32},
    "test_cfg": {"max_per_img": 10},
}


def settings(kind: str) -> dict[str, Any]:
    """Return the ``model`` section of a small detector, "swin" or "resnet"."""
    cfg = compose_cell([f"model=mask_rcnn_{kind}_micro"])["model"]
    smaller = _SMALLER | {"model": _SMALLER["model"] | {"backbone": _BACKBONES[kind]}}
    smaller["model"]["neck"] = {"out_channels": 16, "in_channels": _WIDTHS[kind]}
    return cfg | {"options": OmegaConf.to_container(OmegaConf.merge(cfg["options"], smaller)), "boxes": 4, "mask_boxes": 2}


def narrow(name: str) -> dict[str, Any]:
    """Return the ``model`` section of a full-size detector with all its modules, each only a few channels wide."""
    cfg = compose_cell([f"model={name}", "data.path=some/folder"])["model"]
    smaller = {"model": {"detr_resnet50": _NARROW_DETR}.get(name) or copy.deepcopy(_NARROW_CASCADE)}
    if name != "detr_resnet50":
        heads = cfg["options"]["model"]["roi_head"]["bbox_head"]
        narrowed = [head | {"in_channels": 16, "conv_out_channels": 16, "fc_out_channels": 32} for head in heads]
        smaller["model"]["roi_head"]["bbox_head"] = narrowed
    options = OmegaConf.to_container(OmegaConf.merge(cfg["options"], smaller))
    return cfg | {"options": options, "boxes": 4, "mask_boxes": 2, "checkpoint": None}


def detector(kind: str) -> nn.Module:
    """Build a detector whose layers all pass a signal on.

    mmdet's own initial values (standard deviation 0.01) would leave nothing to quantize.
    """
    return with_signal(build_detector(settings(kind)))


def with_signal(model: nn.Module) -> nn.Module:
    """Draw the model's weights again so that layers pass a signal on, in place."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fan_in = module.weight[0].numel() if not isinstance(module, nn.ConvTranspose2d) else module.weight.shape[0]
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (1.5 / fan_in) ** 0.5
            if module.bias is not None:
                module.bias.data = 0.1 * torch.randn(module.bias.shape, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.data = 0.2 * torch.randn(module.running_mean.shape, generator=generator)
            module.running_var.data = 0.5 + torch.rand(module.running_var.shape, generator=generator)
    return model


@functools.cache
def scenes() -> Scenes:
    """Return a dozen scenes of digits, composed once per process."""
    folder = Path(tempfile.mkdtemp(prefix="qwt2-test-"))
    write_dataset(DATA, folder)
    return open_dataset(DATA, folder)


def batches(kind: str, network: Detector, count: int = 4, size: int = 2) -> list[Inputs]:
    """Return calibration batches with the regions that the detector itself chooses."""
    config = detector_config(settings(kind))
    dataset = build_dataset(config, scenes(), "train")
    loaded = Batches(config, dataset, size, torch.arange(count).numpy())
    return [regions(network.detector, images, samples, 4, 2) for images, samples in loaded]
