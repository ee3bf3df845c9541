"""Numbers that a model stores, and operations that it computes."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qwt2.capture.batch import Inputs, call


def stored_numbers(model: nn.Module) -> int:
    """Return how many numbers a model stores in parameters and buffers, whatever their type."""
    return sum(tensor.numel() for tensor in model.state_dict().values())


def multiply_accumulates(model: nn.Module, image: Inputs) -> int:
    """Return the multiply-accumulate operations of the products and convolutions in one forward pass.

    Args:
        model: the model.
        image: the inputs of the forward pass.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(model, image)
    return counter.get_total_flops() // 2
