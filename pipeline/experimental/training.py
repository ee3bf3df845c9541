"""One training loop for the networks of all experimental tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from tqdm import trange

from qwt2.classification.training import initialize, unfused_attention, warmup_cosine


def built(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a network with random weights, in evaluation mode, initialized as the micro classifiers are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
    initialize(network, seed)
    return network.eval()


def fit(network: nn.Module, cfg: Mapping[str, Any], loss_of: Callable[[np.random.Generator], Tensor]) -> nn.Module:
    """Train a network from scratch, in place, by AdamW with linear warm-up and cosine decay.

    Args:
        network: the network.
        cfg: the fields of :class:`pipeline.experimental.settings.Train`.
        loss_of: draws a batch with the given generator and returns its loss.

    Returns:
        ``network``, in evaluation mode.
    """
    parameters = param_groups_weight_decay(network, cfg["weight_decay"])
    optimizer = torch.optim.AdamW(parameters, lr=cfg["learning_rate"], fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, cfg["warmup_steps"], cfg["steps"])
    )
    rng = np.random.default_rng(cfg["seed"])
    network.train()
    with unfused_attention(network):
        for _ in trange(cfg["steps"], desc="train", unit="step", disable=None):
            with torch.autocast("cpu", torch.bfloat16, enabled=cfg["autocast"]):
                loss = loss_of(rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), max_norm=1.0)
            optimizer.step()
            schedule.step()
    return network.eval()
