"""Targets at residual streams, ranges chosen again, and the refit, against passes through whole networks."""

import copy

import numpy as np
import pytest
import timm
import torch

import qwt2
from qwt2.compensation.methods import COMPENSATIONS
from qwt2.compensation.methods.cwac import CHANCE, held_out_batches, shrunk
from qwt2.compensation.moments import Moments
from qwt2.engines import load_engine
from qwt2.quantization.info import quantized_layers
from qwt2.quantization.layers import QuantizedAdd, QuantizedLayer
from qwt2.quantization.observers import observe
from qwt2.quantization.streams import branch_end, joint
from qwt2.quantization.walk import Walk
from tests.support import tiny_models as tiny
from tests.support.oracles import affine, full_precision_copy, layer_pairs, recording, rows, values_of

NETWORKS = ["vit", "swin", "resnet", "mobilenet"]


def joints(qmodel) -> dict:
    found = {name: joint(qmodel, calls[0]) for name, calls in qmodel.calls(QuantizedLayer).items()}
    return {name: known for name, known in found.items() if known is not None}


def test_the_ends_of_branches_are_found():
    assert list(joints(tiny.quantized("vit", 4, 4))) == [f"blocks.{i}.{n}" for i in range(2) for n in ("attn.proj", "mlp.fc2")]
    ends = joints(tiny.quantized("resnet", 4, 4))
    assert all(name.endswith(("conv2", "downsample.0")) for name in ends) and ends
    assert all(not name.endswith("conv2") for name in quantized_layers(tiny.quantized("resnet", 4, 4)) if name not in ends)
    swin = joints(tiny.quantized("swin", 4, 4))
    assert any(known.moves for known in swin.values())  # windows are put back in their places


def test_a_layer_scale_does_not_hide_the_end_of_a_branch():
    """It is folded into the layer before it, so that what the stream lacks is the layer's target."""
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5, init_values=0.1
    )
    qmodel = qwt2.quantize(tiny.randomize(model), tiny.batches(), "repq")
    assert list(joints(qmodel)) == ["blocks.0.attn.proj", "blocks.0.mlp.fc2"]
    with qwt2.full_precision(qmodel), torch.no_grad():
        torch.testing.assert_close(qmodel(tiny.images()), model(tiny.images()), rtol=1e-4, atol=1e-5)


class Given(torch.nn.Module):
    """Stands in for a layer and returns given outputs, batch after batch."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, x):
        return next(self.outputs)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_target_is_what_the_stream_lacks(name):
    """With the target in place of its output, the stream behind the addition is the full-precision network's."""
    qmodel, batches = tiny.quantized(name, 3, 4), tiny.batches(8)
    reference = full_precision_copy(qmodel)
    walk, seen = Walk(copy.deepcopy(qmodel), batches), 0
    for visit in walk.visits(QuantizedLayer):
        targets = [target for _, _, target in visit.layer_outputs("stream")]
        if (known := visit.joint()) is None:
            continue
        seen += 1
        twin = copy.deepcopy(qmodel)
        twin.set_module(visit.name, Given(targets))
        addition = twin.get_submodule(str(known.addition.target))
        if isinstance(addition, QuantizedAdd):  # the sum before the layer's own side is rounded
            setattr(addition, ("b_quantizer", "a_quantizer")[known.side], None)
        [end] = twin.calls(type(addition))[str(known.addition.target)]
        [exact] = reference.calls(type(addition))[str(known.addition.target)]
        for batch in batches:
            [found], [expected] = values_of(twin, [end], batch), values_of(reference, [exact], batch)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert seen


@pytest.mark.parametrize("name", ["vit", "resnet"])
@torch.no_grad()
def test_the_gate_decides_by_the_stream_behind_the_branch(name):
    """Every decision, from whole passes of the held-out images with and without the parameters of the other images."""
    qmodel, batches = tiny.quantized(name, 8, 8), tiny.batches(16, 2)
    held = sorted(held_out_batches(8, 0.25))
    reference, twin = full_precision_copy(qmodel), copy.deepcopy(qmodel)
    report = qwt2.compensate(qmodel, batches, "cwac", gate="stream", estimator="moment", target="global", ranges=None)
    kept = {module.module: (module.alpha, module.beta) if module.kept else (None, None) for module in report.modules}
    seen = set()
    for module, parameters in kept.items():
        layer, [call] = twin.get_submodule(module), twin.calls(QuantizedLayer)[module]
        end = branch_end(twin, call)
        if end is not None and joint(twin, call) is None:
            pairs = [pair for i, pair in enumerate(layer_pairs(twin, reference, module, batches, "global")) if i not in held]
            trial = affine(*(rows(outputs, layer.channel_axis) for outputs in zip(*pairs)), "moment")
            errors = []
            for alpha, beta in ((None, None), map(torch.from_numpy, trial)):
                layer.set_compensation(alpha, beta)
                errors.append(sum(stream_error(twin, reference, end, batches[i]) for i in held))
            if abs(errors[1] / errors[0] - 1) > 1e-4:  # else rounding decides
                assert (parameters[0] is not None) == (errors[1] < errors[0]), module
                seen.add(parameters[0] is not None)
        layer.set_compensation(*parameters)
    assert seen == {True, False} or name == "resnet"


def stream_error(model, reference, end, batch) -> float:
    [exact_end] = [node for node in reference.graph.nodes if node.name == end.name]
    [found], [exact] = values_of(model, [end], batch), values_of(reference, [exact_end], batch)
    return float((found - exact).double().square().sum())


@pytest.mark.parametrize("method", ["cwac", "refit"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
@torch.no_grad()
def test_ranges_fit_the_compensated_network(name, method):
    """Each input of fewer than 8 bits has the range that the observer chooses on what it reads in the finished network."""
    qmodel, batches = tiny.quantized(name, 4, 4), tiny.batches(8)
    qwt2.compensate(qmodel, batches, method, ranges="minmax")
    for layer_name, layer in quantized_layers(qmodel).items():
        if layer.input_quantizer.grid.bits == 8:
            continue
        with recording(qmodel, layer_name) as (arguments, _):
            for batch in batches:
                qmodel(batch)
        x = torch.cat([x for (x,), _ in arguments])
        scale, zero_point = observe("minmax", x.reshape(1, -1), layer.input_quantizer.grid)
        torch.testing.assert_close(layer.input_quantizer.scale, scale[0], rtol=5e-3, atol=0)  # ties widen it
        assert float((layer.input_quantizer.zero_point - zero_point[0]).abs()) <= 1


class TestShrinkage:
    """Parameters of y_f = a y_q + b + noise, from n images of one value each."""

    def test_leaves_nothing_where_there_is_nothing_to_gain(self):
        """Least squares on few images makes new images worse; what is kept of it does not."""
        harm = {"kept": 0.0, "all": 0.0}
        for seed in range(200):
            alpha, beta, moments = self.fitted(8, a=1.0, b=0.0, seed=seed)
            for name, (slope, shift) in {"all": (alpha, beta), "kept": shrunk(alpha, beta, moments, 8)}.items():
                harm[name] += float((slope - 1).square().mean() + shift.square().mean())  # of new values, variance 1
        assert harm["kept"] < 0.25 * harm["all"]

    def test_keeps_what_many_images_agree_on(self):
        alpha, beta, moments = self.fitted(5000, a=0.8, b=0.5, seed=0)
        slope, shift = shrunk(alpha, beta, moments, 5000)
        torch.testing.assert_close(slope, alpha, rtol=1e-2, atol=0)
        torch.testing.assert_close(shift, beta, rtol=1e-2, atol=0)

    def test_shares_follow_their_closed_form(self):
        n = 24
        alpha, beta, moments = self.fitted(n, a=0.5, b=0.7, seed=1)
        y_q, y_f = self.values(n, 0.5, 0.7, 1)
        error, gap = (y_f - y_q).var(0, unbiased=False).sum(), (y_f - y_q).mean(0)
        left = (y_f - alpha * y_q).var(0, unbiased=False).sum()
        slope, shift = shrunk(alpha, beta, moments, n)
        torch.testing.assert_close(slope, 1 + (1 - CHANCE * left / (n * (error - left))) * (alpha - 1))
        kept = 1 - CHANCE * error / (n * gap.square().sum())
        torch.testing.assert_close(slope * y_q.mean(0) + shift, y_q.mean(0) + kept * gap)

    def values(self, n, a, b, seed):
        y_q, noise = torch.randn(2, n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return y_q, a * y_q + b + 0.3 * noise

    def fitted(self, n, a, b, seed):
        moments = Moments.of(*self.values(n, a, b, seed), 1)
        alpha = moments.cov / moments.var_q
        return alpha, moments.mean_f - alpha * moments.mean_q, moments


class TestRefit:
    @pytest.mark.parametrize("name", NETWORKS)
    @torch.no_grad()
    def test_brings_the_network_closer_on_other_images_than_cwac(self, name):
        errors = {}
        for method in ("cwac_paper", "refit"):
            qmodel = tiny.quantized(name, 3, 8)
            exact = full_precision_copy(qmodel)(tiny.images(32, 5))
            qwt2.compensate(qmodel, tiny.batches(64, 16), method)
            errors[method] = float((qmodel(tiny.images(32, 5)) - exact).square().sum())
        assert errors["refit"] < errors["cwac_paper"]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", NETWORKS)
    def test_changes_nothing_but_codes_scales_and_biases(self, name, tmp_path):
        """It stores what plain PTQ stores, also in a file that integer engines run as the simulation does."""
        plain = tiny.quantized(name, 4, 8)
        qmodel = copy.deepcopy(plain)
        qwt2.compensate(qmodel, tiny.batches(16, 8), "refit")
        qwt2.save_quantized(qmodel, tmp_path / "model.safetensors")
        loaded = qwt2.load_quantized(tiny.captured(tiny.BUILDERS[name]), tmp_path / "model.safetensors")
        images = tiny.images(4, 9)
        assert torch.equal(loaded(images), qmodel(images))
        for layer in quantized_layers(qmodel).values():
            grid = layer.weight_quantizer.grid
            assert int(layer.weight_codes.min()) >= grid.qmin and int(layer.weight_codes.max()) <= grid.qmax
        folded = {key: qwt2.fold(model) for key, model in (("plain", plain), ("refit", qmodel))}
        shapes = [{n: (t.shape, t.dtype) for n, t in model.state_dict().items()} for model in folded.values()]
        assert shapes[0] == shapes[1]
        path = qwt2.export_onnx(folded["refit"], tmp_path / "model.onnx", images)
        found, expected = load_engine(path, "onnxruntime")(images.numpy()), qmodel(images).detach().numpy()
        assert np.abs(found - expected).max() <= 2 * np.ptp(expected) / 255

    def test_keeps_a_weight_that_no_ridge_improves(self):
        """With codes of 8 bits and enough noise in the targets, held-out images prefer the original weight somewhere."""
        qmodel = tiny.quantized("vit", 8, 8)
        report = qwt2.compensate(qmodel, tiny.batches(8, 4), "refit", ridges=[1e-6])
        assert any(module.ridge != 1e-6 for module in report.modules)

    def test_needs_two_batches(self):
        with pytest.raises(qwt2.Qwt2Error, match="at least two calibration batches"):
            qwt2.compensate(tiny.quantized("vit", 4, 4), [tiny.images()], "refit")


def test_every_compensation_is_in_the_registry():
    assert {"cwac", "cwac_paper", "qwt", "qwt_global", "refit"} <= set(COMPENSATIONS.names())
