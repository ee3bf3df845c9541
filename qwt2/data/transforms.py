"""How images become a model's input."""

from collections.abc import Mapping
from typing import Any

from qwt2.extras import extra


def transform_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """timm's input settings (`resolve_data_config`) of the model that `cfg` describes, without building it."""
    with extra("timm"):
        import timm
        from timm.data import resolve_data_config

    pretrained = timm.get_pretrained_cfg(cfg["timm"])
    size = cfg["kwargs"].get("img_size")
    arguments = {"img_size": size} if size else {}
    return resolve_data_config(arguments, pretrained_cfg=pretrained.to_dict() if pretrained else {})
