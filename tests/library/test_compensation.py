"""CWAC and QwT against whole-network passes, hooks and numpy's least squares."""

import copy
import functools
import json
import math
import time

import numpy as np
import pytest
import torch
from torch import nn

import qwt2
from benchmarks.stored import Stored
from qwt2.compensation.blocks import AffineCompensation, LinearCompensation, compensated_blocks, put_behind
from qwt2.compensation.methods import COMPENSATIONS
from qwt2.quantization import walk
from qwt2.quantization.activation_store import ActivationStore
from qwt2.quantization.info import quantized_layers
from qwt2.quantization.layers import QuantizedModule
from qwt2.report.results import fit_record
from tests.support import tiny_models as tiny
from tests.support.oracles import (
    affine,
    block_triples,
    decibel,
    full_precision_copy,
    layer_pairs,
    patches,
    record,
    rows,
    squared_error,
)

pytestmark = pytest.mark.xdist_group("compensation")  # one worker captures the networks

NETWORKS = ["vit", "swin", "resnet", "mobilenet", "dense", "pyramid", "overwriting"]


class Overwriting(nn.Module):
    """A block that adds to its own input in place."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        x += self.fc2(torch.relu(self.fc1(x)))
        return x


def overwriting() -> nn.Module:
    model = tiny.mlp(2)
    model[3] = nn.Sequential(Overwriting(), Overwriting())
    return tiny.randomize(model)


def quantized(name: str, bits: int = 4) -> nn.Module:
    return copy.deepcopy(_quantized(name, bits))


@functools.cache
def _quantized(name: str, bits: int) -> nn.Module:
    if name in tiny.BUILDERS:
        return tiny.quantized(name, bits, bits)
    build = {"dense": tiny.dense, "pyramid": tiny.pyramid, "mlp": tiny.mlp, "overwriting": overwriting}[name]
    return qwt2.quantize(tiny.captured(build), [tiny.images()], "minmax", qwt2.Precision(bits, bits))


def apply(qmodel: nn.Module, report) -> None:
    if report.kept:
        qmodel.get_submodule(report.module).set_compensation(report.alpha.float(), report.beta.float())


def assert_same_parameters(report, alpha: np.ndarray, beta: np.ndarray, tolerance: float = 1e-7) -> None:
    np.testing.assert_allclose(report.alpha.numpy(), alpha, rtol=tolerance, atol=tolerance, err_msg=report.module)
    np.testing.assert_allclose(report.beta.numpy(), beta, rtol=tolerance, atol=tolerance, err_msg=report.module)


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@torch.no_grad()
def assert_same_outputs(first: nn.Module, second: nn.Module) -> None:
    assert torch.equal(first(tiny.images(4, 9)), second(tiny.images(4, 9)))


class TestCWACAgainstWholeNetworks:
    """Every module's alpha and beta, from outputs that hooks recorded in passes through the whole network."""

    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize("target, order", [("global", "sequential"), ("local", "sequential"), ("global", "one_pass")])
    @pytest.mark.slow
    def test_modules(self, name, target, order):
        qmodel, batches = quantized(name), tiny.batches(8)
        twin, reference = copy.deepcopy(qmodel), full_precision_copy(qmodel)
        report = qwt2.compensate(qmodel, batches, "cwac_paper", target=target, order=order, gate="none")
        assert [m.module for m in report.modules] == qmodel.quantization.layers
        for module in report.modules:
            pairs = layer_pairs(twin, reference, module.module, batches, target)
            axis = twin.get_submodule(module.module).channel_axis
            q, f = (rows(outputs, axis) for outputs in zip(*pairs))
            assert_same_parameters(module, *affine(q, f))
            assert module.kept and module.reason == ""
            compensated = module.alpha.numpy() * q + module.beta.numpy()
            assert module.sqnr_before_db == pytest.approx(decibel(f, q - f), abs=1e-6)
            assert module.sqnr_after_db == pytest.approx(decibel(f, compensated - f), abs=1e-6)
            assert module.r2 == pytest.approx(1 - ((compensated - f) ** 2).sum() / ((q - f) ** 2).sum(), abs=1e-8)
            if order == "sequential":
                # The library's float32 values, so that the comparison of the next module starts from equal networks.
                apply(twin, module)
        for module in report.modules:
            apply(twin, module)
        assert_same_state(qmodel, twin)
        assert_same_outputs(qmodel, twin)

    @pytest.mark.parametrize("name", ["vit", "resnet"])
    @pytest.mark.parametrize("target, order", [("global", "sequential"), ("local", "sequential"), ("global", "one_pass")])
    def test_blocks(self, name, target, order):
        qmodel, batches = quantized(name), tiny.batches(8)
        blocks, axis = list(qmodel.quantization.blocks), 1 if name == "resnet" else -1
        twin, reference = copy.deepcopy(qmodel), full_precision_copy(qmodel)
        report = qwt2.compensate(qmodel, batches, "cwac_paper", granularity="block", target=target, order=order, gate="none")
        assert [m.module for m in report.modules] == blocks
        for module in report.modules:
            triples = block_triples(twin, reference, module.module, batches, target)
            q, f = (rows(outputs, axis) for outputs in list(zip(*triples))[1:])
            assert_same_parameters(module, *affine(q, f))
            if order == "sequential":
                put_behind(twin, module.module, AffineCompensation(module.alpha.float(), module.beta.float(), axis))
            assert isinstance(compensated_blocks(qmodel)[module.module], AffineCompensation)
        if order == "sequential":
            assert_same_outputs(qmodel, twin)

    @pytest.mark.parametrize("estimator", ["least_squares", "moment", "bias_only"])
    def test_estimators(self, estimator):
        qmodel, batches = quantized("vit"), tiny.batches(8)
        twin, reference = copy.deepcopy(qmodel), full_precision_copy(qmodel)
        for module in qwt2.compensate(qmodel, batches, "cwac_paper", estimator=estimator, gate="none").modules:
            pairs = layer_pairs(twin, reference, module.module, batches, "global")
            assert_same_parameters(module, *affine(*(rows(outputs, -1 if q_is_tokens(pairs) else 1) for outputs in zip(*pairs)), estimator))
            apply(twin, module)

    @pytest.mark.parametrize("gate", ["module", "channel"])
    def test_gate(self, gate):
        """Two of eight batches decide; what is kept is then fitted on all eight."""
        qmodel, batches = quantized("vit", 8), tiny.batches(16, 2)
        twin, reference = copy.deepcopy(qmodel), full_precision_copy(qmodel)
        decisions = set()
        for module in qwt2.compensate(qmodel, batches, "cwac_paper", gate=gate, holdout=0.25).modules:
            pairs = layer_pairs(twin, reference, module.module, batches, "global")
            axis = -1 if q_is_tokens(pairs) else 1
            q, f = zip(*((rows([a], axis), rows([b], axis)) for a, b in pairs))
            held = [np.concatenate([y[i] for i in (3, 7)]) for y in (q, f)]
            fitted = [np.concatenate([y[i] for i in (0, 1, 2, 4, 5, 6)]) for y in (q, f)]
            gain = squared_error(*held, 1, 0) - squared_error(*held, *affine(*fitted))
            better = gain > 0 if gate == "channel" else np.full(len(gain), gain.sum() > 0)
            alpha, beta = affine(np.concatenate(q), np.concatenate(f))
            assert_same_parameters(module, np.where(better, alpha, 1), np.where(better, beta, 0))
            assert module.kept == better.any()
            assert module.reason.startswith("no gain on held-out images") != module.kept and bool(module.reason) != module.kept
            decisions |= set(better.tolist())
            apply(twin, module)
        assert decisions == {True, False}  # else the case would test half of the gate
        assert_same_state(qmodel, twin)


def q_is_tokens(pairs) -> bool:
    return pairs[0][0].dim() != 4


class TestGate:
    def test_rejects_what_held_out_images_contradict(self):
        """On black images the first layer is exact, so that any correction would do harm there."""
        normal, black = tiny.batches(12), torch.zeros(4, 3, tiny.SIZE, tiny.SIZE)
        for last, kept in ((tiny.images(4, 5), True), (black, False)):
            qmodel = quantized("vit", 3)
            # 3-bit patches: a first layer whose error is large and systematic
            qmodel.patch_embed.proj.weight_quantizer.scale *= 0.3
            first = qwt2.compensate(qmodel, [*normal, last], "cwac_paper", gate="module").modules[0]
            assert first.module == "patch_embed.proj" and first.kept == kept
            assert (qmodel.patch_embed.proj.alpha is not None) == kept
            if not kept:
                assert first.reason.startswith("no gain on held-out images")
                assert first.sqnr_after_db == first.sqnr_before_db and first.r2 == 0
                assert first.alpha.eq(1).all() and first.beta.eq(0).all()

    def test_none_keeps_everything(self):
        black = torch.zeros(4, 3, tiny.SIZE, tiny.SIZE)
        report = qwt2.compensate(quantized("vit"), [*tiny.batches(12), black], "cwac_paper", gate="none")
        assert all(m.kept for m in report.modules)

    @pytest.mark.parametrize("holdout, count, expected", [(0.25, 4, [3]), (0.5, 4, [1, 3]), (0.01, 3, [2]), (0.99, 3, [1, 2]), (0.3, 10, [3, 6, 9])])
    def test_holds_out_a_share_of_the_batches_never_all_never_none(self, holdout, count, expected):
        """A batch is held out if a change of it alone changes what the gate looks at."""
        qmodel, batches = quantized("mlp", 3), [tiny.images(1, 20 + i) for i in range(count)]
        original, noticed = held_out_power(qmodel, batches, holdout), []
        for index, batch in enumerate(batches):
            changed = [*batches[:index], 2 * batch, *batches[index + 1 :]]
            if held_out_power(qmodel, changed, holdout) != original:
                noticed.append(index)
        assert noticed == expected

    def test_needs_two_batches(self):
        with pytest.raises(qwt2.Qwt2Error, match="at least two calibration batches"):
            qwt2.compensate(quantized("vit"), [tiny.images()], "cwac")
        assert qwt2.compensate(quantized("vit"), [tiny.images()], "cwac", gate="none").modules


def held_out_power(qmodel: nn.Module, batches, holdout: float) -> float:
    """What the gate of the first layer sees: its SQNR on held-out batches, without compensation."""
    return qwt2.compensate(copy.deepcopy(qmodel), batches, "cwac_paper", gate="module", holdout=holdout).modules[0].gate_before_db


class TestCWAC:
    @pytest.mark.parametrize("estimator", ["branch", "least_squares", "moment", "bias_only"])
    @pytest.mark.parametrize("granularity", ["module", "block"])
    @pytest.mark.parametrize("order", ["sequential", "one_pass"])
    @pytest.mark.parametrize("target", ["stream", "global", "local"])
    @pytest.mark.parametrize("gate", ["stream", "module", "channel", "none"])
    def test_every_combination_of_settings_runs(self, target, order, granularity, estimator, gate):
        qmodel = quantized("mlp", 3)
        wanted = qmodel.quantization.layers if granularity == "module" else qmodel.quantization.blocks
        report = qwt2.compensate(
            qmodel, tiny.batches(8), "cwac", target=target, order=order, granularity=granularity, estimator=estimator,
            gate=gate,
        )  # fmt: skip
        assert [m.module for m in report.modules] == list(wanted)
        assert any(m.kept for m in report.modules)
        assert torch.isfinite(qmodel(tiny.images(2))).all()

    def test_least_squares_on_all_images_lowers_every_module_s_error(self):
        for module in qwt2.compensate(quantized("swin"), tiny.batches(), "cwac_paper", gate="none").modules:
            assert module.r2 >= 0 and module.sqnr_after_db >= module.sqnr_before_db, module.module

    @pytest.mark.parametrize("name", ["vit", "resnet"])
    def test_result_does_not_depend_on_the_batch_split(self, name):
        """Only float32 rounding inside the network's own layers may differ (and flip a code now and then)."""
        results = []
        for size in (16, 8, 5, 1):
            report = qwt2.compensate(quantized(name, 8), tiny.batches(16, size), "cwac_paper", gate="none")
            results.append(torch.cat([torch.cat([m.alpha, m.beta]) for m in report.modules]))
        for result in results[1:]:
            assert float((result - results[0]).abs().max()) < 1e-3
        fewer = qwt2.compensate(quantized(name, 8), tiny.batches(15, 15), "cwac_paper", gate="none")
        gone = torch.cat([torch.cat([m.alpha, m.beta]) for m in fewer.modules])
        assert float((gone - results[0]).abs().max()) > 1e-3  # one image of 16 is visible at this tolerance

    def test_starts_from_the_uncompensated_network(self):
        """A second run replaces what the first one did, also where its gate keeps nothing."""
        for options in ({"order": "one_pass", "gate": "none"}, {"gate": "module"}):
            options["ranges"] = None
            once, twice = quantized("vit"), quantized("vit")
            qwt2.compensate(twice, tiny.batches(16, 4, seed=3), "cwac", gate="none", ranges=None)
            for qmodel in (once, twice):
                qwt2.compensate(qmodel, tiny.batches(), "cwac", **options)
            assert_same_state(once, twice)

    def test_local_target_stores_no_reference_activations(self, monkeypatch):
        stored = stores_used(monkeypatch)
        qwt2.compensate(quantized("mlp"), tiny.batches(8), "cwac", target="local", gate="module")
        assert stored == {"quantized"}
        qwt2.compensate(quantized("mlp"), tiny.batches(8), "cwac", target="global", gate="module")
        assert stored == {"quantized", "reference"}
        qwt2.compensate(quantized("mlp"), tiny.batches(8), "cwac", target="global")
        assert stored == {"quantized", "reference", "streams"}


def stores_used(monkeypatch) -> set[str]:
    """Names of the networks whose values are stored from now on."""
    own, used = ActivationStore.__setitem__, set()
    monkeypatch.setattr(
        ActivationStore, "__setitem__", lambda self, *item: (used.add(self.prefix), own(self, *item))[1]
    )
    return used


class TestQwT:
    @pytest.mark.parametrize("name", ["vit", "swin", "mlp", "overwriting"])
    @pytest.mark.parametrize("target", ["local", "global"])
    def test_token_blocks_equal_lstsq(self, name, target):
        qmodel, batches = quantized(name), tiny.batches(8)
        twin, reference, blocks = copy.deepcopy(qmodel), full_precision_copy(qmodel), list(qmodel.quantization.blocks)
        damping = 1e-6
        report = qwt2.compensate(qmodel, batches, "qwt", target=target, dtype="float32", damping=damping)
        assert [m.module for m in report.modules] == blocks
        for module in report.modules:
            assert module.kept and module.alpha is None
            layer: LinearCompensation = compensated_blocks(qmodel)[module.module]
            triples = block_triples(twin, reference, module.module, batches, target)
            x, q, f = (rows(values, -1) for values in zip(*triples))
            best = f - q - _residual(x, f - q, damping)
            found = x @ layer.weight.double().numpy().T + layer.bias.double().numpy()
            np.testing.assert_allclose(found, best, atol=1e-5 * np.abs(best).max(), err_msg=module.module)
            assert module.sqnr_before_db == pytest.approx(decibel(f, q - f), abs=1e-6)
            assert module.sqnr_after_db == pytest.approx(decibel(f, q + best - f), abs=1e-3)
            error = f - q
            assert module.r2 == pytest.approx(1 - ((error - best) ** 2).sum() / ((error - error.mean(0)) ** 2).sum(), abs=1e-5)
            put_behind(twin, module.module, copy.deepcopy(layer))
        assert_same_outputs(qmodel, twin)

    @pytest.mark.parametrize("kernel", [1, 3])
    @pytest.mark.parametrize("channels_per_group, groups", [(1, [8, 8, 8, 16]), (4, [8, 2, 2, 4]), (16, [4, 1, 1, 1])])
    def test_image_blocks_equal_lstsq(self, kernel, channels_per_group, groups):
        qmodel, batches = quantized("resnet"), tiny.batches(32, 16)
        twin, reference = copy.deepcopy(qmodel), full_precision_copy(qmodel)
        report = qwt2.compensate(
            qmodel, batches, "qwt", kernel_size=kernel, channels_per_group=channels_per_group, dtype="float32"
        )
        strides = {"layer1.0": 1, "layer2.0": 2, "layer3.0": 2, "layer4.0": 2}
        for module, group_count in zip(report.modules, groups, strict=True):
            assert module.kept
            layer: LinearCompensation = compensated_blocks(qmodel)[module.module]
            assert layer.groups == group_count and max(layer.stride) == strides[module.module] and layer.weight.shape[-1] == kernel
            triples = block_triples(twin, reference, module.module, batches, "local")
            x, q, f = (torch.cat(values).double().numpy() for values in zip(*triples))
            windows = patches(x, kernel, strides[module.module])
            for group in range(group_count):
                width_in, width_out = x.shape[1] // group_count, q.shape[1] // group_count
                mine = slice(group * width_out, (group + 1) * width_out)
                columns = windows[:, :, :, group * width_in : (group + 1) * width_in].reshape(-1, width_in * kernel**2)
                error = (f - q)[:, mine].transpose(0, 2, 3, 1).reshape(-1, width_out)
                best = error - _residual(columns, error, 1e-6)
                weight = layer.weight[mine].double().numpy().reshape(width_out, -1)
                found = columns @ weight.T + layer.bias[mine].double().numpy()
                np.testing.assert_allclose(found, best, atol=1e-5 * np.abs(best).max(), err_msg=module.module)
            put_behind(twin, module.module, copy.deepcopy(layer))
        assert_same_outputs(qmodel, twin)

    @pytest.mark.parametrize("name", ["vit", "resnet"])
    @pytest.mark.parametrize("published, arithmetic", [(True, torch.float16), (False, torch.float32)])
    @torch.no_grad()
    def test_half_precision_as_in_the_paper_s_code_or_as_engines_have_it(self, name, published, arithmetic):
        half, single = tiny.quantized(name, published=published), tiny.quantized(name, published=published)
        qwt2.compensate(half, tiny.batches(), "qwt")
        qwt2.compensate(single, tiny.batches(), "qwt", dtype="float32")
        block = single.quantization.blocks[0]  # later ones are fitted on different networks
        layer, exact = compensated_blocks(half)[block], compensated_blocks(single)[block]
        assert layer.weight.dtype == torch.float16 and layer.bias.dtype == torch.float32
        assert exact.weight.dtype == torch.float32
        assert torch.equal(layer.weight, exact.weight.half()) and torch.equal(layer.bias, exact.bias)
        [((x, bare), _)], [y] = record(half, f"{block}.compensation", [tiny.images(4)])
        operation = nn.functional.linear if name == "vit" else nn.functional.conv2d
        geometry = [] if name == "vit" else [None, layer.stride, 0, 1, layer.groups]
        added = operation(x.to(arithmetic), layer.weight.to(arithmetic), *geometry).float()
        bias = layer.bias if name == "vit" else layer.bias.reshape(1, -1, 1, 1)
        torch.testing.assert_close(y, bare + added + bias)

    def test_a_block_without_error_is_left_alone(self):
        """R^2 of nothing to explain is not positive."""
        model = tiny.mlp(3)
        for layer in (model[3][1].fc1, model[3][1].fc2):
            layer.weight.zero_(), layer.bias.zero_()
        qmodel = qwt2.quantize(model, [tiny.images()], "minmax", qwt2.Precision(4, 4))
        modules = qwt2.compensate(qmodel, tiny.batches(8), "qwt").modules
        assert [m.kept for m in modules] == [True, False, True]
        assert modules[1].reason == "R^2 is not positive" and modules[1].r2 == -math.inf
        assert modules[1].sqnr_before_db == modules[1].sqnr_after_db == math.inf
        assert list(compensated_blocks(qmodel)) == [m.module for m in modules if m.kept]

    def test_positional_r2_rejects_what_pooled_keeps(self):
        """On copies of one image the error has no variance about its position's mean."""
        same = [tiny.images(1).expand(4, -1, -1, -1)] * 2
        pooled = qwt2.compensate(quantized("resnet"), same, "qwt").modules[0]
        assert pooled.kept and pooled.r2 > 0
        qmodel = quantized("resnet")
        positional = qwt2.compensate(qmodel, same, "qwt", r2="positional").modules[0]
        assert not positional.kept and positional.r2 <= 0 and positional.reason == "R^2 is not positive"
        assert positional.module not in compensated_blocks(qmodel)

    def test_positional_r2_in_closed_form(self):
        qmodel, batches = quantized("resnet"), tiny.batches(16, 8)
        twin, reference = copy.deepcopy(qmodel), full_precision_copy(qmodel)
        module = qwt2.compensate(copy.deepcopy(qmodel), batches, "qwt", r2="positional").modules[0]
        qwt2.compensate(qmodel, batches, "qwt", dtype="float32")  # the same regression, whatever the gate says
        x, q, f = (torch.cat(v) for v in zip(*block_triples(twin, reference, module.module, batches, "local")))
        error = (f - q).double()
        left = error - compensated_blocks(qmodel)[module.module].added(x).double()
        total = (error - error.mean(0)).square().sum()
        assert module.r2 == pytest.approx(float(1 - left.square().sum() / total), abs=1e-5)

    def test_blocks_that_change_the_number_of_positions_are_left_with_a_reason(self):
        class Pooling(tiny.MLPBlock):
            def forward(self, x):
                return super().forward(x).unflatten(1, (-1, 2)).mean(2)

        class Valid(nn.Module):
            """Two convolutions without padding."""

            def __init__(self):
                super().__init__()
                self.conv1, self.conv2 = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

            def forward(self, x):
                return self.conv2(torch.relu(self.conv1(x)))

        tokens = tiny.mlp(3)
        tokens[3][1] = Pooling(12)
        image = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1), nn.Sequential(tiny.ConvBlock(8, 8), Valid(), tiny.ConvBlock(8, 8)), nn.Flatten(), nn.Linear(8 * 28 * 28, 5)
        )
        for model in (tokens, image):
            qmodel = qwt2.quantize(tiny.randomize(model), [tiny.images()], "minmax", qwt2.Precision(4, 4))
            modules = qwt2.compensate(qmodel, tiny.batches(8), "qwt").modules
            assert [m.kept for m in modules] == [True, False, True]
            assert modules[1].reason == "input and output positions differ"
            assert modules[1].module not in compensated_blocks(qmodel)

    def test_needs_blocks(self):
        qmodel = qwt2.quantize(tiny.captured(tiny.vit), [tiny.images()], "minmax", blocks=[])
        with pytest.raises(qwt2.Qwt2Error, match="no blocks"):
            qwt2.compensate(qmodel, tiny.batches(), "qwt")


def _residual(x: np.ndarray, y: np.ndarray, damping: float) -> np.ndarray:
    """What the damped regression of y on [x, 1] leaves: least squares with one more row an input."""
    centred = x - x.mean(0)
    ridge = np.sqrt(damping * (centred**2).sum(0).mean())
    rows_ = np.concatenate([centred, ridge * np.eye(x.shape[1])])
    weight = np.linalg.lstsq(rows_, np.concatenate([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    return y - y.mean(0) - centred @ weight


METHODS = [
    *((name, {}) for name in COMPENSATIONS.names()),
    ("cwac", {"granularity": "block"}), ("cwac", {"order": "one_pass"}), ("qwt", {"target": "global"}),
]  # fmt: skip


class TestOffloading:
    @pytest.mark.parametrize("name", ["swin", "resnet", "overwriting"])
    @pytest.mark.parametrize("method, options", METHODS)
    def test_disk_and_memory_give_identical_models(self, name, method, options, tmp_path):
        in_memory, on_disk = quantized(name), quantized(name)
        qwt2.compensate(in_memory, tiny.batches(8), method, **options)
        qwt2.compensate(on_disk, tiny.batches(8), method, offload_dir=str(tmp_path), **options)
        assert_same_state(in_memory, on_disk)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("limit, expected", [(0, 5), (10**9, 0)])
    def test_what_exceeds_the_limit_really_goes_to_disk(self, limit, expected, tmp_path, monkeypatch):
        own, seen = ActivationStore.__setitem__, []

        def put(self, *item):
            own(self, *item)
            seen.append(len([path for path in tmp_path.rglob("*") if path.is_file()]))

        monkeypatch.setattr(ActivationStore, "__setitem__", put)
        qwt2.compensate(quantized("mlp"), tiny.batches(8), "cwac", offload_dir=str(tmp_path), memory_limit=limit)
        assert max(seen) == expected  # two batches in two networks, and the held-out one's stream

    @pytest.mark.parametrize("limit", [0, 20_000, 10**9])
    def test_results_do_not_depend_on_the_limit(self, limit, tmp_path):
        in_memory, mixed = quantized("vit"), quantized("vit")
        qwt2.compensate(in_memory, tiny.batches(8))
        qwt2.compensate(mixed, tiny.batches(8), offload_dir=str(tmp_path), memory_limit=limit)
        assert_same_state(in_memory, mixed)

    @pytest.mark.parametrize("growth", [0.0, 1.0, 100.0])
    def test_results_do_not_depend_on_what_is_kept_and_what_computed_again(self, growth, monkeypatch):
        usual, other = quantized("swin"), quantized("swin")
        qwt2.compensate(usual, tiny.batches(8))
        monkeypatch.setattr(walk, "GROWTH", growth)
        qwt2.compensate(other, tiny.batches(8))
        assert_same_state(usual, other)

    def test_nothing_stays_on_disk_after_an_error(self, tmp_path):
        qmodel = quantized("vit")
        qmodel.blocks[1].mlp.fc1.bias[0] = math.nan
        with pytest.raises(qwt2.Qwt2Error):
            qwt2.compensate(qmodel, tiny.batches(), "cwac", offload_dir=str(tmp_path))
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_does_not_exist_is_named(self, tmp_path):
        with pytest.raises(qwt2.Qwt2Error, match="nowhere"):
            qwt2.compensate(quantized("mlp"), tiny.batches(), "cwac", offload_dir=str(tmp_path / "nowhere"))


class TestErrors:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize(
        "method, options, named",
        [
            ("cwac", {}, "blocks.1.mlp.fc1"),
            ("cwac", {"order": "one_pass", "gate": "none"}, "blocks.1.mlp.fc1"),
            ("cwac", {"granularity": "block"}, "blocks.1"),
            ("qwt", {}, "blocks.1"),
            ("qwt", {"target": "global"}, "blocks.1"),
        ],
    )
    def test_a_module_that_gives_nan_or_infinity_is_named(self, method, options, named, bad):
        qmodel = quantized("vit")
        qmodel.blocks[1].mlp.fc1.bias[0] = bad
        with pytest.raises(qwt2.Qwt2Error, match=rf"^{named} gives NaN or infinity"):
            qwt2.compensate(qmodel, tiny.batches(), method, **options)

    @pytest.mark.parametrize("method", ["cwac_paper", "qwt", "refit"])
    @pytest.mark.parametrize("target", ["global", "local"])
    def test_overflow_of_the_full_precision_network_alone_is_an_error(self, method, target):
        """Quantizers clip what overflows, so that only the target is infinite."""
        qmodel = quantized("mlp")
        qmodel.get_submodule("3.1.fc2").weight[0] = 3e38
        with pytest.raises(qwt2.Qwt2Error, match=r"^3\.1(\.fc2)? gives NaN or infinity"):
            qwt2.compensate(qmodel, tiny.batches(8), method, target=target)

    def test_nan_in_a_held_out_batch_alone_names_the_module(self):
        """It must not pass for a module without gain."""
        qmodel = quantized("mlp")
        first = qmodel.quantization.layers[0]
        with pytest.raises(qwt2.Qwt2Error, match=rf"^{first} gives NaN or infinity"):
            qwt2.compensate(qmodel, [*tiny.batches(12), tiny.images(4).clamp(-2, 2) * 1.6e38], "cwac")

    @pytest.mark.parametrize("method, options", METHODS)
    def test_an_exception_leaves_the_network_s_methods_and_mode_as_they_were(self, method, options):
        qmodel = quantized("vit")

        def fail(*_):
            if torch.is_grad_enabled():
                raise AssertionError("a test of the library ran with gradients")
            raise KeyboardInterrupt

        handle = qmodel.get_submodule("blocks.1.attn.matmul1").register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            qwt2.compensate(qmodel, tiny.batches(), method, **options)
        handle.remove()
        assert [n for n, m in qmodel.named_modules() if n and "forward" in vars(m)] == []
        assert all(m.quantized for m in qmodel.modules() if isinstance(m, QuantizedModule))
        assert torch.is_grad_enabled()
        assert torch.isfinite(qmodel(tiny.images(2))).all()

    @pytest.mark.parametrize(
        "method, options, valid",
        [
            ("cwac", {"target": "x"}, "stream, global, local"),
            ("cwac", {"order": "x"}, "sequential, one_pass"),
            ("cwac", {"granularity": "x"}, "module, block"),
            ("cwac", {"estimator": "x"}, "branch, least_squares, moment, bias_only"),
            ("cwac", {"gate": "x"}, "stream, module, channel, none"),
            ("cwac", {"holdout": 0.0}, "between 0 and 1"),
            ("cwac", {"holdout": 1}, "between 0 and 1"),
            ("cwac", {"holdout": "half"}, "between 0 and 1"),
            ("cwac", {"gat": "module"}, "target, order, granularity, estimator, gate, ranges, holdout"),
            ("cwac", {"ranges": "x"}, "minmax, percentile, mse"),
            ("refit", {"ranges": "x"}, "minmax, percentile, mse"),
            ("refit", {"target": "x"}, "stream, global, local"),
            ("refit", {"ridges": [0]}, "above 0"),
            ("refit", {"ridges": 0.05}, "list"),
            ("refit", {"holdout": 1.0}, "between 0 and 1"),
            ("refit", {"rows_per_input": 0}, "whole number"),
            ("qwt", {"target": "x"}, "local, global"),
            ("qwt", {"dtype": "float8"}, "float16, float32"),
            ("qwt", {"r2": "x"}, "pooled, positional"),
            ("qwt", {"kernel_size": 2}, "odd"),
            ("qwt", {"kernel_size": "3"}, "odd"),
            ("qwt", {"damping": -1.0}, "damping"),
            ("qwt", {"channels_per_group": 0}, "channels_per_group"),
            ("affine", {}, ", ".join(COMPENSATIONS.names())),
        ],
    )
    def test_bad_settings_are_refused_with_the_valid_ones(self, method, options, valid):
        with pytest.raises(qwt2.Qwt2Error, match=valid) as error:
            qwt2.compensate(quantized("mlp"), tiny.batches(), method, **options)
        assert str(error.value).startswith((method, "unknown compensation method 'affine'"))

    def test_a_float_model_is_refused(self):
        with pytest.raises(qwt2.Qwt2Error, match="VisionTransformer is not a quantized model"):
            qwt2.compensate(tiny.vit(), tiny.batches())

    def test_an_empty_calibration_set_is_refused(self):
        with pytest.raises(qwt2.Qwt2Error, match="empty"):
            qwt2.compensate(quantized("mlp"), [])


def test_calibration_is_gone_through_once_and_may_hold_labels():
    first, second = quantized("mlp"), quantized("mlp")
    qwt2.compensate(first, tiny.batches(8))
    qwt2.compensate(second, ((batch, torch.zeros(len(batch))) for batch in tiny.batches(8)))
    assert_same_state(first, second)


def test_report_counts_its_seconds_and_its_method():
    started = time.perf_counter()
    report = qwt2.compensate(quantized("mlp"), tiny.batches(8))
    assert report.method == "cwac" and 0 < report.seconds <= time.perf_counter() - started


def test_weights_and_quantizers_stay_as_they_were():
    qmodel = quantized("vit")
    before = copy.deepcopy(qmodel.state_dict())
    qwt2.compensate(qmodel, tiny.batches(8), "cwac_paper")
    after = qmodel.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {n.rpartition(".")[2] for n in after.keys() - before.keys()} == {"alpha", "beta"}
    assert any(layer.alpha is not None for layer in quantized_layers(qmodel).values())


@pytest.mark.parametrize("gate", ["none", "module", "channel"])
def test_reports_tell_the_distribution_and_what_the_gate_saw(gate):
    qmodel = tiny.quantized("vit", 3, 4)
    for module in qwt2.compensate(qmodel, tiny.batches(), "cwac_paper", gate=gate).modules:
        told = fit_record(module)
        for name, values in (("alpha", module.alpha.numpy()), ("beta", module.beta.numpy())):
            for suffix, share in {"min": 0, "p05": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}.items():
                assert told[f"{name}_{suffix}"] == pytest.approx(np.percentile(values, share), rel=1e-9, abs=1e-12)
        if gate == "none":
            assert told["gate_before_db"] is None and told["gate_after_db"] is None and module.kept
        elif gate == "module":
            assert module.kept == (told["gate_after_db"] > told["gate_before_db"])
            assert module.kept or f"{told['gate_before_db']:.2f} dB without" in module.reason
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_the_output_s_size_is_the_target_s():
    qmodel = tiny.quantized("vit", 4, 4)
    reference = full_precision_copy(qmodel)
    report = qwt2.compensate(qmodel, tiny.batches(), "cwac")
    _, outputs = record(reference, "head", tiny.batches())
    assert report.modules[-1].output_rms == pytest.approx(float(torch.cat(outputs).double().square().mean().sqrt()), rel=1e-6)


@pytest.mark.parametrize("name", ["vit", "mlp"])
def test_cwac_finds_what_the_implementation_that_stores_everything_finds(name):
    qmodel = tiny.quantized("vit", 4, 4) if name == "vit" else quantized("mlp")
    stored = Stored(copy.deepcopy(qmodel), tiny.batches()).cwac()
    report = qwt2.compensate(qmodel, tiny.batches(), "cwac_paper", gate="none")
    assert list(stored) == [module.module for module in report.modules]
    # Roundings that fall differently in float32 change what later layers see; the first ones see the same.
    for module in report.modules[:3]:
        alpha, beta = stored[module.module]
        torch.testing.assert_close(alpha, module.alpha, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(beta, module.beta, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vit", "mlp"])
def test_qwt_finds_what_the_implementation_that_stores_everything_finds(name):
    qmodel = tiny.quantized("vit", 4, 4) if name == "vit" else quantized("mlp")
    first = qmodel.quantization.blocks[0]
    stored = Stored(copy.deepcopy(qmodel), tiny.batches()).qwt()
    qwt2.compensate(qmodel, tiny.batches(), "qwt", dtype="float32", damping=0.0)
    layer = compensated_blocks(qmodel)[first]
    torch.testing.assert_close(layer.weight, stored[first][0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(layer.bias, stored[first][1], rtol=1e-2, atol=1e-3)
