"""Exact rewrites of a captured graph: one function per pass, and one ordered list of passes.

Every pass changes a :class:`GraphModel` in place. The results of the graph stay the same, up to rounding.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from qwt2.capture.convolutions import as_convolution
from qwt2.capture.einsum import as_product
from qwt2.capture.graph import Container, GraphModel, Pooling, Product, Sum, insert, replace
from qwt2.errors import Qwt2Error

L = TypeVar("L", bound=nn.Module)
aten = torch.ops.aten

_ASSERTIONS = ("_assert", "sym_constrain_range", "_guards_fn")
_COPIES = {
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_RANDOM = ("rand", "bernoulli", "normal", "dropout", "multinomial", "poisson")
_SMALL = 2**16  # tensors of up to this many elements are always stored
_COPIES_SHARE = 0.05  # copies of modules that run repeatedly may add this share of the model's weights
_TO_END = 2**62  # a slice to the end has a larger integer than this as its end


def normalise(model: GraphModel) -> None:
    """Apply every pass, in order."""
    for rewrite in PASSES:
        rewrite(model)
        model.prune()
    model.graph.lint()


def drop_assertions(model: GraphModel) -> None:
    """Remove shape assertions, which hold for every batch that the graph accepts."""
    for node in reversed(model.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", str(node.target)).startswith(_ASSERTIONS):
            model.graph.erase_node(node)


def drop_identities(model: GraphModel) -> None:
    """Remove copies, casts to the same type and full slices; turn views into reshapes, which accept any layout."""
    for node in list(model.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _VIEWS:
            node.target = aten.reshape.default
        if _is_identity(node):
            replace(node, node.args[0])


def _is_identity(node: fx.Node) -> bool:
    if node.target in _COPIES:
        return True
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None or node.meta["shape"] is None or source.meta["dtype"] != node.meta["dtype"]:
        return False
    if node.target in (aten._to_copy.default, aten.to.dtype, aten.type_as.default):
        return True
    if node.target is aten.slice.Tensor:
        start, end, step = (*node.args[2:], None, None, None)[:3]
        return start in (None, 0) and isinstance(end, int) and end > _TO_END and step in (None, 1)
    if node.target in (aten.dropout.default, aten.native_dropout.default):
        return node.args[2] is False
    if node.target in (aten.constant_pad_nd.default, aten.pad.default):
        return all(isinstance(width, int) and width == 0 for width in node.args[1])
    return node.target is aten.expand.default and _is_static(node) and node.meta["shape"] == source.meta["shape"]


def expand_circular_padding(model: GraphModel) -> None:
    """Replace circular padding by concatenations: it is not in ONNX before opset 19, and OpenVINO cannot read it."""
    for node in _functions(model, aten.pad.default):
        if len(node.args) > 2 and node.args[2] == "circular":
            x, widths = node.args[:2]
            for number, (before, after) in enumerate(zip(widths[::2], widths[1::2]), 1):
                x = _wrapped(node, x, len(node.meta["shape"]) - number, before, after)
            replace(node, x)


def _wrapped(node: fx.Node, x: fx.Node, axis: int, before: int, after: int) -> fx.Node:
    """Return ``x`` with its last ``before`` values in front of it and its first ``after`` values behind it."""
    size = x.meta["shape"][axis]

    def shape(length: int | None) -> tuple:
        return (*x.meta["shape"][:axis], length, *x.meta["shape"][axis + 1 :])

    def part(start: int, end: int, length: int) -> fx.Node:
        return insert(node.graph, node, aten.slice.Tensor, (x, axis, start, end), x, shape(length))

    front = [part(-before, _TO_END, before)] if before else []
    parts = [*front, x, *([part(0, after, after)] if after else [])]
    whole = shape(size and size + before + after)
    return insert(node.graph, node, aten.cat.default, (parts, axis), x, whole) if len(parts) > 1 else x


def expand_embedding_bags(model: GraphModel) -> None:
    """Replace EmbeddingBag by an embedding and its sum, mean or maximum: ONNX Runtime crashes on the exported form.

    Raises:
        Qwt2Error: if bags have different lengths, weights or padding.
    """
    for node in _functions(model, aten.embedding_bag.padding_idx):
        weight, indices, offsets, _, mode, _, weights, _, padding = node.args
        ids = indices.args[0] if indices.target is aten.reshape.default else None
        shape: Any = () if ids is None else ids.meta["shape"]
        equal = len(shape) == 2 and offsets.target is aten.arange.start_step and offsets.args[2] == shape[1]
        if not equal or weights is not None or padding is not None:
            raise Qwt2Error(
                f"{node.meta['module'] or 'the model'} is an EmbeddingBag with offsets, weights or padding, which "
                "engines cannot run; use nn.Embedding, and add what it returns"
            )
        width = weight.meta["shape"][1]
        rows = insert(model.graph, node, aten.embedding.default, (weight, ids), node, (*shape, width))
        rows.meta["dtype"] = weight.meta["dtype"]
        reduce = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)[mode]
        y = insert(model.graph, node, reduce, (rows, [1]), rows, (shape[0], width))
        for reader in list(node.users):  # getitem; only the first value is an EmbeddingBag's output
            replace(reader, y)


def unify_bounds(model: GraphModel) -> None:
    """Make both bounds of a clamp floating numbers: the exporter cannot translate ``clamp(-1, 0.5)``."""
    for node in _functions(model, aten.clamp.default, aten.hardtanh.default):
        if node.meta["dtype"] is not None and node.meta["dtype"].is_floating_point:
            node.args = (
                node.args[0],
                *(float(bound) if isinstance(bound, int) else bound for bound in node.args[1:]),
            )


def _is_static(node: fx.Node) -> bool:
    return None not in node.meta["shape"]


def compute_constants(model: GraphModel) -> None:
    """Precompute values that depend only on parameters and numbers: weight norm, standardized weights, masks."""
    values: dict[fx.Node, Any] = {}
    for node in model.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and _is_constant(node, values)):
            values[node] = model.evaluate(node, values)
    for node in [n for n in values if n.op != "get_attr" and any(user not in values for user in n.users)]:
        if isinstance(values[node], Tensor) and _is_worth_storing(node, values):
            stored = model.add_constant(node, values[node])
            values[stored] = values[node]  # further constants may depend on it
            replace(node, stored)


def _is_constant(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    name = str(node.target)
    return all(source in values for source in node.all_input_nodes) and not any(word in name for word in _RANDOM)


def _is_worth_storing(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Return False for a large tensor made from a small one (a position bias from its table): files would grow."""
    if node.target is aten.expand.default:
        return False
    sources = [source for source in _sources(node) if source.op == "get_attr"]
    return values[node].numel() <= max(_SMALL, 2 * sum(values[source].numel() for source in sources))


def expand_attention(model: GraphModel) -> None:
    """Replace ``scaled_dot_product_attention`` by the operations that its documentation gives."""
    for node in _functions(model, aten.scaled_dot_product_attention.default):
        _expand_one(model, node)


def _expand_one(model: GraphModel, node: fx.Node) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: Any = dict(zip(names, node.args)) | dict(node.kwargs)
    query, key, value, mask = (given.get(name) for name in names[:4])
    *heads, rows, width = query.meta["shape"]
    columns = key.meta["shape"][-2]
    scores_shape = (*heads, rows, columns)

    def op(target: Callable, *args: Any, like: fx.Node = node, shape: tuple | None = None, **kwargs: Any) -> fx.Node:
        return insert(node.graph, node, target, args, like, shape, kwargs)

    if given.get("enable_gqa") and key.meta["shape"][-3] != heads[-1]:
        times = heads[-1] // key.meta["shape"][-3]
        key, value = (
            op(aten.repeat_interleave.self_int, x, times, -3, shape=(*heads, *x.meta["shape"][-2:]))
            for x in (key, value)
        )
    # Scaling the query is cheaper than scaling the scores, and the scale folds into the query's projection.
    scale = width**-0.5 if given.get("scale") is None else given["scale"]
    query = op(aten.mul.Tensor, query, scale, shape=query.meta["shape"])
    key = op(aten.transpose.int, key, -2, -1, shape=(*key.meta["shape"][:-2], width, columns))
    scores = op(aten.matmul.default, query, key, shape=scores_shape)
    if given.get("is_causal"):
        ones = op(aten.ones.default, [rows, columns], shape=(rows, columns), dtype=torch.bool)
        ones.meta["dtype"] = torch.bool
        mask = op(aten.tril.default, ones, like=ones)
    blocked, fill = None, float("-inf")
    if mask is not None and _may_block_rows(model, mask):  # the weights of a fully masked row are 0, not NaN
        fill = torch.finfo(torch.float32).min
    if mask is not None and mask.meta["dtype"] == torch.bool:
        blocked = op(aten.logical_not.default, mask, like=mask)
    elif mask is not None:
        scores = op(aten.add.Tensor, scores, mask, shape=scores_shape)
        blocked = None if fill == float("-inf") else op(aten.eq.Scalar, mask, float("-inf"), like=mask)
    if blocked is not None:
        blocked.meta["dtype"] = torch.bool
        scores = op(aten.masked_fill.Scalar, scores, blocked, fill, shape=scores_shape)
    weights = op(aten.softmax.int, scores, -1, shape=scores_shape)
    if fill != float("-inf"):
        weights = op(aten.masked_fill.Scalar, weights, blocked, 0.0, shape=scores_shape)
    replace(node, op(aten.matmul.default, weights, value))


def _may_block_rows(model: GraphModel, mask: fx.Node) -> bool:
    """Return whether a mask may hide every key from a query: constant masks are evaluated, others are assumed to."""
    sources = _sources(mask)
    if any(source.op == "placeholder" for source in sources):
        return True
    values: dict[fx.Node, Any] = {}
    for node in [node for node in model.graph.nodes if node in sources]:
        values[node] = model.evaluate(node, values)
    seen = values[mask] if mask.meta["dtype"] == torch.bool else values[mask] > float("-inf")
    return not bool(seen.any(-1).all())


def _sources(node: fx.Node) -> set[fx.Node]:
    """Return a node and all nodes that its value depends on."""
    found, waiting = set(), [node]
    while waiting:
        if (current := waiting.pop()) not in found:
            found.add(current)
            waiting += current.all_input_nodes
    return found


def expand_products(model: GraphModel) -> None:
    """Replace einsum of two operands, bmm, mm, addmm and baddbmm by plain ``matmul``."""
    for node in _functions(model, aten.einsum.default):
        as_product(node)
    for node in _functions(model, aten.bmm.default, aten.mm.default):
        node.target = aten.matmul.default
    for node in _functions(model, aten.baddbmm.default, aten.addmm.default):
        added, a, b = node.args[:3]
        y = insert(node.graph, node, aten.matmul.default, (a, b), node)
        y = _times(y, node.kwargs.get("alpha", 1), node)
        if (beta := node.kwargs.get("beta", 1)) != 0:  # with beta=0, PyTorch ignores the added tensor, even NaN
            y = insert(node.graph, node, aten.add.Tensor, (y, _times(added, beta, node)), node)
        replace(node, y)


def _times(x: fx.Node, factor: float, before: fx.Node) -> fx.Node:
    return x if factor == 1 else insert(x.graph, before, aten.mul.Tensor, (x, factor), x)


def weights_to_linear(model: GraphModel) -> None:
    """Replace a product with a constant matrix, and a bias added right after it, by ``linear``."""
    for node in _functions(model, aten.matmul.default):
        x, weight = node.args
        if _is_activation(x) and _is_matrix(weight):
            new = model.add_constant(node, model.get_tensor(weight.target).t())
            bias, last = _added_bias(node)
            replace(last, insert(node.graph, last, aten.linear.default, (x, new, bias), node))
            if last is not node:
                model.graph.erase_node(node)


def _is_matrix(weight: fx.Node) -> bool:
    return weight.op == "get_attr" and len(weight.meta["shape"]) == 2 and weight.meta["dtype"] == torch.float32


def _added_bias(node: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """Return the bias that is added to a product, and the addition; ``None`` and the product if there is no bias.

    A bias is a constant with one value per output channel. The addition must be the only reader of the product.
    """
    [reader] = node.users if len(node.users) == 1 else [None]
    if reader is None or reader.target is not aten.add.Tensor or reader.kwargs:
        return None, node
    other = next((a for a in reader.args if a is not node), None)
    is_bias = isinstance(other, fx.Node) and other.op == "get_attr" and other.meta["shape"] == node.meta["shape"][-1:]
    return (other, reader) if is_bias else (None, node)


def unify_convolutions(model: GraphModel) -> None:
    """Replace 1-d and transposed convolutions, and named padding ("same"), by ``conv2d`` with numeric padding."""
    for node in _functions(model, *_CONVOLUTIONS):
        if all(
            argument is None or argument.op == "get_attr" for argument in node.args[1:3] if argument is not node.args[0]
        ):
            as_convolution(model, node)


_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.padding, aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
)  # fmt: skip


def name_layers(model: GraphModel) -> None:
    """Replace linear, conv2d and layer_norm with constant weights by calls of modules."""
    makers = {aten.linear.default: _linear, aten.conv2d.default: _conv2d, aten.layer_norm.default: _layer_norm}
    made: dict[tuple, str] = {}
    kinds: dict[str, set[str]] = {}
    nodes = [n for n in _functions(model, *makers) if _has_constant_weights(n)]
    for node in nodes:
        weight = _weight(node)
        kinds.setdefault(node.meta["module"], set()).add("" if weight is None else weight.target)
    for node in nodes:
        key = (node.meta["module"], node.target, str(node.args[1:]), str(node.kwargs))
        if key not in made:
            made[key] = _layer_name(model, node, is_only=len(kinds[node.meta["module"]]) == 1)
            model.set_module(made[key], makers[node.target](model, node))
        replace(node, insert(model.graph, node, made[key], (node.args[0],), node))
    _separate_tied(model)


def _weight(node: fx.Node) -> fx.Node | None:
    args = (*node.args, *[None] * 4)
    return args[2] if node.target is aten.layer_norm.default else args[1]


def _has_constant_weights(node: fx.Node) -> bool:
    if not _is_tensor(node.args[0]) or node.args[0].op == "get_attr":
        return False
    rest = [argument for argument in node.args[1:] if isinstance(argument, fx.Node)]
    if node.target is aten.layer_norm.default and len(node.args[1]) != 1:
        return False
    # Code under autocast computes in bfloat16; layers of other types than float32 stay as they are.
    return all(argument.op == "get_attr" and argument.meta["dtype"] == torch.float32 for argument in rest)


def _layer_name(model: GraphModel, node: fx.Node, is_only: bool) -> str:
    """Return the name of the module that owns the layer's weight; else a numbered name in the module calling it.

    Args:
        model: the graph.
        node: the layer's operation.
        is_only: whether all layers of the calling module have the same weight.
    """
    weight, module = _weight(node), node.meta["module"]
    owner = weight.target.rpartition(".")[0] if weight is not None and weight.target.endswith(".weight") else module
    if is_only and node.meta["leaf"]:
        owner = module
    elif weight is None or not weight.target.endswith(".weight"):
        owner = ""
    taken = isinstance(_submodule(model, owner), (nn.Linear, nn.Conv2d, nn.LayerNorm)) if owner else True
    return model.free_name(module, node.target.__name__.partition(".")[0]) if taken else owner


def _submodule(model: GraphModel, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _linear(model: GraphModel, node: fx.Node) -> nn.Linear:
    weight, bias = _tensors(model, *(*node.args[1:], None)[:2])
    assert weight is not None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _with(layer, weight, bias)


def _conv2d(model: GraphModel, node: fx.Node) -> nn.Conv2d:
    defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    weight, bias, stride, padding, dilation, groups = (*node.args, *defaults[len(node.args) :])[1:]
    weight, bias = _tensors(model, weight, bias)
    assert weight is not None
    pairs: list[Any] = [tuple(v) * (2 // len(v)) for v in (stride, padding, dilation)]
    stride, padding, dilation = pairs
    kernel: Any = tuple(weight.shape[2:])
    layer = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], kernel, stride, padding, dilation, groups,
        bias is not None, device="meta",
    )  # fmt: skip
    return _with(layer, weight, bias)


def _layer_norm(model: GraphModel, node: fx.Node) -> nn.LayerNorm:
    size, weight, bias, eps = (*node.args[1:], *(None, None, 1e-5)[len(node.args) - 2 :])[:4]
    weight, bias = _tensors(model, weight, bias)
    layer = nn.LayerNorm(size, eps, weight is not None, bias is not None, device="meta")
    return _with(layer, weight, bias)


def _tensors(model: GraphModel, *nodes: fx.Node | None) -> list[Tensor | None]:
    return [None if node is None else model.get_tensor(node.target) for node in nodes]


def _with(layer: L, weight: Tensor | None, bias: Tensor | None) -> L:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            setattr(layer, name, nn.Parameter(tensor.detach().clone(), requires_grad=False))
    return layer.eval()


def _separate_tied(model: GraphModel) -> None:
    """Give other readers of a layer's weight a copy, because quantization changes the layer's weight.

    Also move tensors out of modules that a layer or an operation has replaced.
    """
    model.prune()
    for node in [n for n in model.graph.nodes if n.op == "get_attr"]:
        owner = _submodule(model, node.target.rpartition(".")[0])
        if isinstance(owner, (nn.Linear, nn.Conv2d, nn.LayerNorm, Pooling)):
            replace(node, model.add_constant(node, model.get_tensor(node.target)))
    for name in model.calls((nn.Linear, nn.Conv2d, nn.LayerNorm, Pooling)):
        module = model.get_submodule(name)
        for store in (module._parameters, module._buffers):
            for other in [key for key in store if key not in ("weight", "bias")]:
                del store[other]


def name_operations(model: GraphModel) -> None:
    """Replace products of activations, sums of equal shapes, and means over positions by calls of modules."""
    counts: dict[tuple[str, str, str], int] = {}
    names: dict[tuple, str] = {}
    for node in list(model.graph.nodes):
        for kind, (matches, make) in _OPERATIONS.items():
            if node.op == "call_function" and matches(node):
                module, operands = node.meta["module"], 1 if kind == "pool" else 2
                place = (module, node.meta.get("call", ""), kind)
                counts[place] = counts.get(place, 0) + 1
                # Repeated calls of one module share its operations if their other arguments are equal.
                key = (module, kind, counts[place], str(node.args[operands:]), str(node.kwargs))
                if key not in names:
                    names[key] = _operation_name(model, node, kind, counts[place])
                    model.set_module(names[key], make(node))
                replace(node, insert(model.graph, node, names[key], tuple(node.args[:operands]), node))
                break
    _separate_tied(model)


def _operation_name(model: GraphModel, node: fx.Node, kind: str, number: int) -> str:
    """Return the module's own name if it is a single pooling; else a numbered, unused name below it."""
    module = node.meta["module"]
    if kind == "pool" and node.meta["leaf"] and isinstance(_submodule(model, module), (Container, type(None))):
        return module
    name = f"{module}.{kind}{number}".lstrip(".")
    return name if _submodule(model, name) is None else model.free_name(module, kind)


def _is_product(node: fx.Node) -> bool:
    return node.target is aten.matmul.default and all(_is_activation(a) for a in node.args)


def _is_sum(node: fx.Node) -> bool:
    if node.target is not aten.add.Tensor or node.kwargs or not all(_is_activation(a) for a in node.args):
        return False
    a, b = (argument.meta["shape"] for argument in node.args)
    return a == b and a is not None


def _is_pooling(node: fx.Node) -> bool:
    x: Any = node.args[0] if node.args else None
    if not _is_activation(x) or len(x.meta["shape"] or ()) != 4:
        return False
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(node.args[1]) == [1, 1]
    return node.target is aten.mean.dim and sorted(d % 4 for d in node.args[1] or ()) == [2, 3]


_OPERATIONS = {
    "matmul": (_is_product, lambda node: Product()),
    "add": (_is_sum, lambda node: Sum()),
    "pool": (_is_pooling, lambda node: Pooling(node.target, node.args[1:], node.kwargs)),
}


def fold_batchnorms(model: GraphModel, kept: Collection[str] = ()) -> None:
    """Fold every BatchNorm that is the only reader of a layer's output into that layer, at all its calls.

    Args:
        model: the graph.
        kept: names of the layers that are left as they are.
    """
    for name, calls in model.calls((nn.Linear, nn.Conv2d)).items():
        if name in kept:
            continue
        layer = model.get_submodule(name)
        found = [_only_norm(node, isinstance(layer, nn.Linear)) for node in calls]
        norms = [norm for norm in found if norm is not None]
        if len(norms) < len(calls) or len({str(norm.args[1:]) for norm in norms}) > 1:
            continue
        weight, bias, mean, variance = _tensors(model, *norms[0].args[1:5])
        assert mean is not None and variance is not None  # this operation always has them
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
        fuse: Callable[..., Any] = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        layer.weight, layer.bias = fuse(layer.weight, layer.bias, mean, variance, norms[0].args[6], weight, bias)
        layer.requires_grad_(False)
        for node, norm in zip(calls, norms):
            for reader in list(norm.users):
                replace(reader, node)
            model.graph.erase_node(norm)


def _only_norm(node: fx.Node, is_linear: bool) -> fx.Node | None:
    [reader] = node.users if len(node.users) == 1 else [None]
    if (
        reader is None
        or reader.target is not aten._native_batch_norm_legit_no_training.default
        or reader.args[0] is not node
    ):
        return None
    constant = all(argument is None or argument.op == "get_attr" for argument in reader.args[1:5])
    used = all(user.target is operator.getitem and user.args[1] == 0 for user in reader.users)
    # The channels are a Linear's last axis and a BatchNorm's second axis; they agree only for (N, C).
    axes = 2 if is_linear else 4
    return reader if constant and used and len(node.meta["shape"]) == axes else None


def fold_scales(model: GraphModel, kept: Collection[str] = ()) -> None:
    """Fold a multiplication by a constant per channel, as of LayerScale, into the layer whose only reader it is.

    Args:
        model: the graph.
        kept: names of the layers that are left as they are.
    """
    for name, calls in model.calls((nn.Linear, nn.Conv2d)).items():
        if name in kept or len(calls) > 1:
            continue
        layer = model.get_submodule(name)
        if (found := _only_scale(model, calls[0], isinstance(layer, nn.Linear), layer.weight.shape[0])) is None:
            continue
        product, x, factors = found
        layer.weight = nn.Parameter(layer.weight * factors.reshape(-1, *[1] * (layer.weight.dim() - 1)), False)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias * factors, False)
        replace(product, x)


def _only_scale(
    model: GraphModel, call: fx.Node, is_linear: bool, channels: int
) -> tuple[fx.Node, fx.Node, Tensor] | None:
    """Return the multiplication behind a layer, its operand that is not constant, and the factors (channels,).

    Axes may be permuted between the layer and the multiplication.
    """
    node, rank = call, len(call.meta["shape"])
    axis = rank - 1 if is_linear else 1
    while len(node.users) == 1:
        [user] = node.users
        if user.target is aten.mul.Tensor and not user.kwargs:
            factors = _factors(model, user, node, axis - rank, channels)
            return None if factors is None else (user, node, factors)
        if user.target is not aten.permute.default:
            return None
        axis, node = [dim % rank for dim in user.args[1]].index(axis), user
    return None


def _factors(model: GraphModel, product: fx.Node, x: fx.Node, axis: int, channels: int) -> Tensor | None:
    """Return the other operand of a product with x, (channels,), if it is a constant that only varies along an axis."""
    other = product.args[1] if product.args[0] is x else product.args[0]
    if other is x or not isinstance(other, fx.Node) or other.op != "get_attr":
        return None
    factors = model.get_tensor(other.target)
    shape = [1] * max(factors.dim() + axis, 0) + [channels] + [1] * (-1 - axis)
    fits = list(factors.shape) in (shape, [1] * factors.dim()) and factors.dim() <= len(x.meta["shape"])
    fits = fits and factors.dtype == x.meta["dtype"]
    return factors.detach().flatten().expand(channels) if fits else None


def separate_calls(model: GraphModel) -> None:
    """Give calls of one module that depend on each other modules of their own, as long as this adds few weights.

    The smallest modules come first. A convolution that is applied to its own results may see ever larger values, which
    no single quantizer represents. Calls side by side, as of a head on several levels, stay calls of one module. So do
    those of recurrent networks, whose copies would multiply the model's size.
    """
    modules = {name: model.get_submodule(name) for name in model.calls(nn.Module)}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    left = _COPIES_SHARE * sum(sizes.values())
    for name, calls in sorted(model.calls(nn.Module).items(), key=lambda item: sizes[item[0]]):
        groups = _side_by_side(model, calls) if len(calls) > 1 else [calls]
        left -= sizes[name] * (len(groups) - 1)
        if left < 0:
            return
        for group in groups[1:]:
            parent, _, child = name.rpartition(".")
            copied = model.free_name(parent, f"{child}_repeat")
            model.set_module(copied, copy.deepcopy(modules[name]))
            for call in group:
                call.target = copied


def _side_by_side(model: GraphModel, calls: list[fx.Node]) -> list[list[fx.Node]]:
    """Return calls in groups that do not depend on each other, by how many of them lie on the way to a call."""
    own, depth = set(calls), dict[fx.Node, int]()
    for node in model.graph.nodes:
        depth[node] = max((depth[source] for source in node.all_input_nodes), default=0) + (node in own)
    groups: dict[int, list[fx.Node]] = {}
    for call in calls:
        groups.setdefault(depth[call], []).append(call)
    return list(groups.values())


def group_calls(model: GraphModel) -> None:
    """Move the calls of one module next to each other where they are independent (a head on several levels)."""
    order: list[fx.Node] = []
    placed: set[fx.Node] = set()

    def place(node: fx.Node) -> None:
        waiting = [node]
        while waiting:
            current = waiting[-1]
            missing = [source for source in current.all_input_nodes if source not in placed]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            if current not in placed:
                placed.add(current)
                order.append(current)

    siblings = {node: calls for calls in model.calls(nn.Module).values() if len(calls) > 1 for node in calls}
    for node in model.graph.nodes:
        if node not in placed and node in siblings:
            group = [call for call in siblings[node] if not _depends(call, node)]
            for source in [s for call in group for s in call.all_input_nodes]:
                place(source)
            for call in group:
                place(call)
        place(node)
    _reorder(model.graph, order)


def _depends(node: fx.Node, on: fx.Node) -> bool:
    seen, waiting = set(), [node] if node is not on else []
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source is on:
                return True
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return False


def _reorder(graph: fx.Graph, order: list[fx.Node]) -> None:
    last = next(iter(order))
    for node in order[1:]:
        last.append(node)
        last = node


def _functions(model: GraphModel, *targets: Any) -> list[fx.Node]:
    return [node for node in model.graph.nodes if node.op == "call_function" and node.target in targets]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.meta["shape"] is not None


def _is_activation(value: Any) -> bool:
    return _is_tensor(value) and value.op != "get_attr"


# The order matters: constants are computed before weights are looked for, and products are plain before they are named.
PASSES = (
    drop_assertions,
    drop_identities,
    expand_circular_padding,
    expand_embedding_bags,
    unify_bounds,
    compute_constants,
    expand_attention,
    expand_products,
    compute_constants,
    weights_to_linear,
    unify_convolutions,
    compute_constants,
    name_layers,
    name_operations,
    separate_calls,
    group_calls,
)
