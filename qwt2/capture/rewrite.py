"""Changes to a float model that keep its function: BatchNorm folding, and attention taken apart."""

from __future__ import annotations

import inspect
import itertools
import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from qwt2.errors import Qwt2Error
from qwt2.quantization.layers import QuantizedAdd, QuantizedMatmul, QuantizedModule
from qwt2.quantization.quantizers import Quantizer
from qwt2.capture.trace import Site, Trace

_MATMUL_FUNCTIONS = {torch.matmul, torch.bmm, operator.matmul}
_MATMUL_METHODS = {"matmul", "bmm", "__matmul__"}
_ADDITION_FUNCTIONS = {torch.add, operator.add, operator.iadd}
_ADDITION_METHODS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where ``model`` has the submodule ``name``, under every name that it has."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):  # named_children leaves second names out
            if module is old:
                setattr(parent, child, new)


def merge_parametrizations(model: nn.Module) -> None:
    """Make plain parameters of computed ones (weight norm, spectral norm), in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            # torch's remove_parametrizations would change the class, which copies of the model share.
            values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
            module.__class__ = type(module).__bases__[0]
            del module.parametrizations
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def fold_batchnorms(model: nn.Module, trace: Trace) -> None:
    """Fold every BatchNorm that alone reads a layer's output into that layer, in place.

    What the BatchNorm module did beside normalising (timm's BatchNormAct2d: drop and activation)
    stays in its place.
    """
    for layer_name, norm_name in trace.batchnorm_of.items():
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        if norm.running_mean is None:
            raise Qwt2Error(f"{norm_name}: BatchNorm without running statistics cannot be folded; train with them")
        fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        layer.weight, layer.bias = fuse(
            layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        rest = [child for child in norm.children() if not isinstance(child, nn.Identity)]
        replace_module(model, norm_name, nn.Sequential(*rest) if rest else nn.Identity())


class ShuffledConv2d(nn.Sequential):
    """A transposed convolution whose kernel is as large as its stride: a 1x1 convolution, and its channels spread out.

    Every output pixel has one input pixel, so that the layer is one plain product, which integer kernels exist for.
    """

    def __init__(self, layer: nn.ConvTranspose2d):
        size = layer.stride[0]
        conv = nn.Conv2d(layer.in_channels, layer.out_channels * size**2, 1, bias=layer.bias is not None)
        # (C_in, C_out, k, k) -> (C_out, k, k, C_in), the order in which PixelShuffle takes its channels.
        weight = layer.weight.detach().permute(1, 2, 3, 0).reshape(-1, layer.in_channels, 1, 1)
        conv.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        if layer.bias is not None:
            conv.bias = nn.Parameter(layer.bias.detach().repeat_interleave(size**2), requires_grad=False)
        super().__init__(conv, nn.PixelShuffle(size))


def expose_transposed_convolutions(model: nn.Module) -> dict[str, str]:
    """Replace every ``nn.ConvTranspose2d`` that can be by a :class:`ShuffledConv2d`, in place.

    Returns:
        Module name -> why it was left as it is.
    """
    left = {}
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ConvTranspose2d)]:
        if reason := _overlap(layer):
            left[name] = reason
        else:
            replace_module(model, name, ShuffledConv2d(layer).train(layer.training))
    return left


def _overlap(layer: nn.ConvTranspose2d) -> str:
    square = len({*layer.kernel_size, *layer.stride}) == 1
    plain = layer.groups == 1 and not any(layer.padding) and not any(layer.output_padding) and set(layer.dilation) == {1}
    return "" if square and plain else "a transposed convolution whose kernel differs from its stride, padded or grouped, stays in float"


# Of an addition: "quantized", "clipped" to the grid's range, or ``None``, as it is.
Operands = tuple[str | None, str | None]


class PendingOperand(Quantizer):
    """Stands for the quantizer of an operand until a PTQ method chooses one.

    Args:
        is_softmax: the operand is a softmax's output.
        clips: the quantizer is only to clip.
    """

    def __init__(self, is_softmax: bool = False, clips: bool = False):
        super().__init__()
        self.is_softmax, self.clips = is_softmax, clips


@dataclass
class Exposed:
    """What :func:`expose_operations` found.

    Attributes:
        matmuls, additions: names of the new modules in execution order.
        skipped: module name -> reason, for those whose forward cannot be rewritten; these stay in float.
    """

    matmuls: list[str] = field(default_factory=list)
    additions: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def expose_operations(model: nn.Module, trace: Trace, additions: Mapping[str, list[Operands]]) -> Exposed:
    """Make every product of activations a :class:`QuantizedMatmul` module of its own, in place.

    The forward method of each module that multiplies activations, ``model`` itself included, is
    rewritten with ``torch.fx`` (its children stay as they are): ``a @ b`` becomes a call of
    ``matmul1``, ``matmul2``, ...; ``scaled_dot_product_attention`` is taken apart into scaling,
    product, mask, softmax and product.

    Args:
        additions: site name -> for each of its additions, what becomes of its operands; those of which one is
            quantized or clipped become :class:`QuantizedAdd` modules ``add1``, ``add2``, ...
    """
    exposed = Exposed()
    for name, site in trace.sites.items():
        added = additions.get(name, [])
        if not site.products and not any(map(any, added)):
            continue
        module = model.get_submodule(name)
        try:
            rewritten = _rewrite(module, site, added)
        except Exception as error:  # fx raises whatever the traced code raises on a proxy
            exposed.skipped[name] = f"its forward method cannot be traced ({str(error).splitlines()[0][:120]})"
            continue
        for child in _adopt(module, rewritten):
            kind = exposed.matmuls if isinstance(module.get_submodule(child), QuantizedMatmul) else exposed.additions
            kind.append(f"{name}.{child}".lstrip("."))
    return exposed


class _ChildrenAreLeaves(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def _rewrite(module: nn.Module, site: Site, additions: list[Operands]) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fx says that it cannot check the constants
        graph = _ChildrenAreLeaves().trace(module, concrete_args=site.constants)
    _restore_signature(graph, module)
    rewritten = fx.GraphModule(module, graph)
    _expose_additions(graph, rewritten, additions)
    masks = iter(site.masks)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            _decompose_attention(graph, node, next(masks))
    for node, child in zip([n for n in graph.nodes if _is_matmul(n)], _free_names(module, "matmul")):
        is_softmax = _comes_from_softmax(rewritten, node.args[0])
        rewritten.add_submodule(child, QuantizedMatmul(PendingOperand(is_softmax), PendingOperand()))
        _call_instead(graph, node, child)
    graph.eliminate_dead_code()
    rewritten.recompile()
    return rewritten


def _expose_additions(graph: fx.Graph, rewritten: fx.GraphModule, additions: list[Operands]) -> None:
    nodes = [node for node in graph.nodes if _is_addition(node)]
    if len(nodes) != len(additions):  # it also adds numbers, say sizes: which is which cannot be told
        return
    residual = [(node, operands) for node, operands in zip(nodes, additions) if any(operands)]
    for (node, operands), child in zip(residual, _free_names(rewritten, "add")):
        pending = (kind and PendingOperand(clips=kind == "clipped") for kind in operands)
        rewritten.add_submodule(child, QuantizedAdd(*pending))
        _call_instead(graph, node, child)


def _free_names(module: nn.Module, stem: str) -> Iterator[str]:
    return (f"{stem}{number}" for number in itertools.count(1) if not hasattr(module, f"{stem}{number}"))


def _call_instead(graph: fx.Graph, node: fx.Node, child: str) -> None:
    """Let a child module compute what a node does from its first two arguments."""
    with graph.inserting_before(node):
        call = graph.call_module(child, node.args[:2])
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _adopt(module: nn.Module, rewritten: fx.GraphModule) -> list[str]:
    """Give ``module`` the rewritten forward method and the products it calls; returns their names.

    The object stays what it was, with all its children, attributes and methods; a class of its own
    overrides the method, so that copies have it too.
    """
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": type(rewritten).forward, "__module__": kind.__module__})
    for name, buffer in rewritten.named_buffers(recurse=False):  # tensors that the forward method makes
        if not hasattr(module, name):
            module.register_buffer(name, buffer)
    children = [name for name, child in rewritten.named_children() if isinstance(child, QuantizedModule) and name not in module._modules]
    for name in children:
        module.add_module(name, rewritten.get_submodule(name))
    return children


def _restore_signature(graph: fx.Graph, module: nn.Module) -> None:
    """Give the graph the parameters of the forward method, in its order.

    fx renames the parameters it specialized to a constant and adds assertions on them, which an
    exported graph must not hold.
    """
    parameters = inspect.signature(module.forward).parameters
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.target not in parameters]:
        _erase_with_users(graph, node)
    placeholders = {node.target: node for node in graph.nodes if node.op == "placeholder"}
    previous = None
    for name, parameter in parameters.items():
        node = placeholders.get(name)
        if node is None:
            default = None if parameter.default is inspect.Parameter.empty else parameter.default
            after = graph.inserting_after(previous) if previous else graph.inserting_before()
            with after:
                node = graph.placeholder(name, default_value=default)
        previous = node


def _erase_with_users(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(graph, user)
    graph.erase_node(node)


def _is_matmul(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _MATMUL_FUNCTIONS
    return node.op == "call_method" and node.target in _MATMUL_METHODS


def _is_addition(node: fx.Node) -> bool:
    known = {"call_function": _ADDITION_FUNCTIONS, "call_method": _ADDITION_METHODS}.get(node.op, ())
    # Scaled additions (`alpha=`) and those to a number are something else.
    return node.target in known and len(node.args) == 2 and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)


def _comes_from_softmax(module: nn.Module, node: Any) -> bool:
    """Whether a value is a softmax's output, through dropout, casts and reshapes."""
    while isinstance(node, fx.Node):
        target = node.target
        if node.op == "call_module":
            child = module.get_submodule(target)
            if isinstance(child, nn.Softmax):
                return True
            if not isinstance(child, (nn.Dropout, nn.Identity)):
                return False
        elif target in ("softmax", F.softmax, torch.softmax):
            return True
        elif target not in ("to", "type_as", "view", "reshape", "contiguous", F.dropout):
            return False
        node = node.args[0]
    return False


def _decompose_attention(graph: fx.Graph, node: fx.Node, mask_dtype: torch.dtype | None) -> None:
    """Replace one ``scaled_dot_product_attention`` call by the operations of its documentation."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args)) | dict(node.kwargs)
    if given.get("is_causal") or given.get("enable_gqa"):
        raise NotImplementedError("causal or grouped-query attention")
    query, key, value, mask = (given.get(n) for n in names[:4])
    with graph.inserting_before(node):
        scale = given.get("scale")
        if scale is None:
            width = graph.call_method("size", (query, -1))
            scale = graph.call_function(operator.pow, (width, -0.5))
        # Scaling the query costs less than scaling the scores, and folds into its projection.
        query = graph.call_function(operator.mul, (query, scale))
        scores = graph.call_function(operator.matmul, (query, graph.call_method("transpose", (key, -2, -1))))
        if mask_dtype is torch.bool:
            blocked = graph.call_function(torch.logical_not, (mask,))
            scores = graph.call_method("masked_fill", (scores, blocked, float("-inf")))
        elif mask_dtype is not None:
            scores = graph.call_function(operator.add, (scores, mask))
        weights = graph.call_function(F.softmax, (scores,), {"dim": -1})
        result = graph.call_function(operator.matmul, (weights, value))
    node.replace_all_uses_with(result)
    graph.erase_node(node)
