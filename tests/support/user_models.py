"""Plain networks as users write them, without this library or timm.

All are deterministic, in evaluation mode, and take images (N, 3, 32, 32), or tokens (N, 12, 16) if ``SHAPES`` says so.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.tiny_models import CLASSES, randomize

TOKENS = (12, 16)


class RootAttention(nn.Module):
    """A transformer in one forward method, so that products of activations belong to the root module."""

    def __init__(self, fused: bool, depth: int = 2, width: int = 16, heads: int = 2):
        super().__init__()
        self.fused, self.heads = fused, heads
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.qkvs = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.projs = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(depth)
        )
        self.register_buffer("scale", torch.tensor((width // heads) ** -0.5), persistent=False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(width, CLASSES)

    def attend(self, q, k, v):
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return torch.softmax(q @ k.transpose(-2, -1) * self.scale, dim=-1) @ v

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2) + self.position
        for i, (qkv, proj, mlp) in enumerate(zip(self.qkvs, self.projs, self.mlps)):
            batch, tokens, width = x.shape
            y = qkv(self.norms[2 * i](x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
            q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)
            x = x + proj(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


class Branching(RootAttention):
    """``RootAttention`` with a branch on the input's values, which cannot be captured."""

    def forward(self, x):
        if x.abs().sum() == 0:
            return self.head(x.new_zeros(len(x), 16))
        return super().forward(x)


class TransformerClassifier(nn.Module):
    """``nn.TransformerEncoder`` on rows of pixels."""

    def __init__(self, norm_first: bool = False):
        super().__init__()
        self.embed = nn.Linear(96, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.embed(x.permute(0, 2, 1, 3).flatten(2))
        return self.head(self.encoder(x).mean(1))


class FunctionalConvNet(nn.Module):
    """Convolutions and BatchNorm with a functional ReLU, an addition and a concatenation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv4 = nn.Conv2d(16, 16, 3, 2, 1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(x)) + x)
        z = F.relu(self.bn3(self.conv3(y)), inplace=True)
        w = F.relu(self.conv4(torch.cat([y, z], dim=1)))
        return self.fc(F.adaptive_avg_pool2d(w, 1).flatten(1))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions, dilation, and sigmoid gates."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 2, dilation=2, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.gate = nn.Conv2d(12, 12, 1)
        self.multiplied = nn.Conv2d(12, 24, 3, 2, 1, groups=12)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x):
        x = F.hardswish(self.bn(self.depthwise(F.silu(self.stem(x)))))
        x = self.pointwise(x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.fc(torch.relu(self.multiplied(x)).mean((2, 3)))


class Conv1dNet(nn.Module):
    """A one-dimensional convolution between Linears."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.head = nn.Linear(16, 16), nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = torch.relu(self.embed(x)).transpose(1, 2)
        return self.head(torch.relu(self.conv(x)).mean(2))


class SharedLinear(nn.Module):
    """One Linear called three times."""

    def __init__(self):
        super().__init__()
        self.embed, self.shared, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = torch.relu(self.embed(x))
        for _ in range(3):
            x = x + torch.tanh(self.shared(x))
        return self.head(x.mean(1))


class SharedBehindNorms(nn.Module):
    """One Linear behind two LayerNorms, whose scales therefore cannot move into it."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.shared, self.head = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = x + self.shared(self.norm1(x))
        x = x + self.shared(self.norm2(x))
        return self.head((x + self.shared(x)).mean(1))


class RepeatedBlock(nn.Module):
    """The same encoder block three times over, as in ALBERT."""

    def __init__(self):
        super().__init__()
        block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList([block, block, block])
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class TiedWeights(nn.Module):
    """Two Linears that share a weight tensor, and one module under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.second.weight = self.first.weight
        self.alias = self.first

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.alias(x)).mean(1))


class FunctionalLinear(nn.Module):
    """A projection by ``F.linear`` with a bare parameter."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.projection = nn.Parameter(torch.zeros(16, 16))

    def forward(self, x):
        return self.head(torch.relu(F.linear(self.embed(x), self.projection)).mean(1))


class Recurrent(nn.Module):
    """A GRU between Linears."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(16, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, CLASSES)

    def forward(self, x):
        x, _ = self.rnn(torch.relu(self.embed(x)))
        return self.head(x[:, -1])


class AnyRank(nn.Module):
    """Linears on two, three and four dimensions."""

    def __init__(self):
        super().__init__()
        self.four, self.three, self.two = nn.Linear(32, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = torch.relu(self.four(x)).flatten(1, 2)
        return self.two(torch.relu(self.three(x)).mean(1))


class Padded(nn.Module):
    """Attention that is told which tokens are padding."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x, src_key_padding_mask=x[:, :, 0] < -2.5).mean(1))


class ListAttention(nn.Module):
    """``nn.MultiheadAttention`` in the root's forward method, with residuals and LayerNorms around it."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        y = self.norm(x)
        return self.head((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU6(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, CLASSES),
    )  # fmt: skip


def weight_norm() -> nn.Module:
    from torch.nn.utils.parametrizations import weight_norm

    return nn.Sequential(weight_norm(nn.Conv2d(3, 8, 8, 8)), nn.ReLU(), nn.Flatten(), weight_norm(nn.Linear(128, CLASSES)))


def batchnorm1d() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(),
        nn.BatchNorm1d(16), nn.Linear(16, CLASSES),
    )  # fmt: skip


def vit_b_16_small() -> nn.Module:
    """torchvision's ViT with the patches and structure of ViT-B/16, but narrow and shallow."""
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES)


# name -> (the function that makes it, PTQ method, names of the modules that stay in float)
MODELS = {
    "root_attention": (lambda: RootAttention(fused=False), "repq", set()),
    "root_fused_attention": (lambda: RootAttention(fused=True), "repq", set()),
    "transformer_encoder": (TransformerClassifier, "repq", set()),
    "transformer_encoder_norm_first": (lambda: TransformerClassifier(norm_first=True), "repq", set()),
    "vit_b_16_small": (vit_b_16_small, "repq", set()),
    "multihead_attention": (ListAttention, "repq", set()),
    "padded_attention": (Padded, "repq", set()),
    "functional_convnet": (FunctionalConvNet, "percentile", set()),
    "separable": (Separable, "percentile", set()),
    "sequential": (sequential, "percentile", set()),
    "batchnorm1d": (batchnorm1d, "minmax", set()),
    "any_rank": (AnyRank, "mse", set()),
    "shared_linear": (SharedLinear, "minmax", set()),
    "shared_behind_norms": (SharedBehindNorms, "repq", set()),
    "repeated_block": (RepeatedBlock, "repq", set()),
    "weight_norm": (weight_norm, "minmax", set()),
    "tied_weights": (TiedWeights, "minmax", set()),
    "functional_linear": (FunctionalLinear, "minmax", set()),
    "conv1d": (Conv1dNet, "minmax", set()),
    "recurrent": (Recurrent, "minmax", {"rnn"}),
}
ON_TOKENS = {"multihead_attention", "shared_behind_norms", "repeated_block", "padded_attention", "shared_linear", "tied_weights", "functional_linear", "conv1d", "recurrent"}


def make(name: str) -> nn.Module:
    return randomize(MODELS[name][0]())


def inputs(name: str, count: int = 16, seed: int = 0) -> torch.Tensor:
    shape = TOKENS if name in ON_TOKENS else (3, 32, 32)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
