"""Rotation of a transformer's residual stream, so that no channel has larger values than the others.

The stream x becomes x Q with an orthogonal Q (QuaRot, arXiv 2404.00456; SliceGPT, arXiv 2401.15024). Q disappears into
the weights of the layers that write the stream and of those that read it. Those papers turn LayerNorms into RMSNorms.
Here Q 1 = 1, so that the mean over channels stays what it is, and LayerNorm(x Q) = LayerNorm(x) Q for a LayerNorm
without weight and bias, which move into the Linears behind it. No operation is added.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from qwt2.capture.graph import GraphModel, Sum, replace
from qwt2.capture.wiring import moved_axis
from qwt2.errors import Qwt2Error

aten = torch.ops.aten
_SEED = 0  # of the signs


def rotated(model: GraphModel) -> GraphModel:
    """Return a copy of a captured model that computes the same with rotated residual streams.

    Raises:
        Qwt2Error: if a stream cannot be rotated, or there is none; the message names what reads or writes it.
    """
    model = copy.deepcopy(model)
    model.edit(rotate)
    return model


def rotate(model: GraphModel) -> None:
    """Rotate every residual stream in place; see :func:`rotated`."""
    fold_layer_scales(model)
    for stream in find_streams(model):
        q = rotation(stream.width)
        for norm, linears in stream.norms.items():
            _read_rotated(model.get_submodule(norm), [model.get_submodule(name) for name in linears], q)
        for name in stream.writers:
            _write_rotated(model.get_submodule(name), q)
        for name, axis in stream.constants.items():
            constant = model.get_tensor(name)
            constant.copy_(_times(constant.movedim(axis, -1), q).movedim(-1, axis))


def rotation(size: int) -> Tensor:
    """Return an orthogonal matrix Q with Q 1 = 1 that spreads every channel over all, float64 (size, size).

    Q = B diag(1, signs) B': half of the signs are negative, at random places. B is orthogonal, and its first column is
    constant: a Hadamard matrix of the largest power of two that divides the size, times (Kronecker) the cosine
    transform of the rest.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    angles = torch.arange(odd, dtype=torch.float64)
    basis = torch.cos(math.pi / odd * (angles[:, None] + 0.5) * angles) * math.sqrt(2 / odd)
    basis[:, 0] = odd**-0.5
    butterfly = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    while len(basis) < size:
        basis = torch.kron(butterfly, basis)
    signs = torch.ones(size, dtype=torch.float64)
    signs[1 + torch.randperm(size - 1, generator=torch.Generator().manual_seed(_SEED))[: size // 2]] = -1
    return basis * signs @ basis.T


def _times(values: Tensor, q: Tensor) -> Tensor:
    return (values.double() @ q.to(values.device)).to(values.dtype)


def _read_rotated(norm: nn.LayerNorm, linears: list[nn.Linear], q: Tensor) -> None:
    """Move a norm's weight and bias into the Linears that read it, and Q' in front of these."""
    for linear in linears:
        weight = linear.weight.double()
        if norm.bias is not None:
            _set_bias(linear, weight @ norm.bias.double() + (0 if linear.bias is None else linear.bias.double()))
        linear.weight.copy_(_times(weight if norm.weight is None else weight * norm.weight.double(), q))
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)
    norm.elementwise_affine = False


def _write_rotated(layer: nn.Linear | nn.Conv2d, q: Tensor) -> None:
    layer.weight.copy_(_times(layer.weight.movedim(0, -1), q).movedim(-1, 0))
    if layer.bias is not None:
        layer.bias.copy_(_times(layer.bias, q))


def _set_bias(layer: nn.Linear, bias: Tensor) -> None:
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)


def fold_layer_scales(model: GraphModel) -> None:
    """Fold the multiplication of a Linear's output by one constant per channel (LayerScale) into the Linear."""
    calls = model.calls(nn.Linear)
    for node in [node for node in model.graph.nodes if node.target is aten.mul.Tensor]:
        linear, scale = node.args
        if not isinstance(scale, fx.Node) or scale.op != "get_attr" or len(calls.get(linear.target, ())) != 1:
            continue
        if len(linear.users) == 1 and scale.meta["shape"] == linear.meta["shape"][-1:]:
            layer, factor = model.get_submodule(linear.target), model.get_tensor(scale.target)
            layer.weight.mul_(factor[:, None])
            if layer.bias is not None:
                layer.bias.mul_(factor)
            replace(node, linear)


@dataclass
class Stream:
    """A residual stream: values that additions and moves connect, with everything that writes and reads them.

    Attributes:
        width: number of channels.
        axes: node -> its channel axis.
        writers: names of the Linears and convolutions that write it.
        constants: names of the tensors that are added to it or joined with it -> channel axis.
        norms: LayerNorm -> Linears that read its output.
        obstacle: what else reads or writes it, as part of a sentence; "" if nothing does.
    """

    width: int
    axes: dict[fx.Node, int]
    writers: list[str] = field(default_factory=list)
    constants: dict[str, int] = field(default_factory=dict)
    norms: dict[str, list[str]] = field(default_factory=dict)
    obstacle: str = ""


def find_streams(model: GraphModel) -> list[Stream]:
    """Return the residual streams that LayerNorms read.

    Raises:
        Qwt2Error: if there is none, or one has other writers or readers than a rotation can reach.
    """
    streams: list[Stream] = []
    known: set[fx.Node] = set()
    for [call, *_] in model.calls(nn.LayerNorm).values():
        if call.args[0] not in known:
            stream = _stream_of(model, call.args[0])
            known |= stream.axes.keys()
            if any(isinstance(model.module_of(node), Sum) for node in stream.axes):
                streams.append(stream)
    for obstacle in [stream.obstacle for stream in streams if stream.obstacle]:
        raise Qwt2Error(
            f"{model.title} cannot be rotated: {obstacle}; a residual stream may be written only by linear layers and "
            "constants, and read only by LayerNorms in front of linear layers, so leave rotate out"
        )
    if not streams:
        raise Qwt2Error(f"{model.title} cannot be rotated: no LayerNorm reads a residual stream; leave rotate out")
    return streams


def _stream_of(model: GraphModel, start: fx.Node) -> Stream:
    """Return the stream that a LayerNorm's input belongs to, as far as it can be followed."""
    shape = start.meta["shape"]
    stream, waiting = Stream(shape[-1], {start: len(shape) - 1}), [start]
    while waiting:
        node = waiting.pop()
        for neighbour, axis in (*_sources(model, stream, node), *_readers(model, stream, node)):
            if axis is None or stream.axes.get(neighbour, axis) != axis:
                stream.obstacle = stream.obstacle or f"{_name(neighbour)} reads or writes its residual stream"
            elif neighbour not in stream.axes:
                stream.axes[neighbour] = axis
                waiting.append(neighbour)
    _check_constants(model, stream)
    return stream


def _sources(model: GraphModel, stream: Stream, node: fx.Node) -> Iterator[tuple[fx.Node, int | None]]:
    """Note a node that writes the stream; yield the nodes that another one takes it from, each with its axis."""
    axis, module = stream.axes[node], model.module_of(node)
    if node.op == "get_attr":
        stream.constants[str(node.target)] = axis
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        is_channel = axis == (1 if isinstance(module, nn.Conv2d) else len(node.meta["shape"]) - 1)
        if not is_channel or _runs_again(node):
            yield node, None
        stream.writers.append(str(node.target))
    else:
        sources = [source for source in node.all_input_nodes if source.meta["shape"] is not None]
        for source in sources:
            sizes = source.meta["shape"]
            found = [
                k for k in range(len(sizes)) if sizes[k] == stream.width and moved_axis(model, node, source, k) == axis
            ]
            yield (source, found[0]) if found else (node, None)
        if not sources:
            yield node, None


def _readers(model: GraphModel, stream: Stream, node: fx.Node) -> Iterator[tuple[fx.Node, int | None]]:
    """Note the LayerNorms that read a node; yield the other readers, each with its axis."""
    axis = stream.axes[node]
    for user in node.users:
        module = model.module_of(user)
        if user.op != "output" and user.meta["shape"] is None:
            continue  # the number of images
        if not isinstance(module, nn.LayerNorm):
            yield user, moved_axis(model, user, node, axis)
        elif axis != len(node.meta["shape"]) - 1 or _runs_again(user):
            yield user, None
        else:
            stream.norms[str(user.target)] = []
            for reader in _ends(model, user, len(user.meta["shape"]) - 1):
                if not isinstance(model.module_of(reader), nn.Linear) or _runs_again(reader):
                    yield reader, None
                stream.norms[str(user.target)].append(str(reader.target))


def _ends(model: GraphModel, node: fx.Node, axis: int) -> Iterator[fx.Node]:
    """Yield the nodes that read a norm's output behind moves: Linears on its channel axis, or others.

    Additions are no moves here, because the norm's bias moves past them.
    """
    for user in node.users:
        adds = isinstance(model.module_of(user), Sum) or user.target is aten.add.Tensor
        moved = moved_axis(model, user, node, axis) if len(user.all_input_nodes) == 1 and not adds else None
        is_last = axis == len(node.meta["shape"]) - 1
        if moved is not None:
            yield from _ends(model, user, moved)
        elif user.op == "output" or user.meta["shape"] is not None:
            yield user if is_last or not isinstance(model.module_of(user), nn.Linear) else node


def _runs_again(call: fx.Node) -> bool:
    return sum(node.op == "call_module" and node.target == call.target for node in call.graph.nodes) > 1


def _check_constants(model: GraphModel, stream: Stream) -> None:
    for node in model.graph.nodes:
        if node.op == "get_attr" and node.target in stream.constants and node not in stream.axes:
            stream.obstacle = stream.obstacle or f"{node.target} is used outside its residual stream too"


def _name(node: fx.Node) -> str:
    module = node.target if node.op in ("call_module", "get_attr") else node.meta.get("module")
    operation = getattr(node.target, "__name__", "").partition(".")[0] if node.op == "call_function" else ""
    return " in ".join(part for part in (operation, str(module or "")) if part) or f"the {node.op} of the network"
