"""Whole networks against the public RepQ-ViT and QwT code, within the noise floors that it was measured to have.

A quantized network amplifies rounding: a value near a rounding boundary flips on a change of 1e-7 and everything
after it differs visibly. `tests/golden/README.md` gives how far the reference lands from its own repeats. Where every
array of the finished model is compared, `Golden.nearest` therefore looks for the float32 roundings of the reference.
"""

import functools
import math
import re

import pytest
import torch

import qwt2
from qwt2.capture.blocks import ends
from qwt2.quantization.layers import full_precision
from qwt2.quantization.methods import repq
from tests.support.golden_data import BUILDERS, Golden, captured, quantizer_parameters, section

pytestmark = pytest.mark.slow

# Convolutional networks are calibrated once and not re-parameterised.
TRANSFORMERS = pytest.mark.parametrize("golden", ["vit", "swin"], indirect=True)
NOT_SINGULAR = [("vit", "blocks.0"), ("resnet", "layer1.0")]


@pytest.fixture(params=list(BUILDERS))
def golden(request) -> Golden:
    return Golden(request.param)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def relative(found: dict, expected: dict) -> dict[str, float]:
    """Largest difference in every array, relative to the array's largest value."""
    differences = {}
    for key, reference in expected.items():
        assert key in found, key
        value, reference = found[key].double().reshape(-1), reference.double().reshape(-1)
        differences[key] = float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-12))
    return differences


def differing(found: dict, expected: dict, tolerance: float) -> list[str]:
    return [f"{key} by {value:.1e}" for key, value in relative(found, expected).items() if not value < tolerance]


def comparable(golden: Golden, part: str) -> dict[str, torch.Tensor]:
    """The reference's quantizer parameters in the units of timm's attention, which scales q and not the product."""
    values = {k: v for k, v in golden.under(f"{golden.configuration}/{part}").items() if not k.endswith("_bits")}
    if golden.model == "vit":
        head_dim = 16
        scaled = {k: v * head_dim**-0.5 for k, v in values.items() if k.endswith("matmul1/A_delta")}
        assert scaled
        values |= scaled
    return values


def first(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What depends on the patch embedding or stem and the first block alone."""
    return {k: v for k, v in values.items() if re.match(r"(blocks\.0|layers\.0\.blocks\.0|patch_embed|conv1|layer1\.0)\b", k)}


@pytest.fixture
def nearest(golden) -> torch.nn.Module:
    """Our quantized model, with the reference's roundings if any change of the last bits leads to them."""
    return _nearest(golden.model)


@functools.cache
def _nearest(model: str) -> torch.nn.Module:
    golden = Golden(model)
    weights, parameters = golden.under(f"{golden.configuration}/reparam"), comparable(golden, "ptq")

    def deviating(qmodel: torch.nn.Module) -> set[str]:
        off = differing(qmodel.state_dict(), weights, 1e-4) + differing(quantizer_parameters(qmodel), parameters, 1e-2)
        return {section(key) for key in off}

    return golden.nearest(deviating)


def test_float_logits(golden):
    assert torch.allclose(golden.network()(golden.test), golden["fp_logits"], atol=1e-4, rtol=0)


@TRANSFORMERS
def test_quantizers_after_calibration(golden, monkeypatch):
    monkeypatch.setattr(repq, "reparameterize", lambda *args: None)
    precision = qwt2.Precision(weight_bits=4, activation_bits=4)
    qmodel = qwt2.quantize(captured(golden.model), [golden.calibration[:32]], "repq_published", precision)
    expected = comparable(golden, "init")
    found = quantizer_parameters(qmodel)
    assert not differing(found, first(expected), 1e-5)
    assert not differing(found, expected, 5e-2)


@TRANSFORMERS
def test_reparameterisation(golden, nearest):
    state = golden.quantized().state_dict()
    expected = golden.under(f"{golden.configuration}/reparam")
    assert any("norm1" in key for key in expected) and any("qkv.weight" in key for key in expected)
    assert golden.model == "vit" or any("reduction.weight" in key for key in expected)
    assert not differing(state, first(expected), 1e-5)
    assert not differing(nearest.state_dict(), expected, 1e-4)


def test_quantizers_of_the_finished_model(golden, nearest):
    expected = comparable(golden, "ptq")
    found = quantizer_parameters(golden.quantized())
    assert set(found) == set(expected)  # the same operations are quantized, no more and no fewer
    assert not differing(found, first(expected), 1e-5)
    assert not differing(quantizer_parameters(nearest), expected, 1e-2)


def test_bit_widths(golden):
    qmodel = golden.quantized()
    expected = {k: v for k, v in golden.under(f"{golden.configuration}/ptq").items() if k.endswith("_bits")}
    assert expected
    for key, bits in expected.items():
        name, role = key.split("/")
        module = qmodel.get_submodule(name)
        quantizer = getattr(module, f"{role.split('_')[0].lower()}_quantizer")
        found = quantizer.bits if hasattr(quantizer, "bits") else quantizer.grid.bits
        assert found == int(bits), key


def shaped(golden: Golden, tokens: torch.Tensor) -> torch.Tensor:
    """timm's Swin blocks work on (N, H, W, C), the reference's on (N, H W, C)."""
    if golden.model != "swin":
        return tokens.clone()
    side = math.isqrt(tokens.shape[1])
    return tokens.reshape(tokens.shape[0], side, side, -1).clone()


def test_traces_block_by_block(golden, nearest):
    """Every block alone, on the reference's own input: rounding is not amplified across blocks."""
    qmodel = nearest
    traces = golden.under(f"{golden.configuration}/trace")
    blocks = sorted({key.split("/")[0] for key in traces})
    assert blocks == qmodel.quantization.blocks
    for name in blocks:
        block, x = block_of(qmodel, name), traces[f"{name}/in"]
        expected = traces[f"{name}/quant_out"]
        difference = (block(shaped(golden, x)).reshape(expected.shape) - expected).abs()
        with full_precision(qmodel):
            exact = block(shaped(golden, x)).reshape(expected.shape) - traces[f"{name}/fp_out"]
        assert exact.abs().max() < 1e-5, name
        assert (difference > 1e-5).float().mean() < 1e-2, name


def block_of(qmodel, name: str):
    """A block by itself, with what compensates it if anything does."""
    x, y = ends(qmodel, name)
    part = qmodel.between(x, [y])
    return lambda values: part(values)[0]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_logits_of_the_quantized_model(golden, bits):
    expected = golden.relative_error(golden[f"{configuration(golden, bits)}/ptq_logits"])
    precision = qwt2.Precision(weight_bits=bits, activation_bits=bits)
    found = golden.relative_error(golden.quantized(precision)(golden.test))
    assert found == pytest.approx(expected, rel=0.15, abs=0.02)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_qwt(golden, bits):
    """R^2 of every block, the gate, and the logits' error, to the reference's distance from its own repeats."""
    name = configuration(golden, bits)
    qmodel = golden.quantized(qwt2.Precision(weight_bits=bits, activation_bits=bits))
    options = {}
    if golden.model == "resnet":
        kernel, factor = map(int, re.search(r"k(\d)_f(\d+)", name).groups())
        options = {"kernel_size": kernel, "channels_per_group": factor, "r2": "positional"}
    report = qwt2.compensate(qmodel, golden.batches(), "qwt", **options)
    expected = golden.under(f"{name}/qwt")
    for module in report.modules:
        if module.module == "layers.0.blocks.0":
            continue  # singular: its input is a LayerNorm's output, and the reference returns noise
        r2 = float(expected[f"{module.module}/r2"])
        assert module.r2 == pytest.approx(r2, abs=0.03), module.module
        if abs(r2) > 0.03:
            assert module.kept == bool(expected[f"{module.module}/applied"]), module.module
    found = golden.relative_error(qmodel(golden.test))
    assert found == pytest.approx(golden.relative_error(golden[f"{name}/qwt_logits_half"]), rel=0.15, abs=0.02)


@pytest.mark.parametrize("model, block", NOT_SINGULAR)
def test_first_regression_and_the_compensated_block(model, block):
    """W, b, R^2 of the first block, and its output with the compensation in half precision."""
    golden = Golden(model)
    qmodel = golden.quantized()
    options = {"kernel_size": 3, "r2": "positional"} if model == "resnet" else {}
    report = qwt2.compensate(qmodel, golden.batches(), "qwt", damping=1e-9, **options)
    expected = {k.split("/")[1]: v for k, v in golden.under(f"{golden.configuration}/qwt").items() if k.startswith(f"{block}/")}
    layer = qmodel.get_submodule(f"{block}.compensation")
    weight = layer.weight.float() if model == "resnet" else layer.weight.float().T
    assert float((weight - expected["W"]).norm() / expected["W"].norm()) < 1e-2
    assert float((layer.bias - expected["b"]).norm() / expected["b"].norm()) < 1e-2
    assert report.modules[0].r2 == pytest.approx(float(expected["r2"]), abs=1e-4)
    trace = {k.split("/")[1]: v for k, v in golden.under(f"{golden.configuration}/trace").items() if k.startswith(f"{block}/")}
    difference = (block_of(qmodel, block)(trace["in"]) - trace["qwt_out_half"]).abs() / trace["qwt_out_half"].abs().max()
    assert difference.max() < 2e-3


def test_the_singular_block_of_swin_is_solved_as_in_float64():
    golden = Golden("swin")
    report = qwt2.compensate(golden.quantized(), golden.batches(), "qwt")
    exact = float(golden["w4a4/f64run/layers.0.blocks.0/r2"])
    assert report.modules[0].r2 == pytest.approx(exact, abs=5e-3)
    assert report.modules[0].kept and float(golden["w4a4/qwt/layers.0.blocks.0/applied"]) == 0


def configuration(golden: Golden, bits: int) -> str:
    if golden.model != "resnet":
        return f"w{bits}a{bits}"
    return {4: "w4a4_k3_f16", 6: "w6a6_k1_f16", 8: "w8a8_k1_f64"}[bits]
