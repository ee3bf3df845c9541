"""``nn.MultiheadAttention`` as Linears and products, which can be quantized one by one.

PyTorch's module computes everything in one function that runs no submodule, and ``nn.TransformerEncoderLayer`` even
passes the module by where it can.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from qwt2.capture.batch import Inputs, call
from qwt2.capture.rewrite import replace_module
from qwt2.capture.trace import evaluation_mode


class ExplicitAttention(nn.Module):
    """The function of an ``nn.MultiheadAttention``, for calls like the ones it was made for.

    Args:
        attention: the original; its weights are copied.
        fused: query, key and value are one tensor, projected together.
        mask: the attention mask as traced, or ``None``.
    """

    def __init__(self, attention: nn.MultiheadAttention, fused: bool, mask: Tensor | None):
        super().__init__()
        self.num_heads, self.batch_first = attention.num_heads, attention.batch_first
        # nn.TransformerEncoderLayer asks for it, and takes its own way around the module if there is one.
        self.in_proj_bias = None
        self.scale = attention.head_dim**-0.5
        self.fused = fused
        self.mask_is_bool = mask is not None and mask.dtype == torch.bool
        self.mask_per_head = mask is not None and mask.dim() == 3
        weights, biases = _projections(attention)
        if fused:
            self.qkv = _linear(torch.cat(weights), None if biases is None else torch.cat(biases))
        else:
            self.q, self.k, self.v = map(_linear, weights, biases or (None, None, None))
        self.proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
        is_causal=False,
    ):  # fmt: skip
        """See ``nn.MultiheadAttention``; ``key_padding_mask`` must be ``None``."""
        q, k, v = self.qkv(query).unflatten(-1, (3, -1)).unbind(-2) if self.fused else (self.q(query), self.k(key), self.v(value))
        q, k, v = self._split(q * self.scale), self._split(k), self._split(v)
        scores = q @ k.transpose(-2, -1)
        if attn_mask is not None:
            mask = attn_mask.unflatten(0, (-1, self.num_heads)) if self.mask_per_head else attn_mask
            scores = scores.masked_fill(mask, float("-inf")) if self.mask_is_bool else scores + mask
        weights = scores.softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        y = self.proj(y if self.batch_first else y.transpose(0, 1))
        if not need_weights:
            return y, None
        return y, weights.mean(1) if average_attn_weights else weights

    def _split(self, x):
        """(N, L, E) or (L, N, E) -> (N, heads, L, E / heads)."""
        x = x if self.batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def make_attention_explicit(model: nn.Module, example: Inputs) -> dict[str, str]:
    """Replace every ``nn.MultiheadAttention`` that ``model`` calls by an :class:`ExplicitAttention`, in place.

    Args:
        example: one input batch; the model is run on it once to see how its attention is called.

    Returns:
        Module name -> why it was left as it is.
    """
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    if not modules:
        return {}
    calls = _record_calls(model, modules, example)
    left = {}
    for name, attention in modules.items():
        if reason := _obstacle(attention, calls[name]):
            left[name] = reason
            continue
        call = calls[name][0]
        fused = _is_self_attention(call) and attention._qkv_same_embed_dim
        replace_module(model, name, ExplicitAttention(attention, fused, call["attn_mask"]))
    if left:
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # its fast path would pass the Linears by
    return left


def _record_calls(model: nn.Module, modules: dict[str, nn.Module], example: Inputs) -> dict[str, list[dict[str, Any]]]:
    calls: dict[str, list[dict[str, Any]]] = {name: [] for name in modules}
    signature = inspect.signature(nn.MultiheadAttention.forward)

    def hook(name: str):
        def record(module, args, kwargs):
            bound = signature.bind(module, *args, **kwargs)
            bound.apply_defaults()
            calls[name].append(bound.arguments)

        return record

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluation_mode(model), torch.no_grad():
            call(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    return calls


def _obstacle(attention: nn.MultiheadAttention, calls: list[dict[str, Any]]) -> str:
    if not calls:
        return "is not called"
    if len({(_is_self_attention(call), _mask_kind(call["attn_mask"])) for call in calls}) > 1:
        return "is called in different ways for one image"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "has bias_k, bias_v or add_zero_attn"
    if any(call["key_padding_mask"] is not None for call in calls):
        return "is called with key_padding_mask"
    if any(call["query"].dim() != 3 for call in calls):
        return "is called without a batch dimension"
    return ""


def _is_self_attention(call: dict[str, Any]) -> bool:
    return call["query"] is call["key"] is call["value"]


def _mask_kind(mask: Tensor | None) -> tuple[torch.dtype, int] | None:
    return None if mask is None else (mask.dtype, mask.dim())


def _projections(attention: nn.MultiheadAttention) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Weights and biases of the query, key and value projections."""
    if attention._qkv_same_embed_dim:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    return weights, None if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer
