"""Slow, plain versions of the library's computations, with whole networks, hooks and NumPy."""

import copy
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from qwt2.capture.blocks import ends
from qwt2.capture.graph import GraphModel
from qwt2.quantization.layers import QuantizedLayer, QuantizedModule


def full_precision_copy(qmodel: nn.Module) -> nn.Module:
    """Return the float network that a quantized one was made from (re-parameterised, BatchNorm folded)."""
    reference = copy.deepcopy(qmodel)
    for module in reference.modules():
        if isinstance(module, QuantizedModule):
            module.quantized = False
    return reference


@contextmanager
def recording(model: nn.Module, name: str):
    """Collect the arguments and the output of one module at every call inside the ``with`` block.

    They are copied before and right after the call, because residual networks overwrite both later.
    """
    arguments, outputs = [], []

    def copied(args, kwargs):
        return [a.clone() if isinstance(a, torch.Tensor) else a for a in args], dict(kwargs)

    module = model.get_submodule(name)
    with ExitStack() as stack:
        for handle in (
            module.register_forward_pre_hook(lambda m, a, k: arguments.append(copied(a, k)), with_kwargs=True),
            module.register_forward_hook(lambda m, a, y: outputs.append(y.clone())),
        ):
            stack.callback(handle.remove)
        yield arguments, outputs


@torch.no_grad()
def record(model: nn.Module, name: str, batches) -> tuple[list, list]:
    """Return a module's arguments and outputs in passes of the whole network, one entry per batch."""
    with recording(model, name) as (arguments, outputs):
        for batch in batches:
            model(batch)
    return arguments, outputs


@torch.no_grad()
def layer_pairs(qmodel: nn.Module, reference: nn.Module, name: str, batches, target: str):
    """Return (y_q, y_f) of a quantized layer, one pair per batch, with y_q before the layer's own compensation."""
    layer: QuantizedLayer = qmodel.get_submodule(name)
    bare, compensation = layer.output_quantizer, (layer.alpha, layer.beta)
    layer.output_quantizer = None
    layer.set_compensation(None, None)
    arguments, y_q = record(qmodel, name, batches)
    layer.output_quantizer = bare
    layer.set_compensation(*compensation)
    if target == "global":
        y_f = record(reference, name, batches)[1]
    else:
        y_f = [reference.get_submodule(name)(*args) for args, _ in arguments]
    return list(zip(y_q, y_f))


@torch.no_grad()
def block_triples(qmodel: GraphModel, reference: GraphModel, name: str, batches, target: str):
    """Return (x, y_q, y_f) of a block, one triple per batch, from whole passes through the graph."""
    x, y = ends(qmodel, name)
    quantized = [values_of(qmodel, (x, y), batch) for batch in batches]
    if target == "global":
        exact = [values_of(reference, ends(reference, name), batch)[1] for batch in batches]
    else:
        block = reference.between(*(lambda x, y: (x, [y]))(*ends(reference, name)))
        exact = [block(x)[0] for x, _ in quantized]
    return [(x, q, f) for (x, q), f in zip(quantized, exact)]


def values_of(model: GraphModel, nodes, batch) -> list[torch.Tensor]:
    """Return the values of some nodes of a graph on a batch."""
    seen = {}

    def note(node, values):
        seen[node] = model.evaluate(node, values)
        return seen[node]

    model.walk(batch, note)
    return [batch if node.op == "placeholder" else seen[node] for node in nodes]


def rows(tensors, axis: int) -> np.ndarray:
    """Return the values of a list of tensors as one float64 array (rows, channels)."""
    return np.concatenate([t.movedim(axis, -1).reshape(-1, t.shape[axis]).double().numpy() for t in tensors])


def affine(q: np.ndarray, f: np.ndarray, estimator: str = "least_squares") -> tuple[np.ndarray, np.ndarray]:
    """Return alpha and beta per channel, (channels,) each, from outputs (rows, channels)."""
    alpha = np.ones(q.shape[1])
    moving = np.ptp(q, axis=0) > 0
    if estimator == "least_squares":
        for c in np.flatnonzero(moving):
            design = np.stack([q[:, c], np.ones(len(q))], 1)
            alpha[c] = np.linalg.lstsq(design, f[:, c], rcond=None)[0][0]
    elif estimator == "moment":
        alpha[moving] = f.std(0)[moving] / q.std(0)[moving]
    return alpha, f.mean(0) - alpha * q.mean(0)


def squared_error(q: np.ndarray, f: np.ndarray, alpha, beta) -> np.ndarray:
    return ((alpha * q + beta - f) ** 2).mean(0)


def patches(x: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    """Cut images (N, C, H, W), zero padded by kernel // 2, into patches (N, H', W', C, kernel, kernel)."""
    x = np.pad(x, ((0, 0), (0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (2, 3))
    return windows[:, :, ::stride, ::stride].transpose(0, 2, 3, 1, 4, 5)


def decibel(signal: np.ndarray, noise: np.ndarray) -> float:
    return float(10 * np.log10((signal**2).sum() / (noise**2).sum()))
