"""Detectors built from an mmdet configuration and overrides, with random weights or weights from a file."""

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
    """Return mmdet's configuration (``mmengine.Config``) of the detector that ``cfg`` describes.

    Args:
        cfg: ``mmdet`` is a file in mmdet's ``configs`` folder, or any other file. ``options`` are nested keys that
            override that file. Keys may be dotted, and numbers are indices of lists. A dictionary with
            ``_delete_: true`` replaces the file's dictionary instead of merging with it.

    Raises:
        Qwt2Error: the file does not exist, the options do not fit it, or mmdet is missing.
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
    """Build the mmdet detector that ``cfg`` describes. Backbone weights are never downloaded.

    Args:
        cfg: the keys of :func:`detector_config`, and ``checkpoint``, a weight file (:func:`load_detector`) or ``None``.
        seed: seed of the random weights.

    Returns:
        The detector, in evaluation mode.

    Raises:
        Qwt2Error: the configuration is not usable, mmdet refuses its arguments, or the weights do not fit.
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
    """Load weights into ``detector``, in place. Every name and shape must fit.

    Args:
        detector: the mmdet detector.
        path: a safetensors file, or a torch file that holds only tensors. Names are mmdet's, or those of
            Swin-Transformer-Object-Detection, which are converted (:func:`convert_swin`).

    Raises:
        Qwt2Error: the file cannot be read or does not fit; the message names the file and what does not fit.
    """
    from qwt2.classification.models import fit_weights, read_state

    state = read_state(Path(path))
    if any(name.startswith("backbone.layers.") for name in state):
        state = convert_swin(state)
    fit_weights(detector, state, path)


def convert_swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights of Swin-Transformer-Object-Detection to the names and layout of Swin in mmdet 3.

    Patch merging there concatenates the four pixels of a patch. mmdet orders them channel by channel, as ``nn.Unfold``
    does, with the two middle pixels swapped. Attention masks are left out, because mmdet computes them.

    Args:
        state: names -> tensors.

    Returns:
        Names -> tensors for mmdet.
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
    """Convert the containers of a configuration reader to plain dictionaries and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _remove_downloads(model: Any) -> None:
    """Disable the download of the backbone's ImageNet weights, which the detector's own weights replace anyway."""
    if (model.get("backbone") or {}).get("init_cfg"):
        model.backbone.init_cfg = None


def _divide_windows_exactly(detector: nn.Module) -> None:
    """Replace the window reversal of mmdet's Swin, whose floating-point batch size exporters cannot trace."""
    from mmdet.models.backbones.swin import ShiftWindowMSA

    for module in detector.modules():
        if isinstance(module, ShiftWindowMSA):
            module.window_reverse = partial(window_reverse, module.window_size)


def window_reverse(size: int, windows: Tensor, height: int, width: int) -> Tensor:
    """Join windows (windows * N, size, size, C) to maps (N, height, width, C).

    Args:
        size: height and width of a window.
        windows: the windows, image by image in row-major order.
        height: height of the maps.
        width: width of the maps.
    """
    x = windows.view(-1, height // size, width // size, size, size, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


@contextmanager
def quiet() -> Iterator[None]:
    """Let mmengine's logger report only errors inside the block; it logs every weight that it draws."""
    from mmengine.logging import MMLogger

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger = MMLogger.get_current_instance()
    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)
