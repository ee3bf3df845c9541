"""The models that :mod:`benchmarks.zoo` takes, with random weights, and their inputs.

`python -m benchmarks.zoo_models` writes their list, ``benchmarks/zoo.csv``, which tests read too. It takes minutes, and
the list only changes with the versions of the packages.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwt2.capture.batch import call
from qwt2.io import write_csv

LIST = Path(__file__).with_name("zoo.csv")
CALIBRATION, TEST, BATCH = 16, 8, 4
_FADING = 0.5  # a layer with a smaller gain passes little of its input on
_NARROW = 0.1  # of the values of a scale or bias


def built(name: str) -> tuple[nn.Module, Any, Any]:
    """Return a model in evaluation mode, its calibration inputs, and inputs to test it on."""
    torch.manual_seed(0)
    model, inputs = BUILDERS[name]() if name in BUILDERS else _timm(name)
    calibration = _slice(inputs, 0, CALIBRATION)
    return normalized(with_signal(model.eval()), calibration), calibration, _slice(inputs, CALIBRATION, None)


def with_noise(inputs: Any) -> Any:
    """Return inputs with noise of 1 % of their standard deviation; numbers of tokens stay as they are."""
    if isinstance(inputs, dict):
        return {name: with_noise(tensor) for name, tensor in inputs.items()}
    if not inputs.is_floating_point():
        return inputs
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(2))
    return inputs + 0.01 * inputs.std() * noise


def parts_of(inputs: Any) -> list[Any]:
    """Return the batches of a set of inputs."""
    count = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
    return [_slice(inputs, start, start + BATCH) for start in range(0, count, BATCH)]


def _slice(inputs: Any, start: int, stop: int | None) -> Any:
    return {n: t[start:stop] for n, t in inputs.items()} if isinstance(inputs, dict) else inputs[start:stop]


def smooth(channels: int, height: int, width: int) -> Tensor:
    """Return images of a few large blobs with some noise, (N, channels, height, width)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(CALIBRATION + TEST, channels, 7, 7, generator=generator)
    noise = torch.randn(CALIBRATION + TEST, channels, height, width, generator=generator)
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic") + 0.1 * noise


def with_signal(model: nn.Module) -> nn.Module:
    """Draw parameters anew, in place, where initial values pass almost nothing on, unlike those of trained networks.

    These are weights of standard deviation 0.02 in narrow layers, and zeros or tiny values in heads and in the scales
    of residual branches. Outputs would differ hardly at all from image to image.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        inputs = parameter[0].numel() if parameter.dim() > 1 else 1
        if parameter.dim() > 1 and parameter.detach().square().mean() * inputs < _FADING**2:
            parameter.data.normal_(0, inputs**-0.5, generator=generator)
        elif parameter.dim() == 1 and parameter.detach().abs().max() < _NARROW:
            parameter.data.normal_(0, _NARROW, generator=generator)
    return model


def normalized(model: nn.Module, images: Any) -> nn.Module:
    """The model with the statistics of these images in its BatchNorms.

    Without them, the outputs of a network of random weights differ hardly at all from image to image.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        call(model, images)
    return model.eval()


def members() -> Iterator[tuple[str, str, str, int]]:
    """Yield (source, family, name, number of parameters) of every model."""
    for family, name, parameters in smallest():
        yield "timm", family, name, parameters
    for name, build in BUILDERS.items():
        source = "torchvision" if name in TORCHVISION else "transformers"
        yield source, name, name, sum(p.numel() for p in build()[0].parameters())


def smallest() -> Iterator[tuple[str, str, int]]:
    """Yield (family, name, number of parameters) of the smallest model of each timm family that can be built."""
    import timm
    from timm.models._registry import _module_to_models

    for family, names in sorted(_module_to_models.items()):
        sizes = {}
        for name in names:
            try:
                with torch.device("meta"):
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:  # it needs weights or another package
                continue
        if sizes:
            yield family, *min(sizes.items(), key=lambda item: (item[1], item[0]))


def _timm(name: str) -> tuple[nn.Module, Tensor]:
    import timm

    model = timm.create_model(name)
    return model, smooth(*model.default_cfg["input_size"])


# Name -> size of the images.
TORCHVISION = {
    "alexnet": 224, "convnext_tiny": 224, "densenet169": 224, "efficientnet_b0": 224, "googlenet": 224,
    "inception_v3": 299, "maxvit_t": 224, "mnasnet0_5": 224, "mobilenet_v2": 224, "mobilenet_v3_small": 224,
    "regnet_y_400mf": 224, "resnet18": 224, "shufflenet_v2_x0_5": 224, "squeezenet1_1": 224, "swin_v2_t": 256,
    "vit_b_16": 224,
}  # fmt: skip


def _torchvision(name: str) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        from torchvision import models

        extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return getattr(models, name)(weights=None, **extra), smooth(3, TORCHVISION[name], TORCHVISION[name])

    return build


# Name -> class of the configuration, class of the model, and the settings that are smaller than the defaults.
_VISION = {"num_hidden_layers": 4, "image_size": 224}
_TEXT = {"num_hidden_layers": 4, "vocab_size": 4000}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hf_vit": ("ViTConfig", "ViTForImageClassification", {**_VISION, "num_labels": 10}),
    "hf_dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {**_VISION, "patch_size": 16, "num_labels": 10}),
    "hf_swin": ("SwinConfig", "SwinForImageClassification", {"depths": [2, 2, 2, 2], "num_labels": 10}),
    "hf_clip_vision": ("CLIPVisionConfig", "CLIPVisionModel", _VISION),
    "hf_clip_text": ("CLIPTextConfig", "CLIPTextModel", {**_TEXT, "eos_token_id": 3999}),
    "hf_siglip_vision": ("SiglipVisionConfig", "SiglipVisionModel", _VISION),
    "hf_segformer": ("SegformerConfig", "SegformerForSemanticSegmentation", {}),
    "hf_bert": ("BertConfig", "BertForSequenceClassification", {**_TEXT, "num_labels": 4}),
    "hf_gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_layer": 4, "vocab_size": 4000, "use_cache": False}),
    "hf_rt_detr": ("RTDetrConfig", "RTDetrForObjectDetection", {"use_timm_backbone": False, "decoder_layers": 2}),
}


def _transformers(name: str) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        import transformers

        config, kind, smaller = TRANSFORMERS[name]
        model = getattr(transformers, kind)(getattr(transformers, config)(**smaller))
        if "vocab_size" not in smaller:
            return model, {"pixel_values": smooth(3, 224, 224)}
        ids = torch.randint(smaller["vocab_size"], (CALIBRATION + TEST, 32), generator=torch.Generator().manual_seed(0))
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return build


BUILDERS = {name: _torchvision(name) for name in TORCHVISION} | {name: _transformers(name) for name in TRANSFORMERS}


if __name__ == "__main__":
    rows = sorted(members(), key=lambda member: member[3])
    write_csv(LIST, [dict(zip(("source", "family", "model", "parameters"), row)) for row in rows])
