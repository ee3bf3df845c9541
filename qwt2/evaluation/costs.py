"""What a model stores and computes."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qwt2.capture.batch import Inputs, call


def stored_numbers(model: nn.Module) -> int:
    """Numbers a model stores: parameters and buffers, whatever their type."""
    return sum(tensor.numel() for tensor in model.state_dict().values())


def multiply_accumulates(model: nn.Module, image: Inputs) -> int:
    """Multiply-accumulate operations of one forward pass (products and convolutions)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(model, image)
    return counter.get_total_flops() // 2
