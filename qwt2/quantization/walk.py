"""Run a calibration set through the graph module by module, in the float and the quantized network side by side.

For every batch and each of the two networks, the walk stores the values that are alive at its position. To reach the
next module, it runs the operations in between once. A visited module's output is stored as well, unless that would make
the stored values grow too much. In that case it is computed again from the earlier position, but never a third time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property, partial
from itertools import accumulate
from typing import Any

from torch import Tensor, fx, nn

from qwt2.capture.batch import Inputs, image_count
from qwt2.capture.blocks import belongs
from qwt2.capture.graph import GraphModel
from qwt2.quantization.activation_store import ActivationStore, size_of
from qwt2.quantization.layers import QuantizedLayer, QuantizedModule
from qwt2.quantization.malloc import give_back_after
from qwt2.quantization.processes import ALONE, Processes
from qwt2.quantization.quantizers import UniformQuantizer
from qwt2.quantization.streams import Joint, branch_end, joint

# Called with the number of finished modules and the number of all modules.
Progress = Callable[[int, int], None]
# Number of images that ranges are chosen from, as in RepQ-ViT and QwT, and that a gate looks at.
OBSERVED = 32
# Factor by which the stored values may grow when the walk moves to a new position. In front of a transformer's MLP, two
# values of the stream's width are alive, and behind its first layer five.
GROWTH = 2.5


class Walk:
    """A calibration set on its way through a quantized model.

    Args:
        model: the quantized model; visitors may change its modules.
        batches: the calibration set.
        offload_dir: existing folder for stored values; ``None`` keeps them in memory.
        memory_limit: bytes that each of the two networks keeps in memory before it uses the folder.
        progress: called after each module with the number of finished modules and the number of all modules.
        processes: the processes that share the batches; each has a walk of its own.

    Attributes:
        share: numbers of the batches that this process runs.
    """

    def __init__(
        self,
        model: GraphModel,
        batches: list[Inputs],
        offload_dir: str | None = None,
        memory_limit: int = 0,
        progress: Progress | None = None,
        processes: Processes = ALONE,
    ):
        self.model, self.batches, self.progress, self.processes = model, batches, progress, processes
        self.share = processes.share(len(batches))
        self._store = lambda name: ActivationStore(offload_dir, name, memory_limit)

    def visits(self, kind: type[nn.Module]) -> Iterator[Visit]:
        """Yield a visit for each of the model's modules of a kind, in the order of their first calls."""
        modules = self.model.calls(kind)
        for number, (name, calls) in enumerate(modules.items(), 1):
            yield Visit(self, name, calls)
            if self.progress is not None:
                self.progress(number, len(modules))

    def layer_visits(self, ranges: str | None = None) -> Iterator[Visit]:
        """Yield a visit for each quantized layer, in the order of their first calls.

        Args:
            ranges: observer that chooses the ranges of all activations again on the way: those of each module's
                arguments in front of it, and that of a layer's output after its visit. ``None`` keeps the ranges.
        """
        if ranges is None:
            yield from self.visits(QuantizedLayer)
            return
        for visit in self.visits(QuantizedModule):
            visit.choose_ranges(ranges)
            if isinstance(visit.module, QuantizedLayer):
                yield visit
                if visit.module.alpha is not None:  # else its output is as before
                    visit.choose_output_range()

    def images(self, batches: Iterable[int] | None = None) -> int:
        """Return the number of images in some batches, or in all."""
        numbers = range(len(self.batches)) if batches is None else batches
        return sum(image_count(self.batches[index]) for index in numbers)

    @cached_property
    def observed(self) -> list[int]:
        """Numbers of the batches that ranges are chosen from again; every process runs these."""
        return self.first(range(len(self.batches)))

    def first(self, batches: Iterable[int]) -> list[int]:
        """Return the first of some batches' numbers, in order, with :data:`OBSERVED` images if there are as many."""
        numbers = sorted(batches)
        images = accumulate((image_count(self.batches[index]) for index in numbers), initial=0)
        return [index for index, before in zip(numbers, images) if before < OBSERVED]

    @cached_property
    def routes(self) -> list[Route]:
        """The route of each batch, through the graph for its image size."""
        models = [self.model.of_size(self.model.tensors_of(batch)) for batch in self.batches]
        known = {id(model): Route(model) for model in models}
        return [known[id(model)] for model in models]

    @cached_property
    def quantized(self) -> Path:
        """The quantized network."""
        return Path(self, lambda module, *args: module(*args), self._store("quantized"))

    @cached_property
    def reference(self) -> Path:
        """The full-precision network."""
        return Path(self, in_full_precision, self._store("reference"))

    @cached_property
    def _streams(self) -> ActivationStore:
        return self._store("streams")

    def exact_stream(self, index: int, end: fx.Node) -> Tensor:
        """Return the full-precision stream behind a branch in a batch; all layers of the branch share it."""
        if index not in self._streams or self._streams[index][0] != end.name:
            self._streams[index] = end.name, self.reference.value(index, end)
        return self._streams[index][1]


def in_full_precision(module: nn.Module, *args: Any) -> Any:
    """Return a module's output without quantization and compensation."""
    return module.full_precision(*args) if isinstance(module, QuantizedModule) else module(*args)


class Visit:
    """A stop of the walk in front of one module.

    Attributes:
        name: name of the module.
        module: the module.
        calls: its calls in the graph.
    """

    def __init__(self, walk: Walk, name: str, calls: list[fx.Node]):
        self.walk, self.name, self.module = walk, name, walk.model.get_submodule(name)
        self.calls = calls

    @property
    def is_repeated(self) -> bool:
        """Whether the module runs several times in one pass."""
        return len(self.calls) > 1

    @property
    def is_inside_branch(self) -> bool:
        """Whether the layer lies inside a residual branch, and not at its end."""
        route = self.walk.routes[0]
        return self.joint() is None and route.branch_end(self.name) is not None

    def joint(self, index: int = 0) -> Joint | None:
        """Return where the layer's output is added to a residual stream that is known by then, in a batch's graph."""
        return self.walk.routes[index].joint(self.name)

    def layer_outputs(self, target: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (batch number, output, target) of a layer for every batch and call, both (N, ..., C) or (N, C, H, W).

        This and the other iterators yield only the batches of this process.

        The output is that of the quantized layer in the quantized network, without compensation.

        Args:
            target: "global" for the layer's output in the full-precision network; "stream" for the same, but if the
                output is added to a residual stream, for what the stream lacks: the full-precision stream behind the
                addition minus the quantized stream before it; "local" for the full-precision layer's output on the
                quantized network's input.
        """
        for index in self.walk.share:
            inputs: list[Tensor] = []
            products: list[Tensor] = []
            give = partial(self._products, inputs, products)
            before = self.walk.quantized.visit(index, self, give, pending=products)
            for y, y_f in zip(products, self._targets(index, target, inputs, before), strict=True):
                yield index, self.module.with_bias(y.clone()), y_f
            give_back_after(index)

    def layer_inputs(self, target: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (batch number, quantized input, target) of a layer for every batch and call.

        The walk stays in front of the layer, whose weight may then be changed.

        Args:
            target: as in :meth:`layer_outputs`; or "input" for the layer's input in the full-precision network.
        """
        for index in self.walk.share:
            inputs: list[Tensor] = []
            before = self.walk.quantized.visit(index, self, partial(self._inputs, inputs), stay=True)
            for x, y_f in zip(inputs, self._targets(index, target, inputs, before), strict=True):
                yield index, self.module.input_quantizer(x), y_f
            give_back_after(index)

    def _targets(self, index: int, target: str, inputs: list[Tensor], before: _Values) -> list[Tensor]:
        if target == "local":
            return [self.module.full_precision(x) for x in inputs]
        targets: list[Tensor] = []
        seen = self._full_precision if target != "input" else self._full_precision_input
        exact = self.walk.reference.visit(index, self, partial(seen, targets))
        found = self.joint(index) if target == "stream" else None
        if found is None:
            return targets
        model, [y] = self.walk.routes[index].model, targets
        lack = exact[found.shortcut] - operand(model, found, before[found.shortcut])
        return [y + found.moved_back(model, before, lack, y)]

    def _full_precision(self, targets: list[Tensor], x: Tensor) -> Tensor:
        return _kept(self.module.full_precision(x), targets)

    def _full_precision_input(self, inputs: list[Tensor], x: Tensor) -> Tensor:
        inputs.append(x)
        return self.module.full_precision(x)

    def _inputs(self, inputs: list[Tensor], x: Tensor) -> Tensor:
        inputs.append(x)
        return self.module(x) if self.is_repeated else x

    def _products(self, inputs: list[Tensor], products: list[Tensor], x: Tensor) -> Tensor:
        inputs.append(x)
        products.append(self.module.products(x))
        return self.module.finished(products[-1].clone()) if self.is_repeated else products[-1]

    def stream_error(self, batches: Iterable[int]) -> tuple[float, float] | None:
        """Return the power of the residual stream behind the branch that a layer lies in, and that of its error.

        The walk must just have visited the layer. It does not move on. At most :data:`OBSERVED` images are run, up to
        the end of a batch.

        Args:
            batches: numbers of the batches that may be run.

        Returns:
            The sum of squares of the full-precision stream, and of the quantized stream's error, with the layer's
            present compensation; ``None`` if no stream follows, or if the layer runs several times.
        """
        ends = {index: self.walk.routes[index].branch_end(self.name) for index in self.walk.first(batches)}
        sums = [0.0, 0.0]
        for index, end in ends.items():
            if end is None or self.is_repeated:
                return None
            if index in self.walk.share:
                exact = self.walk.exact_stream(index, end)
                sums[0] += power(exact)
                sums[1] += power(self.walk.quantized.value(index, end) - exact)
        signal, error = self.walk.processes.added(sums)
        return float(signal), float(error)

    def block_outputs(self, block: str, target: str) -> Iterator[tuple[int, tuple, tuple]]:
        """Yield (batch number, quantized values, target values) for every batch.

        The values are the arguments of the module after the block: the block's input and output.

        Args:
            block: name of the block in front of the visited module.
            target: "global" for values of the full-precision network; "local" for those of the full-precision block on
                the quantized network's input.
        """
        quantized = self.walk.quantized
        for index in self.walk.share:
            route = self.walk.routes[index]
            [number], entry = route.calls[self.name], route.start_of(block)
            if target == "global":
                reference = self.walk.reference
                values = reference.advance(index, number)
                targets = route.arguments(values, number)
                reference.hold(index, (number, values))
                values = quantized.advance(index, number)
            else:
                values = quantized.advance(index, entry)
                twin = values.copy()
                quantized.run(index, twin, entry, number, in_full_precision)
                targets = route.arguments(twin, number)
                quantized.run(index, values, entry, number)
            yield index, route.arguments(values, number), targets
            quantized.hold(index, (number, values))
            give_back_after(index)

    def calibrate(self, stay: bool = False) -> None:
        """Make the module choose its ranges on the first batch, with everything before it quantized.

        A module that runs several times chooses from the full-precision values of all its runs instead.

        Args:
            stay: stay in front of the module, because the visit will change its weight.
        """
        if self.is_repeated:
            runs: list[tuple] = []
            self.walk.reference.visit(
                0, self, lambda *args: _kept((y := self.module.full_precision(*args)), runs, (*args, y)), stay=stay
            )
            self.module.calibrate(*zip(*runs))
        else:
            self.walk.quantized.visit(0, self, self.module.calibrate_on, stay=stay)

    def choose_ranges(self, observer: str) -> None:
        """Choose the ranges of the module's arguments again, from the quantized network's values on the first images.

        Ranges of modules that run several times stay as they are, and so do those of 8 bits: their steps are small, and
        values that the first images do not have would be clipped.
        """
        coarse = [
            quantizer
            for quantizer in self.module.activation_quantizers()
            if isinstance(quantizer, UniformQuantizer) and quantizer.grid.bits < 8
        ]
        for quantizer in coarse:
            quantizer.observer = observer
        if coarse and not self.is_repeated:
            runs: list[tuple] = []
            for index in self.walk.observed:
                self.walk.quantized.visit(index, self, lambda *args: runs.append(args), stay=True)
            self.module.calibrate_inputs(*zip(*runs))

    def choose_output_range(self) -> None:
        """Choose the range of a layer's output again, which its weight codes and compensation have changed."""
        if not self.is_repeated and self.module.output_quantizer is not None:
            calls = {index: self.walk.routes[index].calls[self.name] for index in self.walk.observed}
            self.module.calibrate_output([self.walk.quantized.products(i, call) for i, [call] in calls.items()])


def operand(model: GraphModel, found: Joint, shortcut: Tensor) -> Tensor:
    """Return the shortcut as the quantized addition sees it."""
    addition = model.get_submodule(str(found.addition.target))
    quantizers = addition.quantizers() if isinstance(addition, QuantizedModule) else {}
    quantizer = quantizers.get(("a_quantizer", "b_quantizer")[found.side])
    return shortcut if quantizer is None else quantizer(shortcut)


def power(x: Tensor) -> float:
    """Return the sum of squares."""
    return float(x.flatten().dot(x.flatten()))


def _kept(value: Any, where: list, kept: Any = None) -> Any:
    where.append(value if kept is None else kept)
    return value


class Route:
    """The graph's nodes in execution order.

    Attributes:
        nodes: the nodes; a position is an index into them.
        positions: node -> position.
        last: node -> position of its last reader.
        by_name: node name -> node.
        calls: module name -> positions of its calls.
    """

    def __init__(self, model: GraphModel):
        self.model, self.nodes = model, list(model.graph.nodes)
        self.positions = {node: number for number, node in enumerate(self.nodes)}
        self.last = {source: number for node, number in self.positions.items() for source in node.all_input_nodes}
        self.by_name = {node.name: node for node in self.nodes}
        self.calls = {name: [self.positions[call] for call in calls] for name, calls in model.calls(nn.Module).items()}
        # Every batch asks the same of its graph, and each answer takes a pass over the nodes.
        self.joint, self.branch_end = cache(self._joint), cache(self._branch_end)

    def _joint(self, layer: str) -> Joint | None:
        """Return where a layer's output is added to a residual stream that is known in front of the layer."""
        numbers = self.calls[layer]
        found = joint(self.model, self.nodes[numbers[0]]) if len(numbers) == 1 else None
        return found if found is not None and self.positions[found.shortcut] < numbers[0] else None

    def _branch_end(self, layer: str) -> fx.Node | None:
        """Return the addition at the end of the residual branch that a layer lies in."""
        return branch_end(self.model, self.nodes[self.calls[layer][-1]])

    def start_of(self, block: str) -> int:
        """Return the position of the first node of a block."""
        return next(n for n, node in enumerate(self.nodes) if belongs(node, block))

    def arguments(self, values: _Values, number: int) -> tuple:
        """Return the arguments of the node at a position."""
        return fx.node.map_arg(self.nodes[number].args, values.__getitem__)

    def drop(self, values: _Values, number: int) -> None:
        """Drop the value of the node at a position, and the values it reads, if no later node reads them."""
        for source in (*self.nodes[number].all_input_nodes, self.nodes[number]):
            if self.last.get(source, -1) <= number:
                values.pop(source, None)


class Path:
    """The progress of one network: for every batch, a position in the graph and the values that are alive there.

    Args:
        walk: the walk whose batches are run.
        run_module: computes a module's output in this network.
        store: storage for the values.
    """

    def __init__(self, walk: Walk, run_module: Callable, store: ActivationStore):
        self.model, self.routes, self.batches = walk.model, walk.routes, walk.batches
        self.run_module, self.store = run_module, store
        self.runs_again: set[int] = set()  # batches whose stored position lies before operations that have run

    def visit(
        self, index: int, visit: Visit, give: Callable, pending: list[Tensor] | None = None, stay: bool = False
    ) -> _Values:
        """Run one batch up to a module and through all its calls, and store the new position.

        If other nodes run between the calls, they depend on changes that the visit makes. The batch then stays in front
        of the first call, and everything from there on runs again.

        Args:
            index: number of the batch.
            visit: the module.
            give: called in place of the module.
            pending: list that ``give`` fills with the layer's products, one tensor per call. The outputs are computed
                from these when the walk goes on, with the compensation that the layer has by then. ``None`` if the
                results of ``give`` are final.
            stay: stay in front of the first call, because the visit will change the layer's weight.

        Returns:
            The values that are alive before the first call.
        """
        route = self.routes[index]
        numbers = route.calls[visit.name]
        before = self.advance(index, numbers[0])
        values, position = before.copy(), numbers[0]
        for number in numbers:
            self.run(index, values, position, number)
            position = number + 1
            values[route.nodes[number]] = give(*route.arguments(values, number))
            route.drop(values, number)
        if stay or numbers[-1] - numbers[0] >= len(numbers):  # nodes between the calls will see changes
            self.hold(index, (numbers[0], before))
        elif pending is None:
            self.hold(index, (position, values), (numbers[0], before))
        else:
            for number in numbers:
                values.pop(route.nodes[number], None)
            self.hold(index, (numbers[0], values, dict(zip(numbers, pending))), (numbers[0], before))
        return before

    def value(self, index: int, node: fx.Node) -> Tensor:
        """Run one batch up to a node and return its value, without storing the new position."""
        number = self.routes[index].positions[node]
        values = self.advance(index, number)
        return self.run_module(self.model.get_submodule(node.target), *self.routes[index].arguments(values, number))

    def products(self, index: int, number: int) -> Tensor:
        """Return the products of the layer that is called at a position, which the last visit may have left."""
        results = self.store[index][2:] if index in self.store else ()
        if results and number in results[0]:
            return results[0][number].clone()
        layer, values = self.model.get_submodule(self.routes[index].nodes[number].target), self.advance(index, number)
        self.hold(index, (number, values))
        return layer.products(*self.routes[index].arguments(values, number))

    def advance(self, index: int, number: int) -> _Values:
        """Run one batch up to the node at position ``number``, and return the values that are alive there."""
        route = self.routes[index]
        values = _Values(route.model, self.batches[index])
        position, results = 0, []
        if index in self.store:
            position, held, *results = self.store[index]
            values.update({route.by_name[name]: value for name, value in held.items()})
        self.run(index, values, position, number, results=dict(*results))
        return values

    def run(
        self, index: int, values: _Values, start: int, stop: int, run_module: Callable | None = None,
        results: dict[int, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Run the nodes from ``start`` to before ``stop`` in place, and drop values after their last reader.

        Args:
            index: number of the batch.
            values: the values alive at ``start``; updated to those at ``stop``.
            start, stop: positions in the graph.
            run_module: computes a module's output; the network's own if not given.
            results: position -> products of the layer called there, which it does not compute again.
        """
        route = self.routes[index]
        for number in range(start, stop):
            node = route.nodes[number]
            if node.op in ("placeholder", "get_attr"):
                continue
            if node.op != "call_module":
                values[node] = route.model.evaluate(node, values)
            elif results and number in results:
                values[node] = self.model.get_submodule(node.target).finished(results.pop(number).clone())
            else:
                module = self.model.get_submodule(node.target)
                values[node] = (run_module or self.run_module)(module, *route.arguments(values, number))
            route.drop(values, number)

    def hold(self, index: int, *places: tuple) -> None:
        """Store the first of several positions whose values are at most ``GROWTH`` times as large as the stored ones.

        If there is none, the batch keeps its stored position, and later runs the same operations again. This happens at
        most once in a row; the next time, the first position is stored regardless of its size.

        Args:
            index: number of the batch.
            places: tuples of a position, the values that are alive there and, optionally, the products of its layer by
                position. The first place lies behind everything that has run.
        """
        states = [
            (number, {node.name: value for node, value in values.items()}, *results)
            for number, values, *results in places
        ]
        limit = GROWTH * max(self.store.size(index), size_of(self.batches[index])) if index in self.store else math.inf
        found = next((state for state in states if size_of(state) <= limit), None)
        if found is None and index in self.runs_again:
            found = states[0]
        if found is not None:
            self.store[index] = found
        self.runs_again -= {index}
        self.runs_again |= set() if found is states[0] else {index}


class _Values(dict):
    """Values by node; parameters and the network's inputs are looked up in the model and the batch."""

    def __init__(self, model: GraphModel, batch: Inputs):
        super().__init__()
        self.model = model
        self.inputs = dict(zip(model.inputs, model.tensors_of(batch)))

    def __missing__(self, node: fx.Node) -> Any:
        return self.model.get_tensor(node.target) if node.op == "get_attr" else self.inputs[node]

    def copy(self) -> _Values:
        new = _Values.__new__(_Values)
        dict.__init__(new, self)
        new.model, new.inputs = self.model, self.inputs
        return new
