"""Vectors computed by the public RepQ-ViT and QwT code (``tests/golden/README.md``), and their models in timm."""

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import qwt2
from qwt2.capture.export import capture
from qwt2.capture.graph import GraphModel
from qwt2.quantization.layers import QuantizedLayer, QuantizedMatmul

FOLDER = Path(__file__).parents[1] / "golden"
CONFIGURATION = {"vit": "w4a4", "swin": "w4a4", "resnet": "w4a4_k3_f16"}
FILES = {"vit": "c_vit_micro", "swin": "d_swin_micro", "resnet": "d_resnet_micro"}
METHODS = {"vit": "repq", "swin": "repq", "resnet": "percentile"}


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


class Golden:
    """The vectors of one model, with names as in current timm."""

    def __init__(self, model: str):
        self.model, self.configuration = model, CONFIGURATION[model]
        self.values = arrays(FILES[model])
        images = arrays(f"{FILES[model]}_images")
        self.calibration, self.test = (torch.from_numpy(images[f"images_{part}"]) for part in ("calib", "test"))

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.values[key]))

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the arrays below a prefix; keys begin with the module's name as in current timm."""
        return {self.current(k[len(prefix) + 1 :]): self[k] for k in self.values if k.startswith(prefix + "/")}

    def current(self, name: str) -> str:
        if self.model != "swin":
            return name
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
        return re.sub(r"^head\b", "head.fc", name)

    def network(self) -> nn.Module:
        """Build the float network with the reference's weights."""
        network = BUILDERS[self.model]()
        network.load_state_dict(
            {k: v for k, v in self.under("sd").items() if k in network.state_dict()}, strict=self.model != "swin"
        )
        return network.eval()

    def quantized(self, precision: qwt2.Precision | None = None, network: nn.Module | None = None) -> nn.Module:
        precision = precision or qwt2.Precision(weight_bits=4, activation_bits=4)
        network, method = network or captured(self.model), METHODS[self.model]
        return qwt2.quantize(network, [self.calibration], method=f"{method}_published", precision=precision)

    @functools.cached_property
    def sections(self) -> list[str]:
        """The names of the sections in execution order: embedding or stem, blocks, reductions, head."""
        return list(dict.fromkeys(section(name) for name, _ in self.network().named_parameters()))

    def nearest(self, deviating: Callable[[nn.Module], set[str]], attempts: int = 150) -> nn.Module:
        """Search for a quantized model whose values are rounded as the reference's were.

        A value near a rounding boundary flips with the last bit of a float32 sum, which depends on the processor. A
        quantizer behind it then takes another of its candidates, and everything after it differs by percents. The same
        model with weights changed by 1e-7 of their value (about half a float32 step) is an equally good input. Where a
        section deviates from the reference, its weights and those before it are changed in this way, again and again,
        until no section deviates. A correct implementation succeeds on any machine (after 43 attempts at most, from 30
        different starts). One that computes something else never does.

        Args:
            deviating: returns the names of the sections of a quantized model that deviate from the reference.
            attempts: number of models to try before giving up.

        Returns:
            The quantized model; if the search fails, the one with unchanged weights.
        """
        weights = captured(self.model).state_dict()
        generator = torch.Generator().manual_seed(0)
        unchanged, changed = self.quantized(), dict(weights)
        model = unchanged
        for attempt in range(attempts):
            found = deviating(model)
            if not found:
                return model
            last = min(self.sections.index(name) for name in found)
            touched = self.sections[max(0, last - attempt % 3) : last + 1]
            for name, value in weights.items():
                if section(name) in touched and value.is_floating_point():
                    changed[name] = value * (1 + 1e-7 * torch.randn(value.shape, generator=generator))
            network = copy.deepcopy(captured(self.model))
            network.load_state_dict(changed)
            model = self.quantized(network=network)
        return unchanged

    def batches(self) -> list[torch.Tensor]:
        return list(self.calibration.split(32))

    def relative_error(self, logits: torch.Tensor) -> float:
        """Return the Frobenius norm of the logits' error, divided by that of the float logits."""
        reference = self["fp_logits"]
        return float((logits - reference).norm() / reference.norm())


@functools.cache
def captured(model: str) -> GraphModel:
    """Return the float network's graph; tests share it and must not modify it."""
    golden = Golden(model)
    return capture(golden.network(), golden.calibration[:2])


def section(name: str) -> str:
    """Return the section that a parameter or module belongs to: a block, a reduction, or a part around them."""
    return re.match(r"layers\.\d+\.(?:blocks\.\d+|downsample)|blocks\.\d+|layer\d+\.\d+|\w+", name)[0]


def _vit() -> nn.Module:
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=10)


def _swin() -> nn.Module:
    return SwinTransformer(
        img_size=32, patch_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=10,
        drop_path_rate=0.0,
    )  # fmt: skip


def _resnet() -> nn.Module:
    """Build a ResNet with a narrow stem, for which timm's class has no argument."""
    network = ResNet(BasicBlock, [2, 2, 2, 2], channels=(8, 16, 32, 64), num_classes=10)
    network.conv1, network.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
    network.layer1[0].conv1, network.layer1[0].downsample = nn.Conv2d(8, 8, 3, 1, 1, bias=False), None
    return network


BUILDERS = {"vit": _vit, "swin": _swin, "resnet": _resnet}


def quantizer_parameters(qmodel: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's quantizer parameters under the reference's names (``<module>/input_delta`` ...), flattened.

    timm scales q before the product, and the reference's ViT scales the product. Their quantizers' parameters differ by
    that power of two, which does not change any rounding.
    """
    found = {}
    for name, module in qmodel.named_modules():
        if isinstance(module, QuantizedLayer):
            roles = {"input": module.input_quantizer, "weight": module.weight_quantizer}
            prefix = name
        elif isinstance(module, QuantizedMatmul):
            roles, prefix = {"A": module.a_quantizer, "B": module.b_quantizer}, name
        else:
            continue
        for role, quantizer in roles.items():
            found[f"{prefix}/{role}_delta"] = quantizer.scale.reshape(-1)
            if hasattr(quantizer, "zero_point"):
                found[f"{prefix}/{role}_zero_point"] = quantizer.zero_point.reshape(-1)
    return found
