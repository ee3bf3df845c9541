"""Input transforms of models."""

from collections.abc import Callable, Mapping
from typing import Any

from qwt2.extras import extra

# The settings that most classifiers outside timm were trained with.
IMAGENET = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def evaluation_transform(cfg: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return timm's transform of an image for evaluation, for the model that ``cfg`` describes.

    Raises:
        Qwt2Error: timm is missing.
    """
    with extra("timm"):
        from timm.data import create_transform

    return create_transform(**transform_config(cfg), is_training=False)


def transform_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's input settings (``resolve_data_config``) of the model that ``cfg`` describes.

    The model is not built. A custom model (key ``factory``) has ImageNet's settings with the size ``image_size``.

    Args:
        cfg: the model's configuration.

    Raises:
        Qwt2Error: timm is missing.
    """
    if "factory" in cfg:
        return IMAGENET | {"input_size": (3, cfg["image_size"], cfg["image_size"])}
    with extra("timm"):
        import timm
        from timm.data import resolve_data_config

    pretrained = timm.get_pretrained_cfg(cfg["timm"])
    size = cfg["kwargs"].get("img_size")
    arguments = {"img_size": size} if size else {}
    return resolve_data_config(arguments, pretrained_cfg=pretrained.to_dict() if pretrained else {})
