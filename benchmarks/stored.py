"""QwT and CWAC implemented by storing everything; benchmarks compare with it, and the tests use it as an oracle."""

from contextlib import nullcontext

import torch
from torch import nn

from qwt2.capture.blocks import ends, is_inside
from qwt2.capture.graph import GraphModel
from qwt2.quantization.layers import full_precision


class Stored:
    """QwT and CWAC fitted as published code does it.

    Every image's full-precision and quantized outputs of a block are stored, and the normal equations are solved by an
    explicit inverse. The network's blocks must be a chain, in which each reads only the output of the one before.

    Args:
        qmodel: a quantized model; alpha and beta are applied to it.
        batches: the calibration set, tensors (N, ...).

    Attributes:
        fitted: name -> (W, b) of a block, or (alpha, beta) of a layer.
    """

    def __init__(self, qmodel: GraphModel, batches):
        self.qmodel, self.batches, self.fitted = qmodel, batches, {}
        self.info = qmodel.quantization

    @torch.no_grad()
    def qwt(self) -> dict:
        """Fit QwT to the target "local": the full-precision block on the quantized network's input, in float32."""
        inputs = self.inputs_of(self.info.blocks[0])
        for name in self.info.blocks:
            block = self.part(name)
            with full_precision(block):
                y_f = [block(x) for x in inputs]
            y_q = [block(x) for x in inputs]
            x, error = torch.cat(inputs).flatten(0, -2), (torch.cat(y_f) - torch.cat(y_q)).flatten(0, -2)
            solution = inverse_regression(x, error)
            self.fitted[name] = solution[:-1].T, solution[-1]
            inputs = [q + x @ solution[:-1] + solution[-1] for q, x in zip(y_q, inputs)]
        return self.fitted

    @torch.no_grad()
    def cwac(self) -> dict:
        """Fit CWAC to the target "global", layer by layer in execution order, without a gate."""
        inputs: dict[bool, list] = {}
        for unit, layers in self.units().items():
            is_block = unit in self.info.blocks
            if not is_block or not inputs:  # outside the blocks, inputs come from the whole network
                for reference in (False, True):
                    with full_precision(self.qmodel) if reference else nullcontext():
                        inputs[reference] = self.inputs_of(unit)
            module = self.part(unit)
            for name in layers:
                y_q = self.outputs_of(module, name, inputs[False])
                with full_precision(self.qmodel):
                    y_f = self.outputs_of(module, name, inputs[True])
                self.set_affine(name, torch.cat(y_q), torch.cat(y_f))
            inputs[False] = [module(x) for x in inputs[False]]
            with full_precision(self.qmodel):
                inputs[True] = [module(x) for x in inputs[True]]
            if not is_block:
                inputs = {}
        return self.fitted

    def units(self) -> dict[str, list[str]]:
        """Return each block, or layer outside the blocks -> the layers in it, in execution order."""
        found: dict[str, list[str]] = {}
        for name in self.info.layers:
            unit = next((block for block in self.info.blocks if is_inside(name, block)), name)
            found.setdefault(unit, []).append(name)
        return found

    def ends_of(self, unit: str) -> tuple:
        """Return the nodes of a block's or layer's input and output."""
        if unit in self.info.blocks:
            return ends(self.qmodel, unit)
        [call] = self.qmodel.calls(nn.Module)[unit]
        return call.args[0], call

    def part(self, unit: str) -> "Part":
        """Return a block or layer as a function of one tensor, which shares the network's modules."""
        x, y = self.ends_of(unit)
        return Part(self.qmodel.between(x, [y]))

    def inputs_of(self, unit: str) -> list[torch.Tensor]:
        """Return a block's or layer's inputs, one tensor per batch, computed from the images."""
        [images], x = self.qmodel.inputs, self.ends_of(unit)[0]
        before = nn.Identity() if x is images else Part(self.qmodel.between(images, [x]))
        return [before(batch) for batch in self.batches]

    def set_affine(self, name: str, y_q: torch.Tensor, y_f: torch.Tensor) -> None:
        layer = self.qmodel.get_submodule(name)
        q, f = (y.movedim(layer.channel_axis, -1).flatten(0, -2) for y in (y_q, y_f))
        qq, sum_q, qf, sum_f = (y.sum(0, dtype=torch.float64) for y in (q * q, q, q * f, f))
        normal = torch.stack([qq, sum_q, sum_q, torch.full_like(qq, len(q))], -1).reshape(-1, 2, 2)
        solution = torch.linalg.inv(normal) @ torch.stack([qf, sum_f], -1)[:, :, None]
        self.fitted[name] = solution[:, 0, 0], solution[:, 1, 0]
        layer.set_compensation(*(values.float() for values in self.fitted[name]))

    def outputs_of(self, module: nn.Module, name: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return a layer's outputs before their quantization, one tensor per entry of its unit's ``inputs``."""
        layer, outputs = self.qmodel.get_submodule(name), []

        def bare(_, args):
            x = args[0]
            outputs.append(layer.with_bias(layer.products(x)) if layer.quantized else layer.full_precision(x))

        hook = layer.register_forward_pre_hook(bare)
        for x in inputs:
            module(x)
        hook.remove()
        return outputs


class Part(nn.Module):
    """A part of a network that returns one tensor."""

    def __init__(self, graph: GraphModel):
        super().__init__()
        self.graph = graph

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        [y] = self.graph(x)
        return y


def inverse_regression(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Solve least squares of ``target`` (n, o) on ``x`` (n, d) and a constant; returns (d + 1, o)."""
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    return torch.linalg.inv(design.T @ design) @ design.T @ target
