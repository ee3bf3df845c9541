"""The walk gives every layer what whole-network passes give it, and runs everything as seldom as it can."""

import pytest
import tiny_models as tiny
import torch
from oracles import full_precision_copy, record
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qwt2
from qwt2.capture.graph import GraphModel
from qwt2.detection.patching import replaced_forward
from qwt2.quantization import walk
from qwt2.quantization.activation_store import ActivationStore, size_of
from qwt2.quantization.layers import QuantizedLayer, QuantizedMatmul
from qwt2.quantization.walk import Walk

CHAINS = ["vit", "swin", "resnet", "mobilenet"]
MULTIPATH = {"dense": tiny.dense, "pyramid": tiny.pyramid}


def quantized(name: str) -> GraphModel:
    if name in CHAINS:
        return tiny.quantized(name)
    return qwt2.quantize(MULTIPATH[name](), [tiny.images()], "minmax", qwt2.Precision(4, 4))


@pytest.mark.parametrize("name", [*CHAINS, *MULTIPATH])
@torch.no_grad()
def test_outputs_of_every_layer_equal_those_of_whole_network_passes(name):
    qmodel, batches = quantized(name), tiny.batches(8)
    reference = full_precision_copy(qmodel)
    for visit in Walk(qmodel, batches).visits(QuantizedLayer):
        arguments, _ = record(qmodel, visit.name, batches)
        _, exact = record(reference, visit.name, batches)
        for index, y_q, y_f in visit.layer_outputs("global"):
            layer = visit.module
            assert torch.equal(y_q, layer.with_bias(layer.products(arguments[index][0][0]))), visit.name
            assert torch.equal(y_f, exact[index]), visit.name


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


def runs(qmodel: GraphModel, method: str, batches) -> dict[str, float]:
    """How often a compensation multiplies with each layer's weight, both networks together, per batch."""
    counts = dict.fromkeys(qmodel.quantization.layers, 0)

    def counted(name, op):
        def run(*operands):
            counts[name] += 1
            return op(*operands)

        return run

    for name in counts:
        layer = qmodel.get_submodule(name)
        layer.op = counted(name, layer.op)
    qwt2.compensate(qmodel, batches, method)
    return {name: count / len(batches) for name, count in counts.items()}


@pytest.mark.parametrize("name", [*CHAINS, *MULTIPATH])
def test_no_layer_runs_more_than_once_in_each_network_where_there_is_room(name, monkeypatch):
    monkeypatch.setattr(walk, "GROWTH", 1e9)
    assert set(runs(quantized(name), "cwac", tiny.batches(8)).values()) == {2}


@pytest.mark.parametrize("name", [*CHAINS, *MULTIPATH])
def test_layers_whose_output_is_large_run_once_more_at_most(name):
    found = runs(quantized(name), "cwac", tiny.batches(8))
    assert set(found.values()) <= {2, 3, 4}


def test_products_of_attention_are_computed_once_in_each_network(monkeypatch):
    qmodel, batches, seen = tiny.quantized("vit"), tiny.batches(8), []
    for kind in ("forward", "full_precision"):
        own = getattr(QuantizedMatmul, kind)
        monkeypatch.setattr(QuantizedMatmul, kind, lambda self, a, b, own=own: seen.append(self) or own(self, a, b))
    qwt2.compensate(qmodel, batches, "cwac")
    assert len(seen) == 2 * len(batches) * len(qmodel.quantization.matmuls)


class RegNetLike(nn.Sequential):
    """Residual blocks with a strided shortcut and grouped convolutions, named as numbers of no list."""

    def __init__(self):
        blocks = {f"b{i}": tiny.ConvBlock(8, 8) for i in range(1, 5)}
        stages = nn.Sequential()
        for name, block in blocks.items():
            stages.add_module(name, block)
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize("method, most", [("cwac", 3.5), ("qwt", 3.0)])
@pytest.mark.parametrize("name", [*CHAINS, *MULTIPATH, "regnet"])
def test_compensation_multiplies_no_more_than_a_few_passes_do(name, method, most):
    if name == "regnet":
        qmodel = qwt2.quantize(tiny.randomize(RegNetLike()), [tiny.images()], "minmax", qwt2.Precision(4, 4))
    else:
        qmodel = quantized(name)
    if method == "qwt" and not qmodel.quantization.blocks:
        pytest.skip("no block that reads one activation and gives one")
    batches = tiny.batches(16)
    with torch.no_grad(), FlopCounterMode(display=False) as one_pass:
        for batch in batches:
            full_precision_copy(qmodel)(batch)
    with FlopCounterMode(display=False) as found:
        qwt2.compensate(qmodel, batches, method)
    # Regressions multiply too: a Gram matrix for each block.
    assert found.get_total_flops() <= most * one_pass.get_total_flops()


@pytest.mark.parametrize("method", ["cwac", "qwt"])
def test_work_per_block_does_not_grow_with_the_number_of_blocks(method):
    most = {}
    for depth in (2, 6):
        qmodel = qwt2.quantize(tiny.vit(depth), [tiny.images()], "repq", qwt2.Precision(4, 4))
        found = runs(qmodel, method, tiny.batches(8))
        most[depth] = max(found.values())
    assert most[2] == most[6]


@torch.no_grad()
def test_nothing_is_held_that_nothing_will_read(monkeypatch):
    """Of a ViT, behind each layer: the residual stream, and what the branch has come to."""
    qmodel, batches, held = tiny.quantized("vit"), tiny.batches(8), []
    own = ActivationStore.__setitem__
    monkeypatch.setattr(ActivationStore, "__setitem__", lambda self, *item: held.append(size_of(item[1])) or own(self, *item))
    qwt2.compensate(qmodel, batches, "cwac")
    tokens = 4 * 17 * 16 * 4  # images, tokens, channels, bytes
    assert max(held) <= 4 * tokens + 4 * 17 * 4 * 16 * 4  # stream and branch; or the stream and query, key and value


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
