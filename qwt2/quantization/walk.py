"""The walk: a calibration set goes through the graph module by module, float and quantized network side by side.

For every batch the walk keeps the values that are alive where it stands, in each of the two networks. To come to the
next module it runs the operations between, once. What a layer gave while it was looked at is kept too, unless that
would make what is kept grow: it is computed again then, from a place before, but nothing is computed a third time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

from torch import Tensor, fx, nn

from qwt2.capture.batch import Inputs
from qwt2.capture.blocks import belongs
from qwt2.capture.graph import GraphModel
from qwt2.quantization.activation_store import ActivationStore, size_of
from qwt2.quantization.layers import QuantizedModule
from qwt2.quantization.malloc import give_back_after

# Is told how many of how many modules are done.
Progress = Callable[[int, int], None]
# How much more may be alive at the place where the walk waits than at the one before.
GROWTH = 2.0


class Walk:
    """A calibration set on its way through a quantized model.

    Args:
        model: the quantized model; visitors may change its modules.
        batches: the calibration set.
        offload_dir: existing folder for what is alive; ``None`` keeps it in memory.
        memory_limit: bytes that each of the two networks keeps in memory before it uses the folder.
        progress: called behind each module, with the number of modules that are done and of all.
    """

    def __init__(
        self,
        model: GraphModel,
        batches: list[Inputs],
        offload_dir: str | None = None,
        memory_limit: int = 0,
        progress: Progress | None = None,
    ):
        self.model, self.batches, self.progress = model, batches, progress
        self._store = lambda name: ActivationStore(offload_dir, name, memory_limit)

    def visits(self, kind: type[nn.Module]) -> Iterator[Visit]:
        """The model's modules of a kind in the order of their first calls; each waits in front of its module."""
        modules = self.model.calls(kind)
        for number, (name, calls) in enumerate(modules.items(), 1):
            yield Visit(self, name, calls)
            if self.progress is not None:
                self.progress(number, len(modules))

    @cached_property
    def routes(self) -> list[Route]:
        """Each batch's, through the graph for its size."""
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


def in_full_precision(module: nn.Module, *args: Any) -> Any:
    """What a module gives without quantization and compensation."""
    return module.full_precision(*args) if isinstance(module, QuantizedModule) else module(*args)


class Visit:
    """The walk in front of one module.

    Attributes:
        name, module: of it.
        calls: in the graph.
    """

    def __init__(self, walk: Walk, name: str, calls: list[fx.Node]):
        self.walk, self.name, self.module = walk, name, walk.model.get_submodule(name)
        self.calls = calls

    @property
    def is_repeated(self) -> bool:
        """Whether the module runs several times in one pass."""
        return len(self.calls) > 1

    def layer_outputs(self, target: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(batch, the quantized layer's output without compensation, its target), for every batch and call.

        Args:
            target: "global", the full-precision network's own output of the layer; "local", the full-precision layer's
                output on the quantized network's input.
        """
        for index in range(len(self.walk.batches)):
            inputs: list[Tensor] = []
            products: list[Tensor] = []
            give = partial(self._products, inputs, products)
            self.walk.quantized.visit(index, self, give, pending=products)
            if target == "global":
                targets: list[Tensor] = []
                self.walk.reference.visit(index, self, partial(self._full_precision, targets))
            else:
                targets = [self.module.full_precision(x) for x in inputs]
            for y, y_f in zip(products, targets, strict=True):
                yield index, self.module.with_bias(y.clone()), y_f
            give_back_after(index)

    def _full_precision(self, targets: list[Tensor], x: Tensor) -> Tensor:
        return _kept(self.module.full_precision(x), targets)

    def _products(self, inputs: list[Tensor], products: list[Tensor], x: Tensor) -> Tensor:
        inputs.append(x)
        products.append(self.module.products(x))
        return self.module.finished(products[-1].clone()) if self.is_repeated else products[-1]

    def block_outputs(self, block: str, target: str) -> Iterator[tuple[int, tuple, tuple]]:
        """(batch, what the module behind a block reads in the quantized network, and in the target's), per batch.

        Args:
            target: "global", the full-precision network; "local", the full-precision block on the quantized network's
                input.
        """
        quantized = self.walk.quantized
        for index, route in enumerate(self.walk.routes):
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

    def calibrate(self) -> None:
        """Let the module choose its ranges, from the first batch's values, everything before it quantized.

        Where it runs several times, it chooses from the full-precision values of all its runs.
        """
        if self.is_repeated:
            runs: list[tuple] = []
            self.walk.reference.visit(
                0, self, lambda *args: _kept((y := self.module.full_precision(*args)), runs, (*args, y))
            )
            self.module.calibrate(*zip(*runs))
        else:
            self.walk.quantized.visit(0, self, self.module.calibrate_on)


def _kept(value: Any, where: list, kept: Any = None) -> Any:
    where.append(value if kept is None else kept)
    return value


class Route:
    """The graph's nodes in order, as the walk goes through them.

    Attributes:
        last: node -> position of its last reader.
        calls: module -> positions of its calls.
    """

    def __init__(self, model: GraphModel):
        self.model, self.nodes = model, list(model.graph.nodes)
        numbers = {node: number for number, node in enumerate(self.nodes)}
        self.last = {source: number for node, number in numbers.items() for source in node.all_input_nodes}
        self.by_name = {node.name: node for node in self.nodes}
        self.calls = {name: [numbers[call] for call in calls] for name, calls in model.calls(nn.Module).items()}

    def start_of(self, block: str) -> int:
        """Position of the first node of a block."""
        return next(n for n, node in enumerate(self.nodes) if belongs(node, block))

    def arguments(self, values: _Values, number: int) -> tuple:
        """What a node reads."""
        return fx.node.map_arg(self.nodes[number].args, values.__getitem__)

    def drop(self, values: _Values, number: int) -> None:
        """Forget what nothing behind a position reads."""
        for source in (*self.nodes[number].all_input_nodes, self.nodes[number]):
            if self.last.get(source, -1) <= number:
                values.pop(source, None)


class Path:
    """One network's way: for every batch, a position in the graph and the values that are alive there.

    Args:
        walk: whose batches go this way.
        run_module: computes what a module gives in this network.
        store: for the values.
    """

    def __init__(self, walk: Walk, run_module: Callable, store: ActivationStore):
        self.model, self.routes, self.batches = walk.model, walk.routes, walk.batches
        self.run_module, self.store = run_module, store
        self.runs_again: set[int] = set()  # batches that wait in front of what ran already

    def visit(self, index: int, visit: Visit, give: Callable, pending: list[Tensor] | None = None) -> None:
        """Run one batch to a module and through all its calls, ``give`` in the module's place, and wait there.

        Args:
            pending: what the layer's calls gave before its compensation, from which their outputs are made when the
                walk goes on; it goes on in front of the module else, if that is to run again.
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
        if numbers[-1] - numbers[0] >= len(numbers):  # others run between, which see what changes now
            self.hold(index, (numbers[0], before))
        elif pending is None:
            self.hold(index, (position, values), (numbers[0], before))
        else:
            for number in numbers:
                values.pop(route.nodes[number], None)
            self.hold(index, (numbers[0], values, dict(zip(numbers, pending))), (numbers[0], before))

    def advance(self, index: int, number: int) -> _Values:
        """The values alive in front of a node, on one batch."""
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
        """Run the nodes from one position to another; values are dropped after their last reader.

        Args:
            results: position -> what a layer gave there before its compensation.
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
        """Wait in the first of these places where not much more is alive than where the walk waits now.

        Where that is none, the walk stays, and runs again what it ran since; it does so once, and then waits in the
        first place all the same.

        Args:
            places: the position of a node to wait in front of, the values that are alive there, and, if given, what its
                layer gave before its compensation; the first lies behind all that was run.
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
    """Values by node; parameters and the network's inputs are looked up where they are."""

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
