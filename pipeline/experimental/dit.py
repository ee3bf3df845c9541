"""A diffusion transformer (DiT, arXiv 2212.09748) in small, and its training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from pipeline.experimental.noise import draw
from pipeline.experimental.scans import NUM_CLASSES, SIZE
from pipeline.experimental.training import built, fit

_FREQUENCIES = 32


class Modulated(nn.Module):
    """LayerNorm whose scale and shift follow from the condition, and a gate for what reads it (adaLN-Zero, figure 3).

    Args:
        embed_dim: width of the residual stream and of the condition.
        outputs: 3, or 2 without a gate.
    """

    def __init__(self, embed_dim: int, outputs: int = 3):
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=False)
        self.modulation = nn.Linear(embed_dim, outputs * embed_dim)
        self.outputs = outputs

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        """Return the modulated x (N, patches, width), and the gate (N, 1, width) if there is one."""
        shift, scale, *gate = self.modulation(condition)[:, None].chunk(self.outputs, dim=-1)
        return self.norm(x) * (1 + scale) + shift, *gate


class DiTBlock(nn.Module):
    """Attention and MLP, each with modulated inputs and a gated output."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.before_attn, self.before_mlp = Modulated(embed_dim), Modulated(embed_dim)
        self.attn = Attention(embed_dim, num_heads, qkv_bias=True)
        self.mlp = Mlp(embed_dim, 4 * embed_dim, act_layer=nn.GELU)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the next state of the stream x (N, patches, width)."""
        inputs, gate = self.before_attn(x, condition)
        x = x + gate * self.attn(inputs)
        inputs, gate = self.before_mlp(x, condition)
        return x + gate * self.mlp(inputs)


class DiT(nn.Module):
    """Predicts the noise in an image, given the timestep and the class.

    Args:
        embed_dim: width of the residual stream.
        depth: number of blocks.
        num_heads: heads per block.
        patch_size: side of a patch in pixels.
    """

    def __init__(self, embed_dim: int, depth: int, num_heads: int, patch_size: int):
        super().__init__()
        self.patches = PatchEmbed(SIZE, patch_size, in_chans=1, embed_dim=embed_dim)
        self.positions = nn.Parameter(0.02 * torch.randn(self.patches.num_patches, embed_dim))
        self.time = nn.Sequential(nn.Linear(2 * _FREQUENCIES, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.classes = nn.Embedding(NUM_CLASSES, embed_dim)
        self.blocks = nn.ModuleList(DiTBlock(embed_dim, num_heads) for _ in range(depth))
        self.last = Modulated(embed_dim, outputs=2)
        self.head = nn.Linear(embed_dim, patch_size**2)
        self.patch_size = patch_size

    def forward(self, images: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return the noise (N, 1, 8, 8) in noisy images of that shape; timesteps and labels are (N,), int64."""
        condition = F.silu(self.time(sinusoids(timesteps)) + self.classes(labels))
        x = self.patches(images) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        [x] = self.last(x, condition)
        side = SIZE // self.patch_size
        squares = self.head(x).reshape(-1, side, side, self.patch_size, self.patch_size)
        return squares.transpose(2, 3).reshape(-1, 1, SIZE, SIZE)


def sinusoids(timesteps: Tensor) -> Tensor:
    """Return sines and cosines (N, 2 x frequencies) of timesteps (N,), with periods of 2 pi up to 20,000 pi steps."""
    rates = torch.exp(-math.log(10000) * torch.arange(_FREQUENCIES, device=timesteps.device) / _FREQUENCIES)
    angles = timesteps[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def build(settings: Mapping[str, int], seed: int = 0) -> nn.Module:
    """Return a network with random weights, in evaluation mode."""
    network = built(lambda: DiT(**settings), seed)
    for layer in (*(m.modulation for m in network.modules() if isinstance(m, Modulated)), network.head):
        nn.init.zeros_(layer.weight)  # every block begins as the identity (section 3.2, adaLN-Zero)
        nn.init.zeros_(layer.bias)
    return network


def train(network: nn.Module, scans: Mapping[str, np.ndarray], cfg: Mapping[str, Any]) -> nn.Module:
    """Train a network to predict the noise in images with noise of random timesteps; returns it."""

    def loss_of(rng: np.random.Generator) -> Tensor:
        chosen = rng.integers(0, len(scans["labels"]), cfg["batch_size"])
        inputs, noise = draw(scans["images"][chosen], scans["labels"][chosen], rng)
        predicted = network(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return F.mse_loss(predicted.float(), torch.from_numpy(noise))

    return fit(network, cfg, loss_of)
