"""Training of the micro models from scratch, and prediction with any model."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from qwt2.data import Dataset
from qwt2.extras import extra


def train(model: nn.Module, dataset: Dataset, cfg: Mapping[str, Any], progress: bool = True) -> nn.Module:
    """Train ``model`` from scratch, in place, on the training split.

    Linear layers and position embeddings are initialized first (:func:`initialize`). The optimizer is AdamW with linear
    warm-up and cosine decay. With the same number of threads, every run gives the same weights.

    Args:
        model: the model.
        dataset: the dataset.
        cfg: ``steps``, ``batch_size``, ``learning_rate``, ``weight_decay``, ``warmup_steps``, ``label_smoothing``,
            ``autocast`` (bfloat16 arithmetic; weights stay float32) and ``seed``. The seed determines the initial
            weights, the order of the images and everything random inside the model.
        progress: whether to show a progress bar on a terminal.

    Returns:
        ``model``, in evaluation mode.
    """
    with extra("timm"):
        from timm.optim import param_groups_weight_decay

    initialize(model, cfg["seed"])
    parameters = param_groups_weight_decay(model, cfg["weight_decay"])
    optimizer = torch.optim.AdamW(parameters, lr=cfg["learning_rate"], fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, cfg["warmup_steps"], cfg["steps"])
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=cfg["label_smoothing"])
    batches = islice(_endless_batches(dataset, cfg["batch_size"], cfg["seed"]), cfg["steps"])
    model.train()
    with torch.random.fork_rng(devices=[]), unfused_attention(model):
        torch.manual_seed(cfg["seed"])
        bar = tqdm(batches, "train", cfg["steps"], unit="step", disable=None if progress else True)
        for images, labels in bar:
            with torch.autocast("cpu", torch.bfloat16, enabled=cfg["autocast"]):
                loss = loss_of(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.inference_mode()
def predict(
    model: nn.Module, dataset: Dataset, split: str = "val", batch_size: int = 100, progress: bool = False
) -> np.ndarray:
    """Return the logits (N, classes), float32, of a whole split in the dataset's order."""
    total = math.ceil(dataset.size(split) / batch_size)
    bar = tqdm(dataset.batches(split, batch_size), "predict", total, unit="batch", disable=None if progress else True)
    return torch.cat([model(images).float() for images, _ in bar]).numpy()


def warmup_cosine(step: int, warmup_steps: int, steps: int) -> float:
    """Return the factor of the learning rate: linear from 1/warmup_steps to 1, then half a cosine down to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def initialize(model: nn.Module, seed: int) -> None:
    """Initialize weights, in place, so that a *narrow* transformer learns from its first steps.

    timm draws every linear layer and position embedding with a standard deviation of 0.02, tuned for widths
    of 192 and up. At widths of 48 to 96, signals vanish and position embeddings are negligible beside patch
    embeddings, so that training stays at chance for hundreds of steps. Xavier weights, and position embeddings
    as large as patch embeddings, remove that plateau. Convolutions keep timm's values.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        if getattr(model, "pos_embed", None) is not None:
            nn.init.trunc_normal_(model.pos_embed, std=0.5)


@contextmanager
def unfused_attention(model: nn.Module) -> Iterator[None]:
    """Compute timm's attention as plain matrix products, which trains small models twice as fast on a CPU."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


def _endless_batches(dataset: Dataset, batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the batches of one epoch after another, each in another order, without the smaller last batch."""
    batch_size = min(batch_size, dataset.size("train"))
    for epoch in count():
        for images, labels in dataset.batches("train", batch_size, shuffle=[seed, epoch]):
            if len(images) == batch_size:
                yield images, labels
