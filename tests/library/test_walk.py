"""The walk gives every layer what whole-network passes give it, and runs everything as seldom as it can."""

import copy
import functools
from collections import Counter

import pytest
import torch
from timm.models.densenet import DenseNet
from timm.models.regnet import RegNet, RegNetCfg
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import qwt2
from qwt2.capture.graph import GraphModel
from qwt2.compensation.blocks import visits_behind_blocks
from qwt2.compensation.methods import COMPENSATIONS
from qwt2.detection.patching import replaced_forward
from qwt2.quantization import walk
from qwt2.quantization.activation_store import ActivationStore, size_of
from qwt2.quantization.layers import QuantizedLayer, QuantizedMatmul
from qwt2.quantization.walk import Walk
from tests.support import tiny_models as tiny
from tests.support.oracles import block_triples, full_precision_copy, layer_pairs, record

pytestmark = pytest.mark.xdist_group("walk")  # one worker captures the networks

CHAINS = list(tiny.BUILDERS)


class SharedNeck(nn.Module):
    """A neck that several heads read, two of which overwrite what they get."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)
        self.neck = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.heads = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, images):
        x = self.neck(self.stem(images))
        first, second = self.heads[0](x.add_(1)), self.heads[1](x.mul_(2))
        return first + second + self.heads[2](x)


class Views(nn.Module):
    """Reads a value and a view of it behind the same layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.ModuleList(tiny.ConvBlock(8, 8) for _ in range(2))
        self.head = nn.Linear(8, tiny.CLASSES)

    def forward(self, images):
        x = self.stem(images)
        rows = x.flatten(2)
        y = self.blocks[1](self.blocks[0](x) + x)
        return self.head((y.flatten(2) * rows.flip(2) + x.flatten(2)).mean(2))


def densenet() -> nn.Module:
    """timm's DenseNet: concatenations that grow, BatchNorm in front of the convolutions."""
    return tiny.randomize(DenseNet(growth_rate=4, block_config=(3, 3), bn_size=2, num_classes=tiny.CLASSES))


def regnet() -> nn.Module:
    """timm's RegNet: grouped convolutions, squeeze-excitation, strided shortcuts; its blocks are in no list."""
    config = RegNetCfg(depth=6, w0=8, wa=8.0, wm=2.0, group_size=4, stem_width=8, se_ratio=0.25)
    return tiny.randomize(RegNet(config, num_classes=tiny.CLASSES))


# Several values are alive at once in these.
MULTIPATH = {
    "dense": tiny.dense, "pyramid": tiny.pyramid, "neck": lambda: tiny.randomize(SharedNeck()), "densenet": densenet,
    "regnet": regnet, "views": lambda: tiny.randomize(Views()),
}  # fmt: skip
NETWORKS = [*CHAINS, *MULTIPATH]
# Chains of tokens and of images, concatenations, several readers, a block that reads several values, views.
DIFFERING = ["vit", "resnet", "dense", "neck", "regnet", "views"]


@functools.cache
def _quantized(name: str) -> GraphModel:
    return qwt2.quantize(tiny.captured(MULTIPATH[name]), [tiny.images()], "minmax", qwt2.Precision(4, 4))


def quantized(name: str) -> GraphModel:
    return tiny.quantized(name) if name in CHAINS else copy.deepcopy(_quantized(name))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["global", "local"])
@pytest.mark.parametrize("name, on_disk", [*((name, False) for name in NETWORKS), ("swin", True), ("neck", True), ("views", True)])
@torch.no_grad()
def test_outputs_of_every_layer_equal_those_of_whole_network_passes(name, target, on_disk, tmp_path):
    qmodel, batches = quantized(name), tiny.batches(8)
    reference = full_precision_copy(qmodel)
    for visit in Walk(qmodel, batches, str(tmp_path) if on_disk else None).visits(QuantizedLayer):
        expected = layer_pairs(qmodel, reference, visit.name, batches, target)
        for (_, y_q, y_f), (wanted_q, wanted_f) in zip(visit.layer_outputs(target), expected, strict=True):
            assert torch.equal(y_q, wanted_q) and torch.equal(y_f, wanted_f), visit.name


@pytest.mark.parametrize("target", ["global", "local"])
@pytest.mark.parametrize("name", ["vit", "swin", "resnet", "dense", "pyramid", "regnet"])
@torch.no_grad()
@pytest.mark.slow
def test_what_every_block_reads_and_gives_equals_whole_network_passes(name, target):
    qmodel, batches = quantized(name), tiny.batches(8)
    plain, reference, seen = copy.deepcopy(qmodel), full_precision_copy(qmodel), []
    for visit, block in visits_behind_blocks(Walk(qmodel, batches)):
        expected = block_triples(plain, reference, block, batches, target)
        for (_, (x, y_q), (_, y_f)), wanted in zip(visit.block_outputs(block, target), expected, strict=True):
            assert all(torch.equal(*pair) for pair in zip((x, y_q, y_f), wanted)), block
        seen.append(block)
    assert seen == plain.quantization.blocks and seen


@torch.no_grad()
def test_blocks_in_the_graph_read_and_give_what_the_model_s_own_modules_do():
    """Hooks on the float model, in which nothing of the library runs."""
    for build in (tiny.vit, tiny.swin, tiny.mlp, tiny.dense, tiny.pyramid):
        model, batches = build(), tiny.batches(8)
        qmodel = qwt2.quantize(tiny.captured(build), [tiny.images()], "minmax", qwt2.Precision(4, 4))
        for visit, block in visits_behind_blocks(Walk(qmodel, batches)):
            arguments, outputs = record(model, block, batches)
            for index, _, (x, y) in visit.block_outputs(block, "global"):
                [given], _ = arguments[index]
                torch.testing.assert_close(x, given, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(y, outputs[index], rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """A layer that runs twice, the second time on what the first one led to."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = nn.Conv2d(3, 12, 8, 8), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = torch.relu(self.shared(x))
        return self.head(torch.relu(self.shared(2 * x)).mean(1))


@torch.no_grad()
def test_a_layer_that_runs_twice_is_visited_once_with_the_outputs_of_both_runs():
    qmodel, batches = qwt2.quantize(tiny.randomize(Twice()), [tiny.images()], "minmax"), tiny.batches(8)
    assert qmodel.quantization.repeated == ["shared"]
    seen = [visit.name for visit in Walk(qmodel, batches).visits(QuantizedLayer)]
    assert seen == ["stem", "shared", "head"]
    for visit in Walk(qmodel, batches).visits(QuantizedLayer):
        found = list(visit.layer_outputs("global"))
        assert len(found) == len(batches) * (2 if visit.name == "shared" else 1)
        arguments, _ = record(qmodel, visit.name, batches)
        for (_, y_q, _), ((x,), _) in zip(found, arguments, strict=True):
            assert torch.equal(y_q, visit.module.with_bias(visit.module.products(x)))


# Without what looks ahead or back on some batches: the gate at the end of a branch, and ranges chosen again.
PLAIN = {"cwac": {"gate": "module", "ranges": None}, "refit": {"ranges": None}}
METHODS = [
    *((name, PLAIN.get(name, {})) for name in COMPENSATIONS.names()),
    *(("cwac_paper", option) for option in ({"target": "local"}, {"order": "one_pass"}, {"granularity": "block"})),
]  # fmt: skip


def runs(qmodel: GraphModel, batches, method: str = "cwac_paper", **options) -> Counter:
    """Runs of each layer in a compensation, per batch: (layer, "quantized" or "float") -> count."""
    counts: Counter = Counter()

    def counted(name, layer, op):
        def run(x, weight, bias):
            counts[name, "float" if weight is layer.weight else "quantized"] += 1
            return op(x, weight, bias)

        return run

    for name in qmodel.quantization.layers:
        layer = qmodel.get_submodule(name)
        layer.op = counted(name, layer, layer.op)
    qwt2.compensate(qmodel, batches, method, **options)
    return Counter({key: count / len(batches) for key, count in counts.items()})


@pytest.mark.parametrize("method, options", METHODS)
@pytest.mark.parametrize("name", DIFFERING)
def test_every_layer_runs_once_in_each_network_where_there_is_room(name, method, options, monkeypatch):
    qmodel = quantized(name)
    monkeypatch.setattr(walk, "GROWTH", float("inf"))
    found = runs(qmodel, tiny.batches(8), method, **options)
    assert set(found.values()) == {1}
    if method == "cwac" and "granularity" not in options:  # what lies behind the last block runs for no block
        assert len(found) == 2 * len(qmodel.quantization.layers)


@pytest.mark.parametrize("name", CHAINS + ["dense", "pyramid", "densenet", "regnet"])
def test_every_layer_runs_once_in_each_network_where_what_is_alive_hardly_grows(name):
    assert set(runs(quantized(name), tiny.batches(8)).values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("growth", [0.0, 0.5])
@pytest.mark.parametrize("method, options", METHODS)
@pytest.mark.parametrize("name", DIFFERING)
def test_no_layer_runs_a_third_time_however_little_may_be_kept(name, method, options, growth, monkeypatch):
    qmodel = quantized(name)
    monkeypatch.setattr(walk, "GROWTH", growth)
    found = runs(qmodel, tiny.batches(8), method, **options)
    assert max(found.values()) <= 2


class Wired(nn.Module):
    """Three layers: a wide one, a narrow one, and one that reads the wide one's output again, or not."""

    def __init__(self, again: bool):
        super().__init__()
        self.wide, self.narrow, self.last = nn.Linear(12, 30), nn.Linear(30, 12), nn.Linear(12, 12)
        self.again = again

    def forward(self, x):
        y = torch.relu(self.wide(x))
        return x + self.last(self.narrow(y) + (y[..., :12] if self.again else 0))


@pytest.mark.parametrize("again", [False, True])
def test_only_what_is_too_large_to_keep_is_computed_again_and_only_once(again):
    """The wide result is computed for the narrow layer again; where the last one reads it too, it is kept then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(Wired(again), Wired(again)), nn.Linear(12, 3))
    images = torch.randn(32, 12)
    qmodel = qwt2.quantize(model, [images], "minmax", qwt2.Precision(4, 4))
    assert qmodel.quantization.blocks == ["0.0", "0.1"]
    found = runs(qmodel, list(images.split(8)))
    for network in ("quantized", "float"):
        counts = {name: found[f"0.1.{name}", network] for name in ("wide", "narrow", "last")}
        assert counts == {"wide": 2, "narrow": 1, "last": 1}


def test_products_of_attention_are_computed_once_in_each_network(monkeypatch):
    qmodel, batches, seen = tiny.quantized("vit"), tiny.batches(8), []
    for kind in ("forward", "full_precision"):
        own = getattr(QuantizedMatmul, kind)
        monkeypatch.setattr(QuantizedMatmul, kind, lambda self, a, b, own=own: seen.append(self) or own(self, a, b))
    qwt2.compensate(qmodel, batches, "cwac_paper")
    assert len(seen) == 2 * len(batches) * len(qmodel.quantization.matmuls)


@pytest.mark.slow
@pytest.mark.parametrize("method, most", [("cwac", 3.5), ("qwt", 3.0)])
@pytest.mark.parametrize("name", NETWORKS)
def test_compensation_multiplies_no_more_than_a_few_passes_do(name, method, most):
    qmodel, batches = quantized(name), tiny.batches(32)
    reference = full_precision_copy(qmodel)
    with torch.no_grad(), FlopCounterMode(display=False) as one_pass:
        for batch in batches:
            reference(batch)
    with FlopCounterMode(display=False) as found:
        qwt2.compensate(qmodel, batches, method)
    # Regressions multiply too: a Gram matrix for each block.
    assert found.get_total_flops() <= most * one_pass.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "swin", "resnet", "mobilenet"])
def test_the_refit_multiplies_no_more_than_six_passes_for_each_further_image(name):
    """Its equations take the same time for any number of images. Thinned-out rows keep Gram matrices small."""
    reference, found = full_precision_copy(quantized(name)), []
    with torch.no_grad(), FlopCounterMode(display=False) as one_pass:
        reference(tiny.images(16))
    for count in (32, 48):
        with FlopCounterMode(display=False) as counter:
            qwt2.compensate(quantized(name), tiny.batches(count), "refit", rows_per_input=1)
        found.append(counter.get_total_flops())
    assert found[1] - found[0] <= 6 * one_pass.get_total_flops()


VITS = {depth: functools.partial(tiny.vit, depth) for depth in (2, 6)}


@pytest.mark.slow
@pytest.mark.parametrize("method, options", METHODS)
def test_work_per_block_does_not_grow_with_the_number_of_blocks(method, options):
    """No pass through the whole network for each module."""
    most = {}
    for depth in (2, 6):
        qmodel = qwt2.quantize(tiny.captured(VITS[depth]), [tiny.images()], "repq", qwt2.Precision(4, 4))
        most[depth] = max(runs(qmodel, tiny.batches(8), method, **options).values())
    assert most[2] == most[6]


def alive(graph: fx.Graph, position: int) -> set[str]:
    """Names of what is computed before a position and read there or behind."""
    order = list(graph.nodes)
    behind = set(order[position:])
    return {node.name for node in order[:position] if not behind.isdisjoint(node.users)}


@pytest.mark.parametrize("method, options", METHODS)
@pytest.mark.parametrize("name", DIFFERING)
def test_nothing_is_held_that_nothing_will_read(name, method, options, monkeypatch):
    qmodel, needless, own = quantized(name), [], ActivationStore.__setitem__

    def put(self, index, place):
        position, values, *_ = place
        needless.extend(values.keys() - alive(qmodel.graph, position))
        own(self, index, place)

    monkeypatch.setattr(ActivationStore, "__setitem__", put)
    qwt2.compensate(qmodel, tiny.batches(8), method, **options)
    assert needless == []


@pytest.mark.slow
@pytest.mark.parametrize("growth", [0.0, 2.0, float("inf")])
@pytest.mark.parametrize("name", NETWORKS)
def test_never_more_is_held_than_a_pass_through_the_network_needs_at_its_peak(name, growth, monkeypatch):
    qmodel, batches, held, own = quantized(name), tiny.batches(8), [], ActivationStore.__setitem__
    bytes_of, batch = {}, batches[0]

    def measure(node, values):
        value = qmodel.evaluate(node, values)
        bytes_of[node.name] = 0 if node.op == "get_attr" else size_of(value)
        return value

    with torch.no_grad():
        qmodel.walk(batch, measure)
    most = max(sum(bytes_of.get(n, 0) for n in alive(qmodel.graph, p)) for p in range(len(qmodel.graph.nodes)))
    monkeypatch.setattr(walk, "GROWTH", growth)
    monkeypatch.setattr(
        ActivationStore, "__setitem__", lambda self, *item: held.append(size_of(item[1])) or own(self, *item)
    )
    qwt2.compensate(qmodel, batches, "cwac")
    assert max(held) <= most


class TestActivationStore:
    TREE = ((torch.arange(6.0).reshape(2, 3).t(), None, 3), {"mask": torch.tensor(2.5), "flags": [torch.tensor([True]), "x"]})

    @pytest.mark.parametrize("on_disk", [False, True])
    def test_gives_back_what_it_got(self, on_disk, tmp_path):
        store = ActivationStore(str(tmp_path) if on_disk else None, "quantized")
        store[0], store[3] = self.TREE, ((torch.zeros(1),), {})
        (x, nothing, three), kwargs = store[0]
        assert torch.equal(x, self.TREE[0][0]) and nothing is None and three == 3
        assert torch.equal(kwargs["mask"], torch.tensor(2.5)) and kwargs["flags"][0].item() is True
        assert kwargs["flags"][1] == "x"
        assert len(list(tmp_path.iterdir())) == (2 if on_disk else 0)

    @pytest.mark.parametrize("on_disk", [False, True])
    def test_takes_a_tensor_and_views_of_it(self, on_disk, tmp_path):
        store, x = ActivationStore(str(tmp_path) if on_disk else None, "quantized"), torch.arange(6.0)
        store[0] = {"x": x, "same": x, "view": x.reshape(2, 3), "transposed": x.reshape(2, 3).t()}
        found = store[0]
        assert torch.equal(found["x"], x) and torch.equal(found["same"], x)
        assert torch.equal(found["view"], x.reshape(2, 3)) and torch.equal(found["transposed"], x.reshape(2, 3).t())

    def test_a_part_of_a_large_tensor_does_not_keep_the_whole(self):
        store = ActivationStore(None, "quantized")
        store[0] = {"part": torch.arange(1000.0)[:3]}
        assert store[0]["part"].untyped_storage().nbytes() == 12 and store[0]["part"].tolist() == [0, 1, 2]

    def test_what_fits_stays_in_memory(self, tmp_path):
        store = ActivationStore(str(tmp_path), "quantized", limit=100)
        store[0], store[1] = torch.zeros(20), torch.ones(20)
        assert [path.name for path in tmp_path.iterdir()] == ["quantized-1.safetensors"]
        assert store[0].eq(0).all() and store[1].eq(1).all()
        store[1] = torch.full((5,), 2.0)  # fits now
        assert list(tmp_path.iterdir()) == [] and store[1].eq(2).all()

    def test_clearing_removes_its_own_files(self, tmp_path):
        (tmp_path / "theirs.txt").write_text("keep")
        store = ActivationStore(str(tmp_path), "quantized")
        store[0] = self.TREE
        store.clear()
        assert [p.name for p in tmp_path.iterdir()] == ["theirs.txt"]


class TestReplacedForward:
    def test_restores_the_method_also_after_an_exception(self):
        layer = nn.Linear(2, 2)
        with pytest.raises(ZeroDivisionError), replaced_forward(layer, lambda x: "replaced"):
            assert layer(1) == "replaced"
            raise ZeroDivisionError
        assert "forward" not in vars(layer) and layer(torch.zeros(1, 2)).shape == (1, 2)


class TestCalibrationBatches:
    def test_takes_tensors_and_labelled_pairs(self):
        x = tiny.images(2)
        states = []
        for batches in ([x, x, x], [x, (x, 1), [x, 2]]):
            qmodel = tiny.quantized("vit")
            qwt2.compensate(qmodel, batches)
            states.append(qmodel.state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    @pytest.mark.parametrize(
        "batches, message",
        [
            ([], "empty"),
            ([torch.zeros(0, 3, 4, 4)], "empty"),
            (["x"], "str"),
            ([tiny.images(2), torch.zeros(1, 3, 4, 4)], r"calibration batch 1 holds images of shape \(3, 4, 4\), but the model"),
            ([tiny.images(2).half()], "torch.float16; convert them to float32"),
        ],
    )
    def test_refuses_what_is_no_batch(self, batches, message):
        with pytest.raises(qwt2.Qwt2Error, match=message):
            qwt2.compensate(tiny.quantized("vit"), batches)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_names_the_batch_that_is_not_finite(self, bad):
        broken = tiny.images(2)
        broken[1, 2, 3, 4] = bad
        with pytest.raises(qwt2.Qwt2Error, match="calibration batch 1 holds NaN or infinity"):
            qwt2.compensate(tiny.quantized("vit"), [tiny.images(2), broken])


class Branching(nn.Module):
    """Runs its second block on bright images only."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)
        self.blocks = nn.ModuleList([tiny.ConvBlock(4, 4), tiny.ConvBlock(4, 4)])

    def forward(self, images):
        x = self.blocks[0](self.stem(images))
        return self.blocks[1](x) if images.mean() > 0 else x


def test_a_model_that_decides_by_the_values_of_its_images_is_refused_with_its_line():
    with pytest.raises(qwt2.Qwt2Error, match=r"Branching cannot be captured: .*test_walk\.py:\d+.*branches on the values"):
        qwt2.quantize(tiny.randomize(Branching()), [tiny.images(2) + 5], "minmax")


def test_progress_is_told_behind_each_module():
    model, batches = tiny.captured(tiny.BUILDERS["vit"]), tiny.batches()
    told: list[tuple[int, int]] = []
    qmodel = qwt2.quantize(model, batches, progress=lambda *now: told.append(now))
    modules = len(qmodel.quantization.layers) + len(qmodel.quantization.matmuls)
    assert told == [(number, modules) for number in range(1, modules + 1)]
    told.clear()
    qwt2.compensate(qmodel, batches, "cwac_paper", progress=lambda *now: told.append(now))
    layers = len(qmodel.quantization.layers)
    assert told == [(number, layers) for number in range(1, layers + 1)]
