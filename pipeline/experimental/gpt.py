"""A decoder-only transformer over character tokens, and its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.experimental.stdlib_text import CHARACTERS, windows
from pipeline.experimental.training import built, fit


class GPT(nn.Module):
    """Pre-norm blocks with causal attention, learned positions and an output layer of its own (as GPT-2, but untied).

    Args:
        embed_dim: width of the residual stream.
        depth: number of blocks.
        num_heads: heads per block.
        context: tokens per input; the only length that the network takes.
    """

    def __init__(self, embed_dim: int, depth: int, num_heads: int, context: int):
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), embed_dim)
        self.positions = nn.Parameter(torch.empty(context, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, len(CHARACTERS))
        for parameter in (self.embedding.weight, self.positions):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (N, context, tokens) of each next token, for tokens (N, context), int64."""
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x, is_causal=True)
        return self.head(self.norm(x))


def build(settings: Mapping[str, int], seed: int = 0) -> nn.Module:
    """Return a network with random weights, in evaluation mode."""
    return built(lambda: GPT(**settings), seed)


def train(network: nn.Module, tokens: np.ndarray, cfg: Mapping[str, Any]) -> nn.Module:
    """Train a network on windows of a text (characters,) to predict each next token; returns it."""
    length = len(network.positions) + 1

    def loss_of(rng: np.random.Generator) -> Tensor:
        starts = rng.integers(0, len(tokens) - length + 1, cfg["batch_size"])
        batch = torch.from_numpy(windows(tokens, length, starts))
        return F.cross_entropy(network(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    return fit(network, cfg, loss_of)
