"""Detectors by an mmdet configuration and overrides, with weights from training or from a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwt2.detection.ops import ensure_operators
from qwt2.errors import Qwt2Error
from qwt2.extras import extra


def detector_config(cfg: Mapping[str, Any]) -> Any:
    """mmdet's configuration (`mmengine.Config`) of the detector that `cfg` describes.

    Keys of `cfg`: `mmdet`, a file of mmdet's own `configs` folder or of one's own; `options`, nested keys that replace
    some of it (a dictionary with `_delete_: true` replaces instead of merging; keys may be dotted, lists take numbers).

    Raises `Qwt2Error` for a file that does not exist and for options that do not fit it.
    """
    ensure_operators()
    with extra("detection"):
        import mmdet
        from mmdet.utils import register_all_modules
        from mmengine.config import Config

    register_all_modules(init_default_scope=True)
    own = Path(mmdet.__file__).parent / ".mim" / "configs" / cfg["mmdet"]
    path = Path(cfg["mmdet"]) if Path(cfg["mmdet"]).is_file() else own
    if not path.is_file():
        raise Qwt2Error(f"model.mmdet: mmdet has no configuration {cfg['mmdet']!r}, and there is no such file")
    try:
        config = Config.fromfile(path)
        config.merge_from_dict(_plain(cfg["options"]), allow_list_keys=True)
    except (KeyError, TypeError, IndexError, SyntaxError) as error:
        raise Qwt2Error(f"model.options do not fit {cfg['mmdet']}: {error}") from error
    return config


def build_detector(cfg: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """The mmdet detector that `cfg` describes (see `detector_config`), in evaluation mode; weights drawn with `seed`.

    `checkpoint` is a weight file (see `load_detector`) or None. Backbones are not fetched from anywhere.

    Raises `Qwt2Error` for arguments that mmdet refuses, and for weights that do not fit.
    """
    config = detector_config(cfg)
    from mmdet.registry import MODELS

    _remove_downloads(config.model)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        try:
            detector = MODELS.build(config.model)
        except (TypeError, KeyError, AssertionError) as error:
            raise Qwt2Error(
                f"mmdet refuses the model of {cfg['mmdet']}: {str(error).strip().splitlines()[-1]}"
            ) from error
        detector.init_weights()
    _divide_windows_exactly(detector)
    if cfg["checkpoint"]:
        load_detector(detector, cfg["checkpoint"])
    return detector.eval()


def load_detector(detector: nn.Module, path: str | os.PathLike) -> None:
    """Load weights into `detector`, in place; every name and shape must fit.

    `path` is a safetensors file or a torch file that only holds tensors, in mmdet's names or in those of
    Swin-Transformer-Object-Detection, which are converted (:func:`convert_swin`).

    Raises `Qwt2Error` naming the file and what does not fit.
    """
    from qwt2.classification.models import fit_weights, read_state

    state = read_state(Path(path))
    if any(name.startswith("backbone.layers.") for name in state):
        state = convert_swin(state)
    fit_weights(detector, state, path)


def convert_swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the names and layout of Swin-Transformer-Object-Detection, as mmdet 3's Swin wants them.

    Its patch merging takes the four pixels of a patch one after the other, mmdet's takes them channel by channel (as
    `nn.Unfold` does) and the two middle ones in the other order. Attention masks are computed, not stored.
    """
    result = {}
    for name, tensor in state.items():
        if name.endswith(".attn_mask"):
            continue
        if name.startswith("backbone."):
            for old, new in _SWIN_NAMES:
                name = name.replace(old, new, 1)
            if ".downsample." in name:
                tensor = tensor.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)
        result[name] = tensor
    return result


_SWIN_NAMES = (
    ("backbone.layers.", "backbone.stages."),
    (".attn.", ".attn.w_msa."),
    (".mlp.fc1.", ".ffn.layers.0.0."),
    (".mlp.fc2.", ".ffn.layers.1."),
    ("patch_embed.proj.", "patch_embed.projection."),
)


def _plain(value: Any) -> Any:
    """Without the containers of a configuration file's reader."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _remove_downloads(model: Any) -> None:
    """mmdet's configurations fetch the backbone's ImageNet weights, which the detector's own replace anyway."""
    if (model.get("backbone") or {}).get("init_cfg"):
        model.backbone.init_cfg = None


def _divide_windows_exactly(detector: nn.Module) -> None:
    """mmdet's Swin divides in floating point to find the batch size, which exporters cannot follow."""
    from mmdet.models.backbones.swin import ShiftWindowMSA

    for module in detector.modules():
        if isinstance(module, ShiftWindowMSA):
            module.window_reverse = partial(window_reverse, module.window_size)


def window_reverse(size: int, windows: Tensor, height: int, width: int) -> Tensor:
    """Windows (windows * N, size, size, C) put together again, (N, height, width, C)."""
    x = windows.view(-1, height // size, width // size, size, size, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


@contextmanager
def quiet() -> Iterator[None]:
    """mmengine logs every weight that it draws: its own logger, and no other, says nothing but errors in the block."""
    from mmengine.logging import MMLogger

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger = MMLogger.get_current_instance()
    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)
