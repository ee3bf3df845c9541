"""The graph that represents a model: ATen operations, and modules for everything that can be quantized."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from qwt2.capture.batch import Inputs
from qwt2.errors import Qwt2Error

_SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Signature:
    """The parameters of a model's call, and the call that its graph was captured for.

    Attributes:
        parameters: signature of the forward method.
        spec: structure of the bound arguments, including defaults.
        leaves: values of the arguments in order; ``None`` for a tensor.
        order: index of the leaf for each input of the graph.
        out_spec: structure of the model's outputs.
        takes_names: whether the inputs were given by name.
    """

    parameters: inspect.Signature
    spec: TreeSpec
    leaves: tuple[Any, ...]
    order: tuple[int, ...]
    out_spec: TreeSpec
    takes_names: bool

    @classmethod
    def of(cls, forward: Callable, args: tuple, kwargs: Mapping[str, Any], out_spec: TreeSpec) -> Signature:
        """Create the signature from a method and the arguments of one call."""
        parameters = inspect.signature(forward)
        given, places = tree_flatten((args, dict(kwargs)))
        marks = [object() if isinstance(leaf, Tensor) else leaf for leaf in given]  # one tensor may be given twice
        leaves, spec = tree_flatten(_bound(parameters, *tree_unflatten(marks, places)))
        numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
        order = [numbers[id(mark)] for mark, leaf in zip(marks, given) if isinstance(leaf, Tensor)]
        constants = tuple(None if number in order else leaf for number, leaf in enumerate(leaves))
        return cls(parameters, spec, constants, tuple(order), out_spec, bool(kwargs))

    def __deepcopy__(self, memo: dict) -> Signature:
        return self  # nothing in it changes

    def inputs(self, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the graph's inputs from the arguments of one call.

        Raises:
            Qwt2Error: if the call differs from the captured one in anything but the values of its tensors.
        """
        try:
            bound = _bound(self.parameters, args, kwargs)
        except TypeError as error:
            raise Qwt2Error(f"the captured model cannot be called so ({error}); call it as it was captured") from None
        leaves, spec = tree_flatten(bound)
        tensors = set(self.order)
        if spec != self.spec or any(
            isinstance(leaf, Tensor) != (number in tensors) or (number not in tensors and leaf != self.leaves[number])
            for number, leaf in enumerate(leaves)
        ):
            raise Qwt2Error(
                f"the model was captured for {self._describe()} and is called with other arguments than tensors like "
                "those; quantize it again with batches that call it in this way"
            )
        return [leaves[number] for number in self.order]

    def _describe(self) -> str:
        leaves = ["tensor" if number in self.order else leaf for number, leaf in enumerate(self.leaves)]
        return ", ".join(
            f"{name}={value}" for name, value in tree_unflatten(leaves, self.spec).items() if value is not None
        )


def _bound(parameters: inspect.Signature, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = parameters.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


class OtherSizes:
    """Graphs of the same model for images of other sizes; a copy of the model starts without them.

    Args:
        capture: returns the float model's graph for an example.
    """

    def __init__(self, capture: Callable[[Any], GraphModel]):
        self.capture = capture
        self.graphs: dict[Any, GraphModel] = {}

    def __deepcopy__(self, memo: dict) -> OtherSizes:
        return OtherSizes(self.capture)


class GraphModel(nn.Module):
    """A model as one flat, functional graph; it is called like the model and returns the same structure.

    A graph is for one image size. When inputs of another size arrive, the model is captured again, and the new graph
    runs the modules of this one.

    Nodes are ATen operations and calls of modules (``nn.Linear``, ``nn.Conv2d``, ``nn.LayerNorm``, :class:`Product`,
    :class:`Sum`, :class:`Pooling`), which keep their names from the model. Each node's ``meta`` holds "module", the
    name of the module that it comes from, and "shape", its size with ``None`` for axes that depend on the batch.

    Args:
        graph: its placeholders are the inputs, and its output node's argument is the flat list of outputs.
        tensors: parameters and buffers of ``get_attr`` nodes and modules, by name.
        signature: how the model is called.
        title: name of the model's class, for messages.
    """

    quantization: Any  # only in quantized models: qwt2.quantization.info.QuantizationInfo

    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Tensor], signature: Signature, title: str):
        super().__init__()
        self.graph, self.title = graph, title
        self.other_sizes: OtherSizes | None = None
        self.edits: list[tuple[Callable, tuple]] = []
        for name, tensor in tensors.items():
            self.set_tensor(name, tensor)
        self.set_signature(signature)

    def set_signature(self, signature: Signature) -> None:
        """Give ``forward`` the parameters of the model's own method, because exporters inspect them."""
        self.signature = signature

        def forward(self, *args, **kwargs):
            inputs = self.signature.inputs(args, kwargs)
            return tree_unflatten(self.of_size(inputs).run(*inputs), self.signature.out_spec)

        receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        own = signature.parameters.parameters.values()
        forward.__signature__ = (  # type: ignore[attr-defined]
            inspect.Signature([receiver, *own]) if "self" not in signature.parameters.parameters else None
        )
        self.forward = types.MethodType(forward, self)

    def edit(self, change: Callable, *arguments: Any) -> None:
        """Apply ``change(model, *arguments)`` to this graph now, and to graphs for other sizes when they are made."""
        change(self, *arguments)
        self.edits.append((change, arguments))
        self.prune()
        if self.other_sizes is not None:
            self.other_sizes.graphs.clear()

    def tensors_of(self, batch: Inputs) -> list[Tensor]:
        """Return a batch as the graph's inputs, in order."""
        return self.signature.inputs(*(((), batch) if isinstance(batch, dict) else ((batch,), {})))

    def of_size(self, inputs: list[Tensor]) -> GraphModel:
        """Return the model whose graph takes inputs of these sizes: this one, or one that shares its modules."""
        sizes = [tuple(x.shape[1:]) for x in inputs]
        if self.other_sizes is None or all(
            _fits(size, node.meta["shape"][1:]) for size, node in zip(sizes, self.inputs)
        ):
            return self
        if (key := str(sizes)) not in self.other_sizes.graphs:
            named = dict(zip([node.name for node in self.inputs], inputs))
            example = named if self.signature.takes_names else inputs[0]
            other = self.other_sizes.capture(example)
            for change, arguments in self.edits:
                other.edit(change, *arguments)
            self.other_sizes.graphs[key] = other
        other = self.other_sizes.graphs[key]
        for name in other.calls(nn.Module):
            if other.get_submodule(name) is not (module := self.get_submodule(name)):  # replaced since the last call
                other.set_module(name, module)
        return other

    def run(self, *inputs: Tensor) -> list[Any]:
        """Return the graph's outputs in order, given its inputs in order."""
        if "_compiled" not in self.__dict__:
            code = self.graph.python_code("self")
            names = dict(code.globals)
            exec(compile(code.src, f"<graph of {self.title}>", "exec"), names)
            self.__dict__["_compiled"] = names["forward"]
        return self._compiled(self, *inputs)

    def evaluate(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Return the value of one node, given the values of the nodes that it reads."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "get_attr":
            return self.get_tensor(node.target)
        if node.op == "call_module":
            return self.get_submodule(node.target)(*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        return args[0]  # output

    def walk(self, batch: Inputs, visit: Callable[[fx.Node, dict[fx.Node, Any]], Any]) -> list[Any]:
        """Run the graph node by node on a batch, and return its outputs.

        Args:
            batch: the inputs.
            visit: returns the value of a node, given the values of the nodes before it.
        """
        values: dict[fx.Node, Any] = dict(zip(self.inputs, self.tensors_of(batch)))
        for node in self.graph.nodes:
            if node.op != "placeholder":
                values[node] = visit(node, values)
        return values[self.output]

    def between(self, start: fx.Node, outputs: list[fx.Node]) -> GraphModel:
        """Return the part from ``start`` to ``outputs`` as a model that shares the modules; it returns a tuple."""
        graph, needed, waiting = fx.Graph(), set(), list(outputs)
        while waiting:
            node = waiting.pop()
            if node is not start and node not in needed:
                needed.add(node)
                waiting += [] if node.target is _SIZE else node.all_input_nodes
        values = {start: graph.placeholder("x")}
        values[start].meta = dict(start.meta)
        for node in self.graph.nodes:
            if node in needed and node.target is _SIZE:  # only the batch size is symbolic
                values[node] = graph.call_function(_SIZE, (values[start], 0))
                values[node].meta = dict(node.meta)
            elif node in needed:
                values[node] = graph.node_copy(node, values.__getitem__)
        graph.output([values[node] for node in outputs])

        def forward(x: Tensor) -> None: ...

        signature = Signature.of(forward, (torch.empty(0),), {}, tree_flatten((0,) * len(outputs))[1])
        part = GraphModel(graph, {}, signature, self.title)
        part.share(self, graph.nodes)
        if hasattr(self, "quantization"):
            part.quantization = self.quantization
        return part.eval()

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholder nodes of the input tensors."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The node that holds all outputs."""
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    def calls(self, kind: type | tuple[type, ...]) -> dict[str, list[fx.Node]]:
        """Map the names of all modules of a kind, in the order of their first call, to their calls."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "call_module" and isinstance(self.get_submodule(node.target), kind):
                found.setdefault(node.target, []).append(node)
        return found

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, or ``None``."""
        return self.get_submodule(node.target) if node.op == "call_module" else None

    def get_tensor(self, name: str) -> Tensor:
        """Return the parameter or buffer with a dotted name."""
        parent, _, attribute = name.rpartition(".")
        return getattr(self.get_submodule(parent), attribute)

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Store a parameter or buffer under a dotted name."""
        parent, _, attribute = name.rpartition(".")
        holder = _container(self, parent)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(attribute, tensor)
        else:
            holder.register_buffer(attribute, tensor)

    def set_module(self, name: str, module: nn.Module) -> None:
        """Store a module under a dotted name; keep children of a replaced module that the graph still uses."""
        parent, _, attribute = name.rpartition(".")
        holder = _container(self, parent)
        older = holder._modules.get(attribute, nn.Module())
        targets = {node.target for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        below = f"{name}."
        used = {target.removeprefix(below).partition(".")[0] for target in targets if target.startswith(below)}
        for kind in ("_modules", "_parameters", "_buffers"):
            for key in used & getattr(older, kind).keys():
                if not hasattr(module, key):
                    getattr(module, kind)[key] = getattr(older, kind)[key]
        holder.add_module(attribute, module)

    def share(self, other: GraphModel, nodes: Iterable[fx.Node]) -> None:
        """Share the modules and tensors of another graph that these nodes name."""
        for node in nodes:
            if node.op == "get_attr":
                self.set_tensor(node.target, other.get_tensor(node.target))
            elif node.op == "call_module":
                self.set_module(node.target, other.get_submodule(node.target))

    def free_name(self, parent: str, stem: str) -> str:
        """Return an unused dotted name below ``parent``: ``stem`` and the first free number, from 1."""
        holder, number = _container(self, parent), 1
        while hasattr(holder, f"{stem}{number}"):
            number += 1
        return f"{parent}.{stem}{number}".lstrip(".")

    def add_constant(self, before: fx.Node, tensor: Tensor) -> fx.Node:
        """Store a new tensor in the module of ``before``, and return a ``get_attr`` node for it."""
        parent, _, child = before.meta["module"].rpartition(".")
        # A layer will replace a leaf module, so nothing can be stored inside a leaf.
        place = (parent, f"{child}_constant") if before.meta["leaf"] else (before.meta["module"], "constant")
        name = self.free_name(*place)
        self.set_tensor(name, tensor.detach().clone(memory_format=torch.contiguous_format))
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        node.meta = before.meta | {"shape": tuple(tensor.shape), "dtype": tensor.dtype}
        return node

    def prune(self) -> None:
        """Remove nodes that nothing reads, and modules and tensors that no node names."""
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        used = {node.target for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        for path, holder in list(self.named_modules(remove_duplicate=False)):
            if any(path == name or path.startswith(f"{name}.") for name in used):
                continue  # a module that runs keeps all its tensors
            for store in (holder._parameters, holder._buffers):
                for name in [name for name in store if f"{path}.{name}".lstrip(".") not in used]:
                    del store[name]
        _drop_empty(self)
        self.__dict__.pop("_compiled", None)


def _fits(size: tuple[int, ...], captured: tuple[int | None, ...]) -> bool:
    return len(size) == len(captured) and all(c in (None, n) for n, c in zip(size, captured))


class Container(nn.Module):
    """A module that only holds others; children of lists and sequences can be indexed, as in the model."""

    def __getitem__(self, number: int) -> nn.Module | None:
        return list(self._modules.values())[number]

    def __len__(self) -> int:
        return len(self._modules)


def _container(root: nn.Module, name: str) -> nn.Module:
    """Return the submodule with a dotted name; create missing ones as empty containers."""
    for part in name.split(".") if name else ():
        if part not in root._modules:
            root.add_module(part, Container())
        root = root.get_submodule(part)
    return root


def _drop_empty(module: nn.Module) -> None:
    for name, child in list(module._modules.items()):
        if isinstance(child, Container):
            _drop_empty(child)
            if not (child._modules or child._parameters or child._buffers):
                del module._modules[name]


class Product(nn.Module):
    """The product a @ b of two activations."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product."""
        return a @ b


class Sum(nn.Module):
    """The sum a + b of two activations of equal shape."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sum."""
        return a + b


class Pooling(nn.Module):
    """The mean over all positions of images (N, C, H, W).

    Args:
        target: the ATen operation.
        args, kwargs: its arguments after the images.
    """

    def __init__(self, target: Callable, args: Iterable[Any], kwargs: Mapping[str, Any]):
        super().__init__()
        self.target, self.args, self.kwargs = target, tuple(args), dict(kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the means, (N, C) or (N, C, 1, 1) depending on the operation."""
        return self.target(x, *self.args, **self.kwargs)


def insert(
    graph: fx.Graph, before: fx.Node, target: Callable | str, args: tuple, like: fx.Node,
    shape: tuple | None = None, kwargs: Mapping[str, Any] | None = None,
) -> fx.Node:  # fmt: skip
    """Insert a new node in front of another one, and return it.

    Args:
        graph: the graph of both nodes.
        before: the node to insert in front of.
        target: an operation, or the name of a module.
        args, kwargs: its arguments.
        like: the node whose metadata it copies.
        shape: its size; that of ``like`` if not given.
    """
    with graph.inserting_before(before):
        create: Callable[..., fx.Node] = graph.call_module if isinstance(target, str) else graph.call_function
        node = create(target, args, dict(kwargs or {}))
    node.meta = like.meta | ({} if shape is None else {"shape": shape})
    return node


def replace(node: fx.Node, new: Any) -> None:
    """Make the readers of a node read ``new`` instead, and erase the node."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
