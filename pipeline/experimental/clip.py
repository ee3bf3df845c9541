"""CLIP (arXiv 2103.00020) in small: an image encoder and a text encoder whose vectors agree, and their training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pipeline.experimental.captions import LENGTH, TEMPLATES, VOCABULARY, captions
from pipeline.experimental.training import built, fit
from qwt2.classification.training import initialize
from qwt2.data import Dataset


class TextEncoder(nn.Module):
    """Pre-norm blocks with causal attention; a text's vector is that of its last token (section 2.4).

    Args:
        embed_dim: width of the residual stream.
        depth: number of blocks.
        num_heads: heads per block.
        dimensions: of the vectors.
    """

    def __init__(self, embed_dim: int, depth: int, num_heads: int, dimensions: int):
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), embed_dim)
        self.positions = nn.Parameter(torch.empty(LENGTH, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.projection = nn.Linear(embed_dim, dimensions, bias=False)
        for parameter in (self.embedding.weight, self.positions):
            nn.init.normal_(parameter, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the vectors (N, dimensions) of texts (N, LENGTH), int64."""
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x, is_causal=True)
        return self.projection(self.norm(x[:, -1]))


class CLIP(nn.Module):
    """Both encoders. Engines run them as one file, on as many images as texts.

    Args:
        image: arguments of timm's VisionTransformer.
        text: arguments of :class:`TextEncoder`.
        dimensions: of the vectors.
    """

    def __init__(self, image: Mapping[str, Any], text: Mapping[str, Any], dimensions: int):
        super().__init__()
        self.image = VisionTransformer(**image, num_classes=dimensions)
        self.text = TextEncoder(**text, dimensions=dimensions)

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Return vectors (N, dimensions) of unit length, of images (N, 3, H, W) and of texts (N, LENGTH)."""
        vectors = {"image_vectors": self.image(images), "text_vectors": self.text(tokens)}
        return {name: F.normalize(vector, dim=-1) for name, vector in vectors.items()}


def build(settings: Mapping[str, Any], seed: int = 0) -> CLIP:
    """Return a network with random weights, in evaluation mode."""
    network: Any = built(lambda: CLIP(**settings), seed)
    initialize(network.image, seed)  # its position embeddings, too
    return network


def train(network: nn.Module, dataset: Dataset, cfg: Mapping[str, Any]) -> nn.Module:
    """Train a network so that images agree with captions of their class; returns it.

    The loss is CLIP's symmetric one, except that all images of a class belong to its caption, and that the temperature
    is fixed.
    """
    tokens = np.stack([captions(template) for template in TEMPLATES])  # (templates, classes, LENGTH)
    classes = np.arange(tokens.shape[1])

    def loss_of(rng: np.random.Generator) -> Tensor:
        chosen = rng.integers(0, dataset.size("train"), cfg["batch_size"])
        images = torch.from_numpy(dataset.images("train", chosen))
        texts = torch.from_numpy(tokens[rng.integers(0, len(TEMPLATES), len(classes)), classes])
        vectors = [F.normalize(found.float(), dim=-1) for found in (network.image(images), network.text(texts))]
        labels = torch.from_numpy(dataset.labels("train")[chosen])
        return symmetric_loss(vectors[0] @ vectors[1].T / cfg["temperature"], labels)

    return fit(network, cfg, loss_of)


def symmetric_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the images' captions and of the captions' images.

    Args:
        logits: (images, classes).
        labels: the images' classes (images,); the images of a class share its caption's probability.
    """
    images_of = F.one_hot(labels, logits.shape[1]).T.float()
    present = images_of.sum(1) > 0
    shares = images_of[present] / images_of[present].sum(1, keepdim=True)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T[present], shares)) / 2
