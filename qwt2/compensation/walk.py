"""Running a network unit by unit over a calibration set.

A unit is a block, or a layer outside all blocks. After unit k has run, the inputs of unit k + 1 are
found by running the model with unit k replaced by its stored outputs, every earlier unit replaced
by NaN, and a stop at unit k + 1: this runs only the cheap code between the two, whatever it is. If
NaN shows up in the captured inputs, an earlier unit's output is used beyond its successor (feature
pyramids, dense connections); the prefix is then run in full, once per batch. Outputs of sections are
kept to the end and need no such run: every head of a detector reads its neck. The prefix is run
throughout where a layer runs several times in one pass, as one stored output cannot stand for all of
them, unless all its runs are inside one section, which is a unit then.

Inside a unit it is likewise: the results of layers that are done stand for them, where they are no larger than
what the unit reads (the others are computed again), and NaN for the layers and products before the last of those.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from qwt2.capture.blocks import is_inside
from qwt2.compensation.activation_store import ActivationStore
from qwt2.errors import Qwt2Error
from qwt2.capture.patching import Stop, replaced_forward
from qwt2.capture.batch import Inputs, as_inputs, call, shapes, tensors
from qwt2.quantization.layers import full_precision
from qwt2.quantization.quantize import QuantizationInfo, check_images, quantization_info


class UnitStream:
    """The inputs of the current unit for every batch, under one mode of the network.

    Args:
        model: the quantized model.
        batches: the network's inputs.
        reference: True follows the full-precision network, False the quantized one.
        offload_dir: folder for the stored inputs, or ``None``.

    Attributes:
        kept: section -> what it returned on every batch.
        repeated: layers outside sections that run several times in one pass.
        results: layer of the current unit -> what it gave on every batch, a list of its runs.
    """

    def __init__(self, model: nn.Module, batches: list[Inputs], reference: bool, offload_dir: str | None):
        self.model, self.batches, self.reference = model, batches, reference
        info, prefix = quantization_info(model), "reference" if reference else "quantized"
        self.units = info.units
        self.position = 0
        self.inputs, self.outputs = ActivationStore(offload_dir, prefix), ActivationStore(offload_dir, f"{prefix}-outputs")
        self.kept = {name: ActivationStore(offload_dir, f"{prefix}-{name}") for name in info.sections}
        self.output_shapes: dict[tuple[str, int], Any] = {}
        self.results: dict[str, ActivationStore] = {}
        self.sizes: dict[int, int] = {}  # numbers that the current unit reads, of every batch
        self.whole: set[tuple[int, str]] = set()  # (unit, layer) that needs results which are not there any more
        self.offload_dir, self.prefix = offload_dir, prefix
        self.products = set(info.matmuls)
        self.repeated = repeated_outside_sections(info)
        self.needs_prefix: set[int] = set(range(len(self.units))) if self.repeated else set()
        for index in range(len(batches)):
            self._set_inputs(index, self._run_to(index, 0, {}))

    def _set_inputs(self, index: int, inputs: Any) -> None:
        self.inputs[index] = inputs
        self.sizes[index] = _size(inputs)

    @contextmanager
    def mode(self, module: nn.Module) -> Iterator[None]:
        """Let ``module`` compute as this stream's network does."""
        with full_precision(module) if self.reference else ExitStack():
            yield

    @property
    def unit(self) -> nn.Module:
        return self.model.get_submodule(self.units[self.position])

    @property
    def modules(self) -> list[str]:
        """The quantized modules of the current unit, in execution order."""
        return [name for name in quantization_info(self.model).modules if is_inside(name, self.units[self.position])]

    def run(self, index: int, keep: bool = False) -> Any:
        """The current unit's output for one batch: a tensor, or a tree of them.

        Args:
            keep: for :meth:`advance`, which then need not run the unit again.
        """
        _, output = self._captured(index, [], outputs=True, to_end=True)
        if keep:
            self.outputs[index] = output
        return output

    def layer_inputs(self, index: int, names: list[str]) -> dict[str, list[Tensor]]:
        """Inputs of layers inside the current unit for one batch, one for each run; runs no further than it must."""
        return self._captured(index, names, outputs=False, to_end=False)[0]

    def layer_outputs(self, index: int, names: list[str], to_end: bool) -> dict[str, list[Tensor]]:
        """Their outputs, likewise.

        Args:
            to_end: run the unit to its end and keep what it returns for :meth:`advance`.
        """
        captured, output = self._captured(index, names, outputs=True, to_end=to_end)
        if to_end and self.repeated.isdisjoint(names):
            self.outputs[index] = output
        for name in names if not to_end else ():
            self.keep(index, name, captured[name])
        return captured

    def keep(self, index: int, name: str, results: list[Tensor]) -> None:
        """Let what a layer of the current unit gave on a batch stand for it from now on, if there is room for it.

        Args:
            results: one for each run; outputs, or in the quantized network products (:meth:`QuantizedLayer.products`).
        """
        if self.repeated:
            return
        store = self.results.setdefault(name, ActivationStore(self.offload_dir, f"{self.prefix}-{name}"))
        if sum(result.numel() for result in results) <= self.sizes[index]:
            store[index] = results
        self.output_shapes[name, index] = [_shape_of(result) for result in results]

    def _captured(self, index: int, names: list[str], outputs: bool, to_end: bool) -> tuple[dict[str, list[Tensor]], Any]:
        """What goes into layers or comes out of them, and, where it gets there, what the unit returns."""
        key = (self.position, names[0] if names else "")
        stand_ins, is_sound = self._stand_ins(index, names)
        if stand_ins and key not in self.whole:
            found = self._captured_with(stand_ins, index, names, outputs, to_end)
            if is_sound or not _has_nan(found):
                return found
            self.whole.add(key)
        return self._captured_with({}, index, names, outputs, to_end)

    def _stand_ins(self, index: int, names: list[str]) -> tuple[dict[str, Callable], bool]:
        """Module of the current unit -> what runs for it, and whether none of these gives NaN."""
        done = [name for name in self.modules if name not in names and (name, index) in self.output_shapes]
        stored = [name in self.results and index in self.results[name].trees for name in done]
        until = max((number + 1 for number, is_stored in enumerate(stored) if is_stored), default=0)
        return {name: self._stand_in(index, name) for name in done[:until]}, all(stored[:until])

    def _stand_in(self, index: int, name: str) -> Callable:
        layer = self.model.get_submodule(name)
        if name in self.results and index in self.results[name].trees:
            results = iter(self.results[name][index])
            return lambda x: next(results) if self.reference else layer.finished(next(results))
        shapes = iter(self.output_shapes[name, index])
        return lambda *operands: _poisoned(next(shapes))

    def _captured_with(
        self, stand_ins: dict[str, Callable], index: int, names: list[str], outputs: bool, to_end: bool
    ) -> tuple[dict[str, list[Tensor]], Any]:
        captured: dict[str, list[Tensor]] = {name: [] for name in names}
        elsewhere = not self.repeated.isdisjoint(names)
        runs_on = elsewhere or to_end or names[-1] in quantization_info(self.model).repeated
        last = None if runs_on else names[-1]
        products = {} if self.repeated else {name: [] for name in self.modules if name in self.products - stand_ins.keys()}
        output = None
        with ExitStack() as stack:
            stack.enter_context(self.mode(self.model if elsewhere else self.unit))
            for name, stand_in in stand_ins.items():
                stack.enter_context(replaced_forward(self.model.get_submodule(name), stand_in))
            for name, shapes in products.items():
                stack.enter_context(self._measuring(name, shapes))
            for name in names:
                stack.enter_context(self._capturing(name, captured[name], outputs, stop=name == last))
            try:
                if elsewhere:
                    call(self.model, self.batches[index])
                else:
                    args, kwargs = self.inputs[index]
                    output = self.unit(*args, **kwargs)
            except Stop:
                pass
        self.output_shapes |= {(name, index): shapes for name, shapes in products.items() if shapes}
        return captured, output

    def _measuring(self, name: str, shapes: list["_Shape"]):
        """Note what a product gives."""
        product = self.model.get_submodule(name)
        own = product.forward

        def forward(a: Tensor, b: Tensor) -> Tensor:
            y = own(a, b)
            shapes.append(_shape_of(y))
            return y

        return replaced_forward(product, forward)

    def _capturing(self, name: str, captured: list[Tensor], outputs: bool, stop: bool):
        module = self.model.get_submodule(name)
        own = module.forward

        def forward(x: Tensor) -> Tensor:
            if stop:
                captured.append(own(x) if outputs else x)
                raise Stop
            if not outputs:
                captured.append(x.clone())  # later in-place operations must not reach it
                return own(x)
            y = own(x)
            captured.append(y.clone())
            return y

        return replaced_forward(module, forward)

    def advance(self, output_of: Callable[[int], Tensor] | None = None) -> None:
        """Move on to the next unit, with the outputs of the current one on every batch.

        Args:
            output_of: gives them by the batch's number; else the unit is run where its output was not kept.
        """
        for index in range(len(self.batches)):
            if output_of is not None:
                output = output_of(index)
            else:
                output = self.outputs.pop(index) if index in self.outputs.trees else self.run(index)
            if not _is_finite(output):
                raise Qwt2Error(f"{self.units[self.position]} gives NaN or infinity on the calibration images")
            self.output_shapes[self.units[self.position], index] = tree_map(_shape_of, output)
            if self.units[self.position] in self.kept:
                self.kept[self.units[self.position]][index] = output
            if self.position + 1 < len(self.units):
                self._set_inputs(index, self._next_inputs(index, output))
        for store in self.results.values():
            store.clear()
        self.results.clear()
        self.position += 1
        if self.position == len(self.units):
            for store in (self.inputs, *self.kept.values()):
                store.clear()

    def _next_inputs(self, index: int, output: Any) -> Any:
        target = self.position + 1
        if target not in self.needs_prefix:
            stubs = {name: self._earlier(name, index) for name in self.units[: self.position]}
            stubs[self.units[self.position]] = lambda *args, **kwargs: output
            captured = self._run_to(index, target, stubs)
            if not _has_nan(captured):
                return captured
            self.needs_prefix.add(target)
        return self._run_to(index, target, {})

    def _earlier(self, name: str, index: int) -> Callable:
        """What stands for a unit before the current one: its output if that is kept, else NaN."""
        if name in self.kept:
            return lambda *args, **kwargs: self.kept[name][index]
        shape = self.output_shapes[name, index]
        return lambda *args, **kwargs: tree_map(_poisoned, shape)

    def _run_to(self, index: int, position: int, stubs: dict[str, Callable]) -> Any:
        """Arguments of the unit at ``position``, with other units replaced as ``stubs`` says."""
        captured = []

        def stop(*args, **kwargs):
            captured.append((args, kwargs))
            raise Stop

        with ExitStack() as stack:
            stack.enter_context(self.mode(self.model))
            for name, stub in stubs.items():
                stack.enter_context(replaced_forward(self.model.get_submodule(name), stub))
            stack.enter_context(replaced_forward(self.model.get_submodule(self.units[position]), stop))
            try:
                call(self.model, self.batches[index])
            except Stop:
                pass
        if not captured:
            raise Qwt2Error(f"{self.units[position]} was not run on a calibration batch; give images of one kind")
        return captured[0]


def calibration_batches(qmodel: nn.Module, calibration: Iterable[Any]) -> list[Inputs]:
    """The inputs of a calibration set for a quantized model. Images of a detector may differ in size.

    Raises:
        Qwt2Error: no batches, an empty batch, images of another shape, type or device than the model takes, or
            NaN/infinity in them.
    """
    batches = [as_inputs(batch) for batch in calibration]
    if not batches:
        raise Qwt2Error("the calibration set is empty; give at least one batch of images")
    shape = quantization_info(qmodel).input_shape
    for number, batch in enumerate(batches):
        check_images(qmodel, batch)
        if isinstance(batch, Tensor) != isinstance(shape, tuple) or (isinstance(batch, Tensor) and shapes(batch) != shape):
            raise Qwt2Error(
                f"calibration batch {number} holds images of shape {shapes(batch)}, but the model was quantized "
                f"with {shape}; resize them to that"
            )
        if not _is_finite(tensors(batch)):
            raise Qwt2Error(f"calibration batch {number} holds NaN or infinity; check the images and their transform")
    return batches


@dataclass(frozen=True)
class _Shape:
    """What is kept of a tensor that a unit returned."""

    size: torch.Size
    like: Tensor


def _shape_of(leaf: Any) -> Any:
    return _Shape(leaf.shape, leaf.new_empty(())) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _size(tree: Any) -> int:
    return sum(leaf.numel() for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def _poisoned(leaf: Any) -> Any:
    return leaf.like.new_full(leaf.size, float("nan")) if isinstance(leaf, _Shape) else leaf


def _is_finite(tree: Any) -> bool:
    return all(bool(torch.isfinite(leaf).all()) for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def repeated_outside_sections(info: QuantizationInfo) -> set[str]:
    """Layers whose runs do not all lie in one unit."""
    return {name for name in info.repeated if not any(is_inside(name, section) for section in info.sections)}


def _has_nan(tree: Any) -> bool:
    leaves = [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]
    return any(bool(torch.isnan(leaf.amax())) for leaf in leaves)
