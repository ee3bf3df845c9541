"""Running a network unit by unit gives every unit the inputs that whole-network passes give it."""

import pytest
import torch
from torch import nn

import qwt2
import tiny_models as tiny
from oracles import full_precision_copy, record
from qwt2.compensation.activation_store import ActivationStore
from qwt2.compensation.walk import UnitStream, calibration_batches
from qwt2.capture.patching import replaced_forward
from qwt2.quantization.layers import QuantizedMatmul
from qwt2.quantization.quantize import quantization_info

CHAINS = ["vit", "swin", "resnet", "mobilenet"]
MULTIPATH = {"dense": tiny.dense, "pyramid": tiny.pyramid}


def quantized(name: str) -> nn.Module:
    if name in CHAINS:
        return tiny.quantized(name)
    return qwt2.quantize(MULTIPATH[name](), [tiny.images()], "minmax", qwt2.Precision(4, 4))


def flat(args, kwargs):
    return [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("reference", [False, True], ids=["quantized", "reference"])
@pytest.mark.parametrize("name", [*CHAINS, *MULTIPATH])
@torch.no_grad()
def test_inputs_of_every_unit_equal_whole_network_passes(name, reference):
    qmodel, batches = quantized(name), tiny.batches(8)
    whole = full_precision_copy(qmodel) if reference else qmodel
    stream = UnitStream(qmodel, batches, reference, None)
    for position, unit in enumerate(quantization_info(qmodel).units):
        expected, outputs = record(whole, unit, batches)
        for index in range(len(batches)):
            for found, wanted in zip(flat(*stream.inputs[index]), flat(*expected[index]), strict=True):
                assert torch.equal(found, wanted), unit
            assert torch.equal(stream.run(index), outputs[index]), unit
        stream.advance()
        assert stream.position == position + 1


@pytest.mark.parametrize("name", [*CHAINS, *MULTIPATH])
@torch.no_grad()
def test_only_multipath_networks_run_their_prefix(name):
    """A chain's unit needs its predecessor's output alone; the others are found out by the NaN that stands for them."""
    qmodel, batches = quantized(name), tiny.batches(8)
    stream = UnitStream(qmodel, batches, False, None)
    units = stream.units
    for _ in units:
        stream.advance()
    expected = {
        "dense": ["blocks.1", "blocks.2", "head"],
        "pyramid": ["lateral.0", "up.0", "lateral.1", "up.1"],
    }.get(name, [])
    # up.0 reads down.2 and lateral.0; lateral.0 runs between them.
    assert [units[i] for i in sorted(stream.needs_prefix)] == expected


class Wired(nn.Module):
    """Three layers: a wide one, a narrow one, and one that reads the wide one's output again, or not."""

    def __init__(self, again: bool):
        super().__init__()
        self.wide, self.narrow, self.last = nn.Linear(12, 30), nn.Linear(30, 12), nn.Linear(12, 12)
        self.again = again

    def forward(self, x):
        y = torch.relu(self.wide(x))
        return x + self.last(self.narrow(y) + (y[..., :12] if self.again else 0))


def layer_runs(qmodel: nn.Module, batches) -> dict[str, int]:
    """How often CWAC multiplies with each layer's weight, both networks together, a batch."""
    counts = dict.fromkeys(qmodel.quantization.layers, 0)

    def counted(name, op):
        def run(*operands):
            counts[name] += 1
            return op(*operands)

        return run

    for name in counts:
        layer = qmodel.get_submodule(name)
        layer.op = counted(name, layer.op)
    qwt2.compensate(qmodel, batches, "cwac")
    return {name: count / len(batches) for name, count in counts.items()}


@pytest.mark.parametrize(
    "again, expected",
    [
        (False, {"wide": 4, "narrow": 2, "last": 2}),  # the wide result is too large to keep, and computed for the narrow layer again
        # In both networks the last layer finds NaN in its place; the full-precision one runs on to the end of the first batch.
        (True, {"wide": 6, "narrow": 4, "last": 2.25}),
    ],
)
def test_layers_that_are_done_are_not_run_again_where_nothing_but_a_kept_result_is_read(again, expected):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(Wired(again), Wired(again)), nn.Linear(12, 3))
    images = torch.randn(32, 12)
    qmodel = qwt2.quantize(model, [images], "minmax", qwt2.Precision(4, 4))
    assert qmodel.quantization.blocks == ["0.0", "0.1"]
    runs = layer_runs(qmodel, list(images.split(8)))
    assert {name: runs[f"0.1.{name}"] for name in expected} == expected


def test_products_of_attention_are_not_computed_again_once_the_projection_behind_them_is_done(monkeypatch):
    qmodel, batches, seen = tiny.quantized("vit"), tiny.batches(8), []
    own = QuantizedMatmul.forward
    monkeypatch.setattr(QuantizedMatmul, "forward", lambda self, a, b: seen.append(self) or own(self, a, b))
    qwt2.compensate(qmodel, batches, "cwac")
    assert len(seen) == 2 * len(batches) * len(qmodel.quantization.matmuls)  # once in each network


class SharedNeck(nn.Module):
    """A neck that several heads read, one of which overwrites what it gets."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)
        self.neck = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.heads = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, images):
        x = self.neck(self.stem(images))
        first, second = self.heads[0](x.add_(1)), self.heads[1](x.mul_(2))
        return first + second + self.heads[2](x)


@pytest.mark.parametrize("on_disk", [False, True])
@torch.no_grad()
def test_outputs_of_sections_are_kept_for_all_who_read_them(on_disk, tmp_path):
    model, batches = tiny.randomize(SharedNeck()), tiny.batches(8)
    qmodel = qwt2.quantize(model, [tiny.images()], "minmax", qwt2.Precision(4, 4), blocks=[], sections=["neck"])
    stream = UnitStream(qmodel, batches, False, str(tmp_path) if on_disk else None)
    for unit in stream.units:
        expected, _ = record(qmodel, unit, batches)
        for index in range(len(batches)):
            [found], [wanted] = flat(*stream.inputs[index]), flat(*expected[index])
            assert torch.equal(found, wanted), unit
        stream.advance()
    assert not stream.needs_prefix and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["vit", "resnet", "pyramid"])
@torch.no_grad()
def test_inputs_of_layers_inside_a_unit(name):
    qmodel, batches = quantized(name), tiny.batches(8)
    stream = UnitStream(qmodel, batches, False, None)
    for unit in stream.units:
        layers = [n for n in qmodel.quantization.layers if n == unit or n.startswith(unit + ".")]
        for chosen in (layers, layers[:1], layers[-1:]):
            captured = stream.layer_inputs(1, chosen)
            for layer in chosen:
                [_, (args, _)], _ = record(qmodel, layer, batches)
                assert len(captured[layer]) == 1 and torch.equal(captured[layer][0], args[0]), layer
        stream.advance()


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("name", ["vit", "resnet", "pyramid"])
@torch.no_grad()
def test_outputs_of_layers_and_what_the_unit_then_returns_without_another_run(name, offloads, tmp_path):
    qmodel, batches = quantized(name), tiny.batches(8)
    reference = full_precision_copy(qmodel)
    stream = UnitStream(qmodel, batches, True, str(tmp_path) if offloads else None)
    for unit in stream.units:
        layers = [n for n in qmodel.quantization.layers if n == unit or n.startswith(unit + ".")]
        for index in range(len(batches)):
            for chosen, to_end in ((layers[:1], False), (layers[-1:], False), (layers, True)):
                captured = stream.layer_outputs(index, chosen, to_end)
                for layer in chosen:
                    _, outputs = record(reference, layer, batches)
                    assert len(captured[layer]) == 1
                    torch.testing.assert_close(captured[layer][0], outputs[index])  # files hold no strides
        stream.run = None  # cannot be called
        stream.advance()
        del stream.run
    assert not list(tmp_path.iterdir())


class Overwriting(nn.Module):
    """A block that adds to its own input in place, as some residual blocks do."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        x += self.fc2(torch.relu(self.fc1(x)))
        return x


def overwriting_network() -> nn.Module:
    model = tiny.mlp(2)
    model[3] = nn.Sequential(Overwriting(), Overwriting())
    return qwt2.quantize(tiny.randomize(model), [tiny.images()], "minmax", qwt2.Precision(4, 4))


@torch.no_grad()
def test_blocks_that_overwrite_their_input_are_run_on_the_same_input_every_time():
    qmodel, batches = overwriting_network(), tiny.batches(8)
    stream = UnitStream(qmodel, batches, False, None)
    for unit in stream.units:
        first = stream.run(0).clone()
        [((x,), _), _], [y, _] = record(qmodel, unit, batches)
        assert torch.equal(stream.inputs[0][0][0], x), unit
        assert torch.equal(first, y) and torch.equal(stream.run(0), y), unit
        stream.advance()


def counted(qmodel: nn.Module, names: list[str]) -> dict[str, int]:
    """Calls of each module from now on."""
    calls = dict.fromkeys(names, 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name in names:
        qmodel.get_submodule(name).register_forward_pre_hook(count(name))
    return calls


@pytest.mark.parametrize("method, options", [("cwac", {}), ("cwac", {"order": "one_pass"}), ("cwac", {"granularity": "block"}), ("qwt", {})])
def test_work_a_block_does_not_grow_with_the_number_of_blocks(method, options):
    """No full-network pass a module: a network three times as deep runs each of its blocks no more often."""
    most = {}
    for depth in (2, 6):
        qmodel = qwt2.quantize(tiny.vit(depth), [tiny.images()], "repq", qwt2.Precision(4, 4))
        calls = counted(qmodel, [f"blocks.{i}.norm1" for i in range(depth)])
        qwt2.compensate(qmodel, tiny.batches(8), method, **options)
        assert len(set(calls.values())) == 1, calls
        most[depth] = calls["blocks.0.norm1"]
    assert most[2] == most[6]


def test_no_pass_through_the_network_runs_more_than_one_unit():
    qmodel = quantized("vit")
    depth, passes, inside = 0, 0, []

    def enter(*_):
        nonlocal depth, passes
        depth, passes = depth + 1, passes + 1

    def leave(*_):
        nonlocal depth
        depth -= 1

    qmodel.register_forward_pre_hook(enter)
    qmodel.register_forward_hook(leave, always_call=True)
    for i in range(2):
        norm = qmodel.get_submodule(f"blocks.{i}.norm1")
        norm.register_forward_pre_hook(lambda *_, i=i: inside.append(i) if depth else None)
    qwt2.compensate(qmodel, tiny.batches(8))
    assert depth == 0 and not inside
    # One start and one step a unit, for each of two batches and two networks.
    assert passes == 2 * 2 * len(qmodel.quantization.units)


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
    def test_what_is_done_to_a_tensor_does_not_reach_the_store(self, on_disk, tmp_path):
        store = ActivationStore(str(tmp_path) if on_disk else None, "quantized")
        store[0] = ((torch.ones(3),), {})
        store[0][0][0].zero_()
        assert store[0][0][0].eq(1).all()

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
        assert all(torch.equal(b, x) for b in calibration_batches(tiny.quantized("vit"), [x, (x, 1), [x, 2]]))

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
            calibration_batches(tiny.quantized("vit"), batches)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_names_the_batch_that_is_not_finite(self, bad):
        broken = tiny.images(2)
        broken[1, 2, 3, 4] = bad
        with pytest.raises(qwt2.Qwt2Error, match="calibration batch 1 holds NaN or infinity"):
            calibration_batches(tiny.quantized("vit"), [tiny.images(2), broken])


class Branching(nn.Module):
    """Runs its second block on bright images only."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)
        self.blocks = nn.ModuleList([tiny.ConvBlock(4, 4), tiny.ConvBlock(4, 4)])

    def forward(self, images):
        x = self.blocks[0](self.stem(images))
        return self.blocks[1](x) if images.mean() > 0 else x


def test_a_unit_that_some_batch_does_not_reach_is_named():
    bright, dark = tiny.images(2) + 5, tiny.images(2) - 5
    qmodel = qwt2.quantize(tiny.randomize(Branching()), [bright], "minmax")
    with pytest.raises(qwt2.Qwt2Error, match="blocks.1 was not run"):
        qwt2.compensate(qmodel, [bright, dark], gate="none")
