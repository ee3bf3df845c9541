"""The passes over a captured graph: each alone is exact, and what they are for is done behind them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qwt2 import quantize
from qwt2.capture.graph import Pooling, Product, Sum
from qwt2.capture.normalise import (
    compute_constants,
    drop_assertions,
    drop_identities,
    expand_attention,
    expand_products,
    fold_batchnorms,
    fold_scales,
    group_calls,
)
from tests.support.graphs import Calling, assert_same, kinds, operations, pass_after_pass, raw
from tests.support.tiny_models import BUILDERS, captured, dense, images, mlp, pyramid, randomize

pytestmark = pytest.mark.slow


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameter(*shape: int, seed: int = 1) -> nn.Parameter:
    return nn.Parameter(random(*shape, seed=seed), requires_grad=False)


@pytest.mark.parametrize("build", [*BUILDERS.values(), dense, pyramid, mlp])
def test_whole_networks_keep_their_function_through_every_pass(build):
    pass_after_pass(build(), images(5))


def test_checks_copies_and_casts_to_the_same_type_are_dropped():
    def forward(self, x):
        y = x.contiguous().clone().to(torch.float32).view(len(x), -1)[:, :]
        torch._assert(y.shape[1] == 12 * 16, "size")
        return F.dropout(F.pad(y, (0, 0)), 0.5, self.training).detach() * 2

    graph = pass_after_pass(Calling(forward), random(5, 12, 16), (drop_assertions, drop_identities))
    assert operations(graph) == ["sym_size", "reshape", "mul"]


def test_slices_and_casts_that_change_something_are_kept():
    def forward(self, x):
        return x[:, 1:], x[:, :3], x[:, ::2], x.to(torch.float64), x.to(torch.int64), F.pad(x, (1, -1)), x[:, -3:]

    pass_after_pass(Calling(forward), random(5, 6, 4))


def test_views_take_tensors_of_any_layout():
    """A convolution in channels-last order gives a tensor that `view` refuses, though the captured one was as it wants."""
    graph = pass_after_pass(Calling(lambda self, x: (x * 2).view(len(x), 12)), random(5, 3, 2, 2))
    other = random(5, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    assert torch.equal(graph(other), (other * 2).reshape(5, 12))


# Constants.


def test_what_follows_from_constants_is_computed_once():
    def forward(self, x):
        mask = torch.arange(6)[None, :] <= torch.arange(6)[:, None]
        weight = (self.w - self.w.mean()) / self.w.std()
        return F.linear(x, weight) * mask.float().sum(0)

    graph = pass_after_pass(Calling(forward, w=parameter(6, 4)), random(5, 3, 4), (drop_assertions, drop_identities, compute_constants))
    assert operations(graph) == ["linear", "mul"]


def test_random_numbers_are_no_constants():
    graph = raw(Calling(lambda self, x: x + torch.rand(4) + torch.randn_like(self.w), w=parameter(4)), random(2, 4))
    compute_constants(graph)
    graph.prune()
    assert {"rand", "randn_like"} <= set(operations(graph)) and not torch.equal(graph(random(2, 4)), graph(random(2, 4)))


def test_large_tensors_that_follow_from_small_ones_are_not_stored():
    """A table of 599 biases looked up 90,000 times would make the file grow by all of them."""

    def forward(self, x):
        index = torch.arange(300)[:, None] - torch.arange(300)[None, :] + 299
        return x + self.table[index.flatten()].view(300, 300)

    graph = pass_after_pass(Calling(forward, table=parameter(599)), random(3, 300, 300))
    assert sum(tensor.numel() for tensor in graph.state_dict().values()) < 2**16


# Attention.


def mask_of(kind: str, rows: int, columns: int):
    if kind == "bool":
        return torch.ones(rows, columns, dtype=torch.bool).tril(1)
    if kind == "a query without keys":
        return torch.ones(rows, columns, dtype=torch.bool).tril(-1)
    if kind == "float without keys":
        return torch.zeros(rows, columns).masked_fill(torch.ones(rows, columns, dtype=torch.bool).triu(), -torch.inf)
    return random(rows, columns, seed=9) if kind == "float" else None


@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal", "a query without keys", "float without keys"])
@pytest.mark.parametrize("key_heads, keys, scale", [(4, 6, 0.3), (4, 9, None), (2, 6, 0.3), (1, 5, None)])
def test_fused_attention_is_expanded_exactly(kind, key_heads, keys, scale):
    """Grouped queries too; PyTorch's own kernel is the other side."""
    mask = mask_of(kind, 6, keys)

    def forward(self, x):
        q, k = self.q(x).unflatten(-1, (4, 3)).transpose(1, 2), self.k(x).unflatten(-1, (4, 3)).transpose(1, 2)
        k = torch.cat([k, k], 2)[:, :key_heads, :keys]
        return F.scaled_dot_product_attention(
            q, k, k.flip(-1), attn_mask=self.mask, is_causal=kind == "causal", scale=scale, enable_gqa=key_heads < 4
        )

    model = Calling(forward, q=nn.Linear(8, 12), k=nn.Linear(8, 12), mask=mask)
    graph = pass_after_pass(model, random(3, 6, 8))
    assert "scaled_dot_product_attention" not in operations(graph) and operations(graph).count("softmax") == 1
    assert list(kinds(graph).values()).count("Product") == 2


@pytest.mark.parametrize("as_float", [False, True])
def test_masks_that_depend_on_the_input_may_leave_a_query_without_keys(as_float):
    """PyTorch's kernel gives such a query zeros; a plain softmax would give it NaN."""

    def forward(self, x):
        seen = (x[:, :, 0] > 0)[:, None, :].expand(-1, 6, -1)
        mask = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf) if as_float else seen
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x = random(5, 6, 8)
    x[2, :, 0] = -1
    graph = pass_after_pass(Calling(forward), x)
    assert torch.equal(graph(x)[2], torch.zeros(6, 8))


# Products.

EINSUMS = [
    ("bij,bjk->bik", (5, 3, 4), (5, 4, 6)), ("bij,bkj->bik", (5, 3, 4), (5, 6, 4)), ("blhd,bmhd->bhlm", (5, 3, 2, 4), (5, 6, 2, 4)),
    ("bhlm,bmhd->blhd", (5, 2, 3, 6), (5, 6, 2, 4)), ("bqc,bchw->bqhw", (5, 3, 4), (5, 4, 2, 6)),
    ("bchw,bkcp->bkhwp", (5, 3, 4, 2), (5, 6, 3, 2)), ("bhwc,bhkc->bhwk", (5, 2, 3, 4), (5, 2, 6, 4)),
    ("bi,bi->b", (5, 4), (5, 4)), ("bij,bj->bi", (5, 3, 4), (5, 4)), ("bj,bij->bi", (5, 4), (5, 3, 4)),
    ("bijk,bjkl->bil", (5, 3, 2, 4), (5, 2, 4, 6)), ("bij,bkj->bki", (5, 3, 4), (5, 6, 4)), ("b i j, b j k -> b i k", (5, 3, 4), (5, 4, 6)),
    ("bij,bkl->bijkl", (5, 3, 4), (5, 2, 6)), ("bij,bij->bij", (5, 3, 4), (5, 3, 4)), ("bij,bjk->ik", (5, 3, 4), (5, 4, 6)),
    ("bii,bik->bk", (5, 3, 3), (5, 3, 4)), ("...ij,...jk->...ik", (5, 2, 3, 4), (5, 2, 4, 6)), ("bij,bjk", (5, 3, 4), (5, 4, 6)),
]  # fmt: skip


@pytest.mark.parametrize("equation, a, b", EINSUMS)
def test_einsum_of_two_activations_is_a_product(equation, a, b):
    parts = {"a": random(*a), "b": random(*b, seed=2)}
    model = TwoInputs(lambda a, b: torch.einsum(equation, a * 1.5, b * 0.5))
    graph = pass_after_pass(model, parts)
    spreads = equation.startswith(("bij,bkl", "bij,bij", "bij,bjk->ik", "bii", "...")) or "->" not in equation
    assert spreads or (list(kinds(graph).values()) == ["Product"] and "einsum" not in operations(graph))


class TwoInputs(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, a, b):
        return self.function(a, b)


@pytest.mark.parametrize(
    "equation, x, w",
    [
        ("bld,de->ble", (5, 3, 4), (4, 6)), ("bld,ed->ble", (5, 3, 4), (6, 4)), ("de,bld->ble", (5, 3, 4), (4, 6)),
        ("bchw,co->bohw", (5, 4, 2, 3), (4, 6)), ("blhd,hdo->blo", (5, 3, 2, 4), (2, 4, 6)), ("bld,dhk->blhk", (5, 3, 4), (4, 2, 6)),
        ("bi,io->bo", (5, 4), (4, 6)), ("bld,deh->bhle", (5, 3, 4), (4, 6, 2)), ("bld,d->bl", (5, 3, 4), (4,)),
        ("bhld,hde->bhle", (5, 2, 3, 4), (2, 4, 6)), ("btnc,nck->btnk", (5, 3, 2, 4), (2, 4, 6)),
    ],
)  # fmt: skip
def test_einsum_with_a_constant_is_a_layer(equation, x, w):
    first = equation.partition(",")[0] == "de"
    model = Calling(lambda self, x: torch.einsum(equation, *((self.w, x * 2) if first else (x * 2, self.w))), w=parameter(*w))
    graph = pass_after_pass(model, random(*x))
    # A matrix for each head is no layer's weight.
    heads = equation in ("bhld,hde->bhle", "btnc,nck->btnk")
    assert heads or (list(kinds(graph).values()) == ["Linear"] and "einsum" not in operations(graph))


@pytest.mark.parametrize("product", [torch.matmul, torch.bmm, lambda a, b: a @ b])
def test_products_of_activations_are_named(product):
    model = TwoInputs(lambda a, b: product(a.relu(), b.sigmoid()))
    graph = pass_after_pass(model, {"a": random(5, 3, 4), "b": random(5, 4, 6)})
    assert kinds(graph) == {"matmul1": "Product"} and operations(graph) == ["relu", "sigmoid"]


@pytest.mark.parametrize("alpha", [1, 0.5, 0])
@pytest.mark.parametrize("beta", [1, 2.0, 0])
def test_added_products_are_a_product_and_a_sum(alpha, beta):
    model = TwoInputs(lambda a, b: torch.baddbmm(a @ b, a.relu(), b, alpha=alpha, beta=beta))
    graph = pass_after_pass(model, {"a": random(5, 3, 4), "b": random(5, 4, 6)})
    assert "baddbmm" not in operations(graph) and list(kinds(graph).values()).count("Product") == (1 if beta == 0 else 2)


@pytest.mark.parametrize("alpha, beta", [(1, 1), (0.5, 1), (1, 2.0), (0.5, 0)])
def test_addmm_with_a_weight_is_a_linear(alpha, beta):
    model = Calling(lambda self, x: torch.addmm(self.b, x, self.w, alpha=alpha, beta=beta), w=parameter(4, 6), b=parameter(6))
    graph = pass_after_pass(model, random(5, 4))
    assert list(kinds(graph).values()) == ["Linear"] and "addmm" not in operations(graph)
    if (alpha, beta) == (1, 1):
        assert operations(graph) == [] and torch.equal(graph.linear1.bias, model.b)


@pytest.mark.parametrize(
    "function, has_bias",
    [
        (lambda s, x: x @ s.w + s.b, True), (lambda s, x: s.b + x @ s.w, True), (lambda s, x: torch.mm(x[:, 0], s.w) + s.b, True),
        (lambda s, x: x @ s.w, False), (lambda s, x: F.linear(x, s.w.t()), False), (lambda s, x: F.linear(x, s.w.t(), s.b), True),
        (lambda s, x: torch.add(x @ s.w, s.b, alpha=2), False), (lambda s, x: x @ s.w - s.b, False),
        (lambda s, x: x @ s.w + s.b.sum(), False), (lambda s, x: (x @ s.w) * (x @ s.w + s.b), None),
        (lambda s, x: (y := x @ s.w) + s.b + y, False), (lambda s, x: x @ s.w + s.rows, False),
    ],
)  # fmt: skip
def test_weights_times_activations_are_linears_with_the_bias_behind(function, has_bias):
    model = Calling(function, w=parameter(4, 6), b=parameter(6), rows=parameter(3, 6))
    graph = pass_after_pass(model, random(5, 3, 4))
    layers = [graph.get_submodule(name) for name, kind in kinds(graph).items() if kind == "Linear"]
    assert layers and "matmul" not in operations(graph)
    assert has_bias is None or [layer.bias is not None for layer in layers] == [has_bias]


@pytest.mark.parametrize(
    "function",
    [lambda s, x: s.w.t()[:4, :3] @ x, lambda s, x: x @ s.w[:, 0], lambda s, x: x @ s.heads, lambda s, x: torch.tensordot(x, s.w, 1)],
)  # fmt: skip
def test_other_products_with_constants_keep_their_function(function):
    pass_after_pass(Calling(function, w=parameter(4, 6), heads=parameter(5, 4, 2)[:1].clone()), random(5, 3, 4))


# Convolutions.


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, (3, 2)])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_padding_by_name_is_padding_by_numbers(kernel, dilation, mode):
    """An even kernel wants one more row at the end than at the start."""
    model = randomize(nn.Conv2d(4, 6, kernel, padding="same", dilation=dilation, groups=2, padding_mode=mode))
    graph = pass_after_pass(nn.Sequential(model), random(3, 4, 12, 11))
    assert kinds(graph) == {"0": "Conv2d"} and all(isinstance(p, int) for p in graph.get_submodule("0").padding)


def test_valid_padding_by_name():
    pass_after_pass(nn.Sequential(nn.Conv2d(4, 6, 3, padding="valid", stride=2), nn.Conv2d(6, 6, 3)), random(3, 4, 12, 11))


@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}, {"groups": 2, "bias": False}, {"padding": "same"},
     {"padding": "same", "kernel_size": 4}, {"padding": "valid"}, {"padding": 1, "padding_mode": "reflect"}],
)  # fmt: skip
def test_one_dimensional_convolutions_are_two_dimensional_ones(settings):
    conv = randomize(nn.Conv1d(4, 6, **({"kernel_size": 3} | settings)))
    graph = pass_after_pass(nn.Sequential(conv, nn.ReLU()), random(3, 4, 12))
    assert kinds(graph) == {"0": "Conv2d"} and not any(name.startswith("conv") for name in operations(graph))


@st.composite
def transposed(draw):
    """A transposed convolution that PyTorch accepts: output padding is smaller than the stride."""
    pair = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(2))  # noqa: E731
    kernel, stride = pair(1, 5), pair(1, 3)
    extra = tuple(draw(st.integers(0, s - 1)) for s in stride)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    groups = draw(st.sampled_from([1, 2]))
    return dict(kernel_size=kernel, stride=stride, padding=padding, output_padding=extra, groups=groups, bias=draw(st.booleans()))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(transposed())
def test_transposed_convolutions_are_convolutions_and_pixel_shuffles(settings):
    graph = pass_after_pass(nn.Sequential(randomize(nn.ConvTranspose2d(4, 6, **settings))), random(3, 4, 5, 6))
    (reach,) = {
        all(-(-k // s) * s >= k - p + e for k, s, p, e in zip(*(settings[n] for n in ("kernel_size", "stride", "padding", "output_padding"))))
    }
    assert kinds(graph) == ({"0": "Conv2d"} if reach else {}) and ("conv_transpose2d" in operations(graph)) == (not reach)


@pytest.mark.parametrize("kernel, stride, padding, extra", [(2, 2, 0, 0), (4, 2, 1, 0), (3, 2, 1, 1), (3, 1, 1, 0), (5, 3, 2, 1), (1, 1, 0, 0)])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_dimensional_transposed_convolutions(kernel, stride, padding, extra, groups):
    conv = randomize(nn.ConvTranspose1d(4, 6, kernel, stride, padding, extra, groups))
    graph = pass_after_pass(nn.Sequential(conv, nn.ReLU()), random(3, 4, 7))
    assert kinds(graph) == {"0": "Conv2d"}


def test_dilated_transposed_convolutions_stay_what_they_are():
    graph = pass_after_pass(nn.Sequential(randomize(nn.ConvTranspose2d(4, 6, 3, dilation=2))), random(3, 4, 5, 5))
    assert kinds(graph) == {} and operations(graph) == ["conv_transpose2d"]


def test_kernels_that_are_activations_are_no_layers():
    """Correlation of an image with a kernel that another image gives."""

    def forward(self, x):
        kernel = self.conv(x).mean(0, keepdim=True)[:, :, :3, :3]
        return F.conv2d(x, kernel), F.conv1d(x.flatten(2), kernel.flatten(2)), F.conv_transpose2d(x[:, :1], kernel)

    graph = pass_after_pass(Calling(forward, conv=randomize(nn.Conv2d(3, 3, 3))), random(2, 3, 8, 8))
    assert kinds(graph) == {"conv": "Conv2d"}


# Names.


def test_layers_have_the_names_of_the_modules_they_come_from():
    def forward(self, x):
        return self.norm(F.linear(self.fc(x), self.own.weight, self.own.bias)) + F.layer_norm(x, (4,)) + self.fc2(x)

    own = nn.Linear(4, 4)
    model = randomize(Calling(forward, fc=nn.Linear(4, 4), own=own, norm=nn.LayerNorm(4), fc2=nn.Sequential(nn.Linear(4, 4))))
    graph = pass_after_pass(model, random(5, 3, 4))
    named = {n: k for n, k in kinds(graph).items() if k in ("Linear", "LayerNorm")}
    assert named == {"fc": "Linear", "own": "Linear", "norm": "LayerNorm", "layer_norm1": "LayerNorm", "fc2.0": "Linear"}


def test_a_layer_called_twice_is_one_module_and_tied_ones_are_two():
    def forward(self, x):
        return self.a(self.a(x)) + self.b(x) + F.linear(x, self.a.weight.t())

    model = randomize(Calling(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)))
    model.b.weight = model.a.weight
    graph = pass_after_pass(model, random(5, 3, 4))
    assert [kinds(graph)[name] for name in ("a", "b")] == ["Linear", "Linear"] and len(graph.calls(nn.Linear)["a"]) == 2
    with torch.no_grad():
        graph.a.weight.zero_()  # quantization changes a layer's weight; nothing else may see that
    assert torch.equal(graph.b.weight, model.b.weight) and graph(random(5, 3, 4)).abs().max() > 0.1


class Scaled(nn.Linear):
    """A layer with more parameters than a layer has."""

    def __init__(self, width: int):
        super().__init__(width, width)
        self.scale, self.a, self.b = parameter(width), parameter(2, width), parameter(width, 2)

    def forward(self, x):
        return super().forward(x) * self.scale + x @ self.a.t() @ self.b.t()


class PoweredMean(nn.Module):
    """GeM: a pooling with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x):
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


class PooledKernel(nn.Module):
    """A layer and a pooling in one module without children."""

    def __init__(self):
        super().__init__()
        self.weight = parameter(4, 3, 3, 3)

    def forward(self, x):
        return F.conv2d(x, self.weight).mean((2, 3))


class TwoMeans(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) + F.adaptive_avg_pool2d(x * x, 1).flatten(1)


@pytest.mark.parametrize("leaf, shape", [(Scaled(4), (5, 4)), (PoweredMean(), (5, 4, 3, 3)), (PooledKernel(), (5, 3, 8, 8)), (TwoMeans(), (5, 4, 3, 3))])
def test_modules_without_children_that_do_more_than_one_thing(leaf, shape):
    graph = pass_after_pass(nn.Sequential(nn.Identity(), leaf), random(*shape))
    assert all(name.startswith("1") for name in kinds(graph))


def test_operations_of_one_module_are_shared_by_its_calls_if_they_are_the_same():
    """A mean that keeps its axes is not one that does not."""

    def inner(self, x, keep):
        return self.act(x).mean((2, 3), keepdim=keep)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        forward = inner

    def forward(self, x):
        return (x * self.m(x, True)).amax((2, 3)) + self.m(x, False) + self.m(x + 1, False)

    graph = pass_after_pass(Calling(forward, m=Mean()), random(5, 3, 4, 4))
    assert [len(calls) for name, calls in graph.calls(Pooling).items()] == [1, 2]


def test_operations_take_no_name_that_something_has():
    def forward(self, x):
        return self.matmul1(x @ x.transpose(1, 2)) + self.add1(x.relu() @ x.relu().transpose(1, 2))

    graph = pass_after_pass(randomize(Calling(forward, matmul1=nn.Linear(4, 4), add1=nn.Linear(4, 4))), random(5, 4, 4))
    found = kinds(graph)
    assert found["matmul1"] == found["add1"] == "Linear" and sorted(found.values()) == ["Linear"] * 2 + ["Product"] * 2 + ["Sum"]


def test_only_sums_of_activations_of_one_shape_are_named():
    def forward(self, x):
        return (x + x.relu()) + x[:, :1] + self.row + 1.0 + torch.add(x, x, alpha=3)

    graph = pass_after_pass(Calling(forward, row=parameter(4)), random(5, 3, 4))
    assert len(graph.calls(Sum)) == 2 and operations(graph).count("add") == 4


# BatchNorm.


def folded(model: nn.Module, x: torch.Tensor):
    """The graph behind `fold_batchnorms`, and how many BatchNorms it still holds."""
    graph = pass_after_pass(randomize(model), x)
    graph.edit(fold_batchnorms)
    assert_same(graph, model, x)
    return graph, sum("batch_norm" in name for name in operations(graph))


class Block(nn.Module):
    def __init__(self, forward, norm=nn.BatchNorm2d, **parts):
        super().__init__()
        self.conv, self.other, self.bn, self.run = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1, bias=False), norm(3), forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.run(self, x)


@pytest.mark.parametrize(
    "forward, left",
    [
        (lambda s, x: s.bn(s.conv(x)), 0),
        (lambda s, x: s.bn(s.conv(x)) + s.bn(s.other(x)), 0),  # one BatchNorm behind two convolutions
        (lambda s, x: s.bn(s.conv(x)) + s.bn(s.conv(x + 1)), 0),  # both run twice
        (lambda s, x: s.bn(s.conv(x)) + s.conv(x + 1), 1),  # the convolution's other call has none
        (lambda s, x: s.bn(y := s.conv(x)) + y, 1),  # a second reader
        (lambda s, x: s.bn(s.conv(x)) + s.bn(x), 1),  # a BatchNorm behind no convolution
        (lambda s, x: s.bn(s.conv(x).relu()), 1),  # something between
        (lambda s, x: s.bn2(s.bn(s.conv(x))), 1),  # the second reads no layer
        (lambda s, x: s.bn(s.conv(x)) + s.bn2(s.conv(x)), 2),  # one convolution before two BatchNorms
        (lambda s, x: s.bn(s.fc(x)), 1),  # a Linear's channels are the last axis
    ],
)  # fmt: skip
def test_batchnorms_are_folded_where_they_alone_read_a_layer(forward, left):
    model = Block(forward, bn2=nn.BatchNorm2d(3), fc=nn.Linear(3, 3))
    assert folded(model, random(5, 3, 3, 3))[1] == left


@pytest.mark.parametrize(
    "forward, left",
    [
        (lambda s, x: x + s.conv(x) * s.scale.reshape(1, -1, 1, 1), 0),
        (lambda s, x: x + s.scale.reshape(-1, 1, 1) * s.other(x), 0),  # of either side, and without a bias
        (lambda s, x: s.scale * s.fc(x), 0),
        (lambda s, x: s.scale.reshape(-1, 1, 1) * s.fc(x).permute(0, 3, 1, 2), 0),  # ConvNeXt's order
        (lambda s, x: s.one * s.conv(x), 0),
        (lambda s, x: s.bn(s.conv(x)) * s.scale.reshape(-1, 1, 1), 0),  # behind a folded BatchNorm
        (lambda s, x: s.conv(x) * s.scale, 1),  # varies along the width
        (lambda s, x: s.fc(x).permute(0, 3, 1, 2) * s.scale, 1),
        (lambda s, x: (y := s.conv(x)) * s.scale.reshape(-1, 1, 1) + y, 1),  # a second reader
        (lambda s, x: s.conv(x).relu() * s.scale.reshape(-1, 1, 1), 1),  # something between
        (lambda s, x: s.conv(x) * s.scale.reshape(-1, 1, 1) + s.conv(x + 1), 1),  # the other call has none
        (lambda s, x: s.conv(x) * s.scale.double().reshape(-1, 1, 1), 1),  # makes another type
        (lambda s, x: s.conv(x) * s.conv(x + 1), 1),  # no constant
    ],
)  # fmt: skip
def test_constant_scales_are_folded_where_they_alone_read_a_layer(forward, left):
    model = Block(forward, fc=nn.Linear(3, 3))
    model.scale, model.one = parameter(3), nn.Parameter(torch.tensor(1.5), requires_grad=False)
    graph = pass_after_pass(randomize(model), random(5, 3, 3, 3))
    graph.edit(fold_batchnorms)
    graph.edit(fold_scales)
    assert_same(graph, model, random(5, 3, 3, 3))
    assert operations(graph).count("mul") == left


@pytest.mark.parametrize("settings", [{"affine": False}, {"eps": 0.1}])
def test_batchnorms_of_any_settings_are_folded(settings):
    assert folded(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, **settings)), random(5, 3, 6, 6))[1] == 0


def test_batchnorms_without_statistics_are_normalizations_of_the_batch_and_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    graph = pass_after_pass(model, random(2, 3, 6, 6))
    graph.edit(fold_batchnorms)
    assert_same(graph, model, random(2, 3, 6, 6))
    assert_same(graph, model, random(5, 3, 6, 6))


@pytest.mark.parametrize("shape, left", [((5, 4), 0), ((5, 6, 4), 1)])
def test_a_linear_s_batchnorm_is_folded_where_it_has_the_linear_s_channels(shape, left):
    norm = nn.BatchNorm1d(6)
    assert folded(nn.Sequential(nn.Linear(4, 6, bias=False), norm, nn.ReLU()), random(*shape))[1] == left


def test_batchnorms_behind_converted_convolutions_keep_their_function():
    folded(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), random(5, 3, 8))
    folded(nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4)), random(5, 3, 4, 4))
    folded(nn.Sequential(nn.Conv2d(3, 4, 2, padding="same"), nn.BatchNorm2d(4)), random(5, 3, 4, 4))


# The order of calls.


def positions(graph, name):
    order = list(graph.graph.nodes)
    return [order.index(call) for call in graph.calls(nn.Module)[name]]


def test_calls_that_do_not_need_each_other_follow_each_other():
    """A head on a pyramid's levels: in the model, each level's own layer runs between the head's calls."""

    def forward(self, x):
        levels = [x, F.max_pool2d(x, 2), F.max_pool2d(x, 4)]
        return [self.head(layer(level)) for layer, level in zip((self.a, self.b, self.c), levels)]

    model = Calling(forward, head=nn.Conv2d(4, 2, 1), **{name: nn.Conv2d(3, 4, 3, padding=1) for name in "abc"})
    graph = pass_after_pass(randomize(model), random(5, 3, 8, 8))
    first, second, third = positions(graph, "head")
    assert (second, third) == (first + 1, first + 2)
    assert list(graph.calls(nn.Conv2d)) == ["a", "b", "c", "head"]


def test_calls_that_need_each_other_keep_their_order():
    """The second call reads the first's result, the third does not; all three are one module."""

    def forward(self, x):
        y = self.shared(x).relu()
        z = self.shared(y).sigmoid()
        return self.shared(self.other(x)) * z + self.shared(self.other(z) + y)

    graph = pass_after_pass(randomize(Calling(forward, shared=nn.Linear(4, 4), other=nn.Linear(4, 4))), random(5, 3, 4))
    calls = [graph.calls(nn.Linear)["shared"][number] for number in range(4)]
    source = lambda node: node.args[0].meta["module"] or node.args[0].name  # noqa: E731
    assert [source(call) for call in calls][:2] == ["x", "other"]  # the independent one follows the first at once
    group_calls(graph)
    graph.graph.lint()
    graph.prune()
    assert_same(graph, Calling(forward, shared=graph.shared, other=graph.other), random(5, 3, 4))


class Repeating(nn.Module):
    """A small layer that runs on its own results, side by side in a second branch, and beside a layer of a given width."""

    def __init__(self, width: int):
        super().__init__()
        self.grow, self.last = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Linear(4, width)

    def forward(self, x):
        y = self.grow(x) + self.grow(x.flip(2))
        for _ in range(3):
            y = 3 * self.grow(y)
        return self.last((y + x).mean((2, 3)))


def test_calls_on_a_module_s_own_results_become_modules_of_their_own():
    graph = pass_after_pass(randomize(Repeating(500)), random(5, 4, 8, 8))
    calls = {name: len(own) for name, own in graph.calls(nn.Conv2d).items()}
    assert calls == {"grow": 2, "grow_repeat1": 1, "grow_repeat2": 1, "grow_repeat3": 1}  # side by side: one module
    assert len({graph.get_submodule(name).weight.data_ptr() for name in calls}) == 4


def test_calls_stay_together_where_copies_would_make_the_model_much_larger():
    graph = pass_after_pass(randomize(Repeating(5)), random(5, 4, 8, 8))
    assert {name: len(own) for name, own in graph.calls(nn.Conv2d).items()} == {"grow": 5}


def test_a_layer_that_sees_ever_larger_values_is_quantized_well_at_each_call():
    """One range for all calls would leave the first ones without codes: they see values a thousand times smaller."""
    model, x = randomize(Repeating(500)), random(32, 4, 8, 8)
    model.grow.weight.data.fill_(2.0)
    exact = model(x)
    assert exact.std() > 100 * x.std()
    found = quantize(model, [x], "minmax")(x)
    error = (found - exact).square().sum() / (exact - exact.mean(0)).square().sum()
    assert -10 * error.log10() > 30


def test_normalising_twice_changes_nothing():
    graph = copy.deepcopy(captured(BUILDERS["swin"]))
    before = str(graph.graph)
    for rewrite in (drop_identities, compute_constants, expand_attention, expand_products, group_calls):
        rewrite(graph)
    graph.prune()
    assert str(graph.graph) == before and len(graph.calls(Product)) == 6


def test_constants_that_follow_from_other_constants():
    """Both are read by operations on activations, so both are stored, and the second follows from the first."""

    class Chained(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.arange(4.0))

        def forward(self, x):
            a = self.p * 2
            return (x + a) * (a + 1)

    x = random(5, 3, 4)
    graph = pass_after_pass(Chained(), x)
    assert_same(graph, Chained(), x)
    assert len([node for node in graph.graph.nodes if node.op == "call_function"]) == 2
