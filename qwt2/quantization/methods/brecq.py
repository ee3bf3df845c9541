"""BRECQ (arXiv 2102.05426): rounding learned block by block, with activations' quantization dropped at random.

Per block, in execution order, gradient descent decides for every weight whether it is rounded down or up, such that the
block's output, given the quantized network's input, is that of the full-precision network. The rounding is relaxed as
in AdaRound (arXiv 2004.10568). As in QDrop (arXiv 2203.05740), each activation keeps its full-precision value with some
probability while the block learns. A layer outside all blocks is learned by itself. The ranges of activations are those
of the observer; the papers' code also learns them.

This is expensive: thousands of forward and backward passes per block, where other methods take two passes in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwt2.quantization.info import quantization_info
from qwt2.quantization.layers import QuantizedLayer, QuantizedModule
from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.quantizers import UniformQuantizer
from qwt2.quantization.recipe import PTQMethod, Recipe
from qwt2.quantization.spans import Span, span_of_block, span_of_layer
from qwt2.quantization.walk import Visit, Walk

ZETA, GAMMA = 1.1, -0.1  # ends of the stretched sigmoid (AdaRound, equation 23)
STRENGTH = 0.01  # lambda of the regulariser
FIRST_BETA, LAST_BETA = 20.0, 2.0  # exponents of the regulariser
WARM_UP = 0.2  # share of the steps without regulariser, as in the authors' code


@PTQ_METHODS.register("brecq")
@dataclass
class BRECQ(PTQMethod):
    """Settings of the learning.

    Args:
        iterations: steps of Adam per block; 20,000 in the papers.
        learning_rate: of Adam; 1e-3 in the papers, whose weights have ten times as many steps to move.
        batch_size: images per step.
        drop: probability with which an activation keeps its full-precision value.
        seed: seed of the drawn images and drops.
    """

    recipe = Recipe(observer="percentile")
    all_images = True

    iterations: int = 2000
    learning_rate: float = 1e-2
    batch_size: int = 32
    drop: float = 0.5
    seed: int = 0

    def fit(self, walk: Walk, recipe: Recipe) -> None:
        """See :meth:`PTQMethod.fit`."""
        blocks = [span_of_block(walk.model, block) for block in quantization_info(walk.model).blocks]
        inside = {name: block for block in blocks if block is not None for name in block.modules}
        for visit in walk.visits(QuantizedModule):
            block = inside.get(visit.name)
            if block is None:
                self._fit_module(visit)
            elif visit.name == block.modules[0]:
                self._fit_block(walk, block)

    def _fit_module(self, visit: Visit) -> None:
        is_layer = isinstance(visit.module, QuantizedLayer)
        visit.calibrate(stay=is_layer)
        if is_layer:
            self._learn(visit.walk, [span_of_layer(visit.walk.model, call) for call in visit.calls])
            visit.choose_output_range()

    def _fit_block(self, walk: Walk, block: Span) -> None:
        modules = [walk.model.get_submodule(name) for name in block.modules]
        for layer in _layers(modules):
            layer.weight_quantizer.calibrate(layer.weight)
        with _relaxed(modules):  # still without rounding of the weights
            block.run_first(walk, _with_input_ranges)
        self._learn(walk, [block])
        block.run_first(walk, _with_output_range)

    @torch.enable_grad()
    def _learn(self, walk: Walk, spans: list[Span]) -> None:
        """Set the codes of the layers in a block, or of a layer at all its calls."""
        parts = [
            Part(x, exact, target, span.network(walk, index), span.axis)
            for span in spans
            for index, x, exact, target in span.values(walk)
        ]
        sizes = torch.tensor([float(len(part.target)) for part in parts], device=parts[0].target.device)
        modules = [walk.model.get_submodule(name) for name in spans[0].modules]
        generator = torch.Generator(sizes.device).manual_seed(self.seed)
        with _relaxed(modules) as roundings, _dropping(modules, self.drop, generator):
            optimizer = torch.optim.Adam([rounding.v for rounding in roundings], self.learning_rate)
            for step in range(self.iterations):
                part = parts[int(torch.multinomial(sizes, 1, generator=generator))]
                loss = part.loss(self.batch_size, self.drop, generator)
                if (beta := annealed(step / self.iterations)) is not None:
                    loss = loss + STRENGTH * sum(regulariser(relaxation(rounding.v), beta) for rounding in roundings)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for layer, rounding in zip(_layers(modules), roundings):
            layer.set_codes(rounding.hard_codes())


def relaxation(v: Tensor) -> Tensor:
    """Return h(V), the share of a step by which weights are rounded up: a stretched sigmoid, clipped to 0 .. 1."""
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def relaxed_by(share: Tensor) -> Tensor:
    """Return V with h(V) = share, for shares from 0 to 1."""
    return ((share - GAMMA) / (ZETA - share)).log()


def regulariser(h: Tensor, beta: float) -> Tensor:
    """Return the sum of 1 - |2 h - 1|^beta, which pulls h to 0 or 1 (AdaRound, equation 24)."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def annealed(progress: float) -> float | None:
    """Return beta after a share of the steps; ``None`` for no regulariser yet."""
    if progress < WARM_UP:
        return None
    return LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 - (progress - WARM_UP) / (1 - WARM_UP))


@dataclass(frozen=True)
class Part:
    """A batch in front of a block.

    Attributes:
        x, exact: the block's input in the quantized and in the full-precision network.
        target: its output in the full-precision network.
        network: the block, which shares its modules with the model.
        axis: channel axis of the target.
    """

    x: Tensor
    exact: Tensor
    target: Tensor
    network: Callable[[Tensor], tuple[Tensor]]
    axis: int

    def loss(self, count: int, drop: float, generator: torch.Generator) -> Tensor:
        """Return the squared error of the block's output on some images: summed over channels, else averaged."""
        images = torch.randperm(len(self.x), generator=generator, device=self.x.device)[:count]
        x = dropped(self.exact[images], self.x[images], drop, generator)
        [y] = self.network(x)
        return (y - self.target[images]).square().sum(self.axis).mean()


def dropped(exact: Tensor, quantized: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Return quantized values, each replaced by its exact value with probability ``drop`` (QDrop, section 4)."""
    return torch.where(torch.rand(exact.shape, generator=generator, device=exact.device) < drop, exact, quantized)


class RelaxedRounding(UniformQuantizer):
    """A weight's quantizer whose rounding is relaxed: clip(floor(W / s) + h(V)) s (AdaRound, equation 22).

    It starts without any rounding.

    Attributes:
        v: V, in the weight's shape.
    """

    def __init__(self, quantizer: Any, weight: Tensor):
        super().__init__(quantizer.grid, quantizer.observer)
        self.set_parameters(quantizer.scale, quantizer.zero_point, quantizer.channel_axis)
        exact = weight.detach() / self.parameters_for(weight)[0]
        self.down = exact.floor()
        self.v = nn.Parameter(relaxed_by(exact - self.down))

    def codes_for(self, up: Tensor) -> Tensor:
        """Return codes, rounded up by ``up`` (0 .. 1)."""
        zero_point = self.parameters_for(self.down)[1]
        return (self.down + up + zero_point).clamp(self.grid.qmin, self.grid.qmax)

    def quantize(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.quantize`; ``x`` is the weight."""
        return self.values(self.codes_for(relaxation(self.v)))

    def hard_codes(self) -> Tensor:
        """Return the codes of the rounding that was learned."""
        return self.codes_for((relaxation(self.v.detach()) >= 0.5).float())


class DroppingQuantizer(UniformQuantizer):
    """An activation's quantizer that is dropped at random; gradients pass it as if it only clipped."""

    def __init__(self, quantizer: Any, drop: float, generator: torch.Generator):
        super().__init__(quantizer.grid, quantizer.observer, rounds=quantizer.rounds)
        self.set_parameters(quantizer.scale, quantizer.zero_point, quantizer.channel_axis)
        self.drop, self.generator = drop, generator

    def quantize(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.quantize`."""
        scale, zero_point = self.parameters_for(x)
        clipped = x.clamp((self.grid.qmin - zero_point) * scale, (self.grid.qmax - zero_point) * scale)
        rounded = clipped + (super().quantize(x.detach()) - clipped).detach()
        return dropped(x, rounded, self.drop, self.generator)


def _layers(modules: list[QuantizedModule]) -> list[QuantizedLayer]:
    return [module for module in modules if isinstance(module, QuantizedLayer)]


@contextmanager
def _relaxed(modules: list[QuantizedModule]) -> Iterator[list[RelaxedRounding]]:
    """Relax the weights' rounding, and leave outputs as they are: their ranges are chosen after learning."""
    layers = _layers(modules)
    roundings = [RelaxedRounding(layer.weight_quantizer, layer.weight) for layer in layers]
    changes = [(layer, "weight_quantizer", rounding) for layer, rounding in zip(layers, roundings)]
    with _replaced([*changes, *((layer, "output_quantizer", None) for layer in layers)]):
        yield roundings


@contextmanager
def _dropping(modules: list[QuantizedModule], drop: float, generator: torch.Generator) -> Iterator[None]:
    with _replaced(
        [
            (module, name, DroppingQuantizer(quantizer, drop, generator))
            for module in modules
            for name, quantizer in module.quantizers().items()
            if name != "weight_quantizer"
        ]
    ):
        yield


@contextmanager
def _replaced(changes: list[tuple[QuantizedModule, str, UniformQuantizer | None]]) -> Iterator[None]:
    own = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, quantizer in changes:
            setattr(module, name, quantizer)
        yield
    finally:
        for module, name, quantizer in own:
            setattr(module, name, quantizer)


def _with_input_ranges(module: nn.Module, *args: Tensor) -> Tensor:
    if isinstance(module, QuantizedModule):
        module.calibrate_inputs(*([x] for x in args))
    return module(*args)


def _with_output_range(module: nn.Module, *args: Tensor) -> Tensor:
    if isinstance(module, QuantizedLayer) and module.output_quantizer is not None:
        module.calibrate_output([module.products(*args)])
    return module(*args)
