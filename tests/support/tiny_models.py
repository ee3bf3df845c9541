"""Networks of a few thousand weights that are wired like large ones.

All are deterministic, in evaluation mode, and take images (N, 3, 32, 32). Weights are drawn so that every layer passes
a signal on. With timm's own initial values (standard deviation 0.02, residual branches that start at zero), networks
this narrow would have almost nothing to quantize.
"""

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.layers import SqueezeExcite
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import qwt2
from qwt2 import engines
from qwt2.capture.export import capture
from qwt2.capture.graph import GraphModel

SIZE, CLASSES = 32, 5
# Engines that compile a model for seconds, or need hardware, have separate tests.
ENGINES = [name for name in engines.ENGINES.names() if name not in ("inductor", "tensorrt", "tvm")]
PTQ = {"vit": "repq", "swin": "repq", "resnet": "percentile", "mobilenet": "percentile"}


def images(count: int = 16, seed: int = 0) -> torch.Tensor:
    """Return normally distributed images (count, 3, 32, 32)."""
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def batches(count: int = 16, size: int = 4, seed: int = 0) -> list[torch.Tensor]:
    """Return calibration batches, (size, 3, 32, 32) each."""
    return list(images(count, seed).split(size))


def vit(depth: int = 2, width: int = 16) -> nn.Module:
    """A ViT with a class token, 16 patches of 8x8 pixels and two heads."""
    model = VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=width, depth=depth, num_heads=2, num_classes=CLASSES
    )  # fmt: skip
    return randomize(model)


def swin() -> nn.Module:
    """Two Swin stages, the first with shifted windows, and patch merging between them."""
    model = SwinTransformer(
        img_size=SIZE, patch_size=4, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2),
        num_classes=CLASSES, drop_path_rate=0.0,
    )  # fmt: skip
    return randomize(model)


def resnet() -> nn.Module:
    """A residual network with in-place ReLU, ``x += shortcut``, and strided blocks with a downsampling shortcut."""
    model = ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=CLASSES)
    return randomize(model)


def mobilenet() -> nn.Module:
    """Inverted residuals with depthwise convolutions, squeeze-excitation and in-place Hardswish."""
    act = functools.partial(nn.Hardswish, inplace=True)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        act(),
        nn.Sequential(
            InvertedResidual(8, 8, exp_ratio=2.0, act_layer=nn.Hardswish, se_layer=SqueezeExcite),
            InvertedResidual(8, 16, stride=2, exp_ratio=2.0, act_layer=nn.ReLU, se_layer=None),
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )
    return randomize(model)


class MLPBlock(nn.Module):
    """x + fc2(relu(fc1(x))), with the addition in place."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.fc2(torch.relu_(self.fc1(x)))
        y += x
        return y


class ConvBlock(nn.Module):
    """Two convolutions with an in-place ReLU between them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)

    def forward(self, x):
        return self.conv2(torch.relu_(self.conv1(x)))


class Dense(nn.Module):
    """Dense connections: every block reads all earlier outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.ModuleList(ConvBlock(8 + 4 * i, 4) for i in range(3))
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x):
        features = [self.stem(x)]
        for block in self.blocks:
            features.append(block(torch.cat(features, 1)))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class Pyramid(nn.Module):
    """A small U-Net: lateral convolutions read the encoder's outputs long after its blocks have run."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([ConvBlock(3, 8, 2), ConvBlock(8, 8, 2), ConvBlock(8, 8, 2)])
        self.lateral = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])
        self.up = nn.ModuleList([ConvBlock(8, 8), ConvBlock(8, 8)])
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        encoded = []
        for block in self.down:
            x = block(x)
            encoded.append(x)
        for block, lateral, skip in zip(self.up, self.lateral, reversed(encoded[:-1])):
            x = block(nn.functional.interpolate(x, scale_factor=2.0) + lateral(skip))
        return self.head(x).mean((2, 3))


def mlp(depth: int = 3) -> nn.Module:
    """Patches through a chain of MLP blocks; no attention, no convolution inside the blocks."""
    stem = nn.Sequential(nn.PixelUnshuffle(8), nn.Flatten(2))
    model = nn.Sequential(
        stem, _Transpose(), nn.Linear(192, 12), nn.Sequential(*(MLPBlock(12) for _ in range(depth))), nn.Linear(12, CLASSES)
    )
    return randomize(model)


class _Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def dense() -> nn.Module:
    return randomize(Dense())


def pyramid() -> nn.Module:
    return randomize(Pyramid())


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight so that activations keep about unit size and no two channels are alike."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, mean, deviation):
        tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                normal(parameter, 0.0, parameter[0].numel() ** -0.5)
            else:
                normal(parameter, 0.0 if name.endswith("bias") else 1.0, 0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                normal(module.running_mean, 0.0, 0.2)
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.eval().requires_grad_(False)


BUILDERS = {"vit": vit, "swin": swin, "resnet": resnet, "mobilenet": mobilenet}


@functools.cache
def captured(build: Callable[[], nn.Module]) -> GraphModel:
    """Return the graph of the model that ``build`` makes, captured once per process.

    Tests share it and must not modify it; ``qwt2.quantize`` works on a copy.
    """
    return capture(build(), images(2))


@functools.cache
def _quantized(name: str, weight_bits: int, activation_bits: int, target: str, published: bool) -> nn.Module:
    precision = qwt2.Precision(weight_bits=weight_bits, activation_bits=activation_bits)
    method = f"{PTQ[name]}_published" if published else PTQ[name]
    return qwt2.quantize(captured(BUILDERS[name]), [images()], method, precision, target)


def quantized(
    name: str, weight_bits: int = 4, activation_bits: int = 4, target: str = "portable", published: bool = False
) -> nn.Module:
    """Return a quantized copy of one of ``BUILDERS``, which the caller may modify."""
    return copy.deepcopy(_quantized(name, weight_bits, activation_bits, target, published))


_FILES = tempfile.TemporaryDirectory(prefix="qwt2-tests-")


@functools.cache
def _exporter(name: str):
    from qwt2.onnx.templates import Exporter

    return Exporter(images(2))


@functools.cache
def exported(name: str, bits: int = 8, method: str | None = None, target: str = "portable") -> tuple[nn.Module, Path]:
    """Return a folded model, which tests share and must not modify, and its ONNX file.

    If ``method`` is given, the model is compensated by it first.
    """
    qmodel = quantized(name, bits, bits, target)
    if method:
        qwt2.compensate(qmodel, batches(), method, **({"gate": "none"} if method == "cwac" else {}))
    folded = qwt2.fold(qmodel)
    return folded, _exporter(name).export(folded, Path(_FILES.name) / f"{name}-{bits}-{method}-{target}.onnx")


def exported_models(names=tuple(BUILDERS)):
    """Return the parameters of a test over models; tests of one model run in one worker, to share its files."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"export-{name}")) for name in names]
