"""The README's five lines on plain networks: function kept, modules of every engine within a step of the simulation."""

import copy
import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

import qwt2
from qwt2.engines import load_engine
from qwt2.evaluation.metrics import sqnr_db
from qwt2.evaluation.mismatch import engine_mismatch, record_modules
from qwt2.onnx.file import load_onnx
from qwt2.quantization.layers import QuantizedModule, full_precision
from tests.support import user_models
from tests.support.tiny_models import ENGINES

pytestmark = pytest.mark.slow


@cache
def quantized(name: str) -> tuple[nn.Module, nn.Module]:
    """The model and its quantized copy, to be read only."""
    model = user_models.make(name)
    return model, qwt2.quantize(model, user_models.inputs(name).split(4), user_models.MODELS[name][1])


@torch.no_grad()
@pytest.mark.parametrize("name", user_models.MODELS)
def test_quantizing_keeps_the_model_and_its_function(name):
    model, qmodel = quantized(name)
    fresh, x = user_models.make(name), user_models.inputs(name)
    assert torch.equal(model(x), fresh(x)) and list(model.state_dict()) == list(fresh.state_dict())
    with full_precision(qmodel):
        torch.testing.assert_close(qmodel(x), model(x), rtol=0, atol=2e-5)
    assert sqnr_db(qmodel(x).numpy(), model(x).numpy()) > 30


@pytest.mark.parametrize("name", user_models.MODELS)
def test_everything_is_quantized_or_listed_with_its_reason(name):
    _, qmodel = quantized(name)
    info = qmodel.quantization
    assert set(info.float_modules) == user_models.MODELS[name][2] and all(info.float_modules.values())
    # Nothing that runs is left, and what does not run is not there.
    assert not [n for n, m in qmodel.named_modules(remove_duplicate=False) if isinstance(m, (nn.Linear, nn.Conv2d, nn.modules.conv._ConvNd))]
    assert {n for n, m in qmodel.named_modules() if isinstance(m, QuantizedModule)} == {*info.layers, *info.matmuls}


@torch.no_grad()
@pytest.mark.parametrize("name", user_models.MODELS)
def test_engines_agree_module_by_module(name, tmp_path):
    model, qmodel = quantized(name)
    qmodel, x = copy.deepcopy(qmodel), user_models.inputs(name)
    report = qwt2.compensate(qmodel, x.split(4))
    assert [module.module for module in report.modules] == qmodel.quantization.layers
    simulated = qmodel(x).numpy()
    folded = qwt2.fold(qmodel)
    path = qwt2.export_onnx(folded, tmp_path / "model.onnx", x[:1])
    records, exact = record_modules(folded, x[:2]), model(x).numpy()
    for engine in ENGINES:
        mismatches = engine_mismatch(load_onnx(path), engine, records)
        assert set(mismatches) == {*qmodel.quantization.layers, *qmodel.quantization.matmuls}
        assert max(m.steps for m in mismatches.values()) <= 1.001
        logits = load_engine(path, engine)(x.numpy())
        # An 8-bit network, whole: roundings that fall differently, and nothing else.
        assert sqnr_db(logits, exact) > sqnr_db(simulated, exact) - 1.5


@torch.no_grad()
@pytest.mark.parametrize("name", ["root_attention", "tied_weights", "repeated_block", "weight_norm", "vit_b_16_small"])
def test_quantized_models_are_stored_and_loaded(name, tmp_path):
    model, qmodel = quantized(name)
    x = user_models.inputs(name)
    qwt2.save_quantized(qmodel, tmp_path / "model.safetensors")
    assert torch.equal(qwt2.load_quantized(model, tmp_path / "model.safetensors")(x), qmodel(x))


@torch.no_grad()
def test_products_in_a_root_s_forward_are_quantized_and_a_copy_is_another_model():
    _, qmodel = quantized("root_fused_attention")
    x = user_models.inputs("root_fused_attention")
    assert qmodel.quantization.matmuls == ["matmul1", "matmul2", "matmul3", "matmul4"]
    assert [qmodel.get_submodule(n).a_quantizer.grid.symmetric for n in qmodel.quantization.matmuls] == [True, False] * 2
    twin = copy.deepcopy(qmodel)
    expected = qmodel(x)
    assert torch.equal(twin(x), expected)
    twin.matmul1.a_quantizer.scale.mul_(50)
    assert not torch.equal(twin(x), expected) and torch.equal(qmodel(x), expected)


def test_a_root_that_branches_on_values_is_refused_with_its_line():
    model = user_models.randomize(user_models.Branching(fused=False))
    with pytest.raises(qwt2.Qwt2Error, match="Branching cannot be captured") as error:
        qwt2.quantize(model, user_models.inputs("root_attention").split(4))
    line = user_models.Branching.forward.__code__.co_firstlineno + 1
    assert f"{user_models.__file__}:{line};" in str(error.value) and "\n" not in str(error.value)


@torch.no_grad()
def test_an_attribute_called_like_a_product_is_left_alone():
    class Named(user_models.RootAttention):
        def __init__(self):
            super().__init__(fused=True, depth=1)
            self.matmul1 = nn.Linear(16, 16)

        def forward(self, x):
            return super().forward(x) + self.matmul1(self.stem(x).mean((2, 3))).sum()

    qmodel = qwt2.quantize(user_models.randomize(Named()), user_models.inputs("root_attention").split(4))
    assert qmodel.quantization.matmuls == ["matmul2", "matmul3"] and "matmul1" in qmodel.quantization.layers


def test_qwt_leaves_a_block_that_runs_several_times_and_says_so():
    _, qmodel = quantized("repeated_block")
    [module] = qwt2.compensate(copy.deepcopy(qmodel), user_models.inputs("repeated_block").split(4), "qwt").modules
    assert not module.kept and module.reason == "the block runs several times in one pass"


@torch.no_grad()
def test_a_shared_layer_is_fitted_on_all_its_runs():
    """alpha and beta of a layer that runs three times are the least squares over the inputs of all three."""
    model, qmodel = quantized("shared_linear")
    qmodel, x = copy.deepcopy(qmodel), user_models.inputs("shared_linear")
    seen = {"q": [], "f": []}
    for key, network in (("f", model), ("q", qmodel)):
        hook = network.shared.register_forward_pre_hook(lambda _, args, key=key: seen[key].append(args[0]))
        network(x)
        hook.remove()
    # embed, fitted before, is made exact, so that nothing but `shared` is compared.
    report = qwt2.compensate(qmodel, x.split(4), "cwac_paper", order="one_pass")
    [found] = [module for module in report.modules if module.module == "shared"]
    y_q = torch.cat([qmodel.shared.with_bias(qmodel.shared.products(v)) for v in seen["q"]]).flatten(0, -2).double().numpy()
    y_f = torch.cat([model.shared(v) for v in seen["f"]]).flatten(0, -2).double().numpy()
    for channel in range(16):
        slope, offset = np.polyfit(y_q[:, channel], y_f[:, channel], 1)
        assert found.alpha[channel] == pytest.approx(slope, rel=1e-6) and found.beta[channel] == pytest.approx(offset, abs=1e-6)


class Returning(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.fc, self.pack = nn.Linear(16, 4), pack

    def forward(self, x):
        return self.pack(self.fc(x))


@torch.no_grad()
@pytest.mark.parametrize(
    "model, layer",
    [
        (Returning(lambda y: (y, y)), "fc"), (Returning(lambda y: {"logits": y}), "fc"), (nn.Linear(16, 4), "linear1"),
        (nn.Sequential(nn.Conv1d(12, 4, 3)), "0"),
    ],
)  # fmt: skip
def test_models_of_one_layer_and_with_any_output_are_quantized(model, layer):
    x = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0))
    qmodel = qwt2.quantize(model.eval(), [x])
    [expected], [found] = ([y for y in tree_flatten(network(x))[0]][:1] for network in (model, qmodel))
    assert qmodel.quantization.layers == [layer] and type(model(x)) is type(qmodel(x))
    assert 30 < sqnr_db(found.numpy(), expected.numpy()) < 80
    with full_precision(qmodel):
        torch.testing.assert_close(qmodel(x), model(x))


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.GRU(16, 4), "GRU cannot be captured: its code takes the number of images for a constant"),  # its first axis is time
        (nn.GRU(16, 4, batch_first=True), "GRU runs no Linear or Conv2d layer on its input"),
        (Returning(lambda y: y if y.sum() > 0 else -y), "Returning cannot be captured: "),
    ],
)  # fmt: skip
def test_models_that_cannot_be_quantized_are_refused_in_one_sentence(model, message):
    with pytest.raises(qwt2.Qwt2Error) as error:
        qwt2.quantize(model, [torch.randn(4, 12, 16)])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


class Named(nn.Module):
    """A model whose parameters are called like its input and its outputs, as slot attention's are."""

    def __init__(self):
        super().__init__()
        self.images, self.slots = nn.Parameter(torch.randn(3, 1, 1)), nn.Parameter(torch.randn(4, 8))
        self.conv, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)

    def forward(self, pictures):
        keys = self.conv(pictures + self.images).flatten(2)
        return {"slots": self.fc(self.slots) + (self.slots @ keys).mean(-1, keepdim=True), "logits": keys}


@torch.no_grad()
def test_parameters_may_have_the_names_of_inputs_and_outputs(tmp_path):
    model, x = user_models.randomize(Named()), torch.randn(4, 3, 16, 16)
    qmodel = qwt2.quantize(model, [x], "percentile")
    qwt2.save_quantized(qmodel, tmp_path / "stored.safetensors")
    folded = qwt2.fold(qwt2.load_quantized(model, tmp_path / "stored.safetensors"))
    path = qwt2.export_onnx(folded, tmp_path / "model.onnx", x)
    found, expected = qwt2.load_engine(path, "onnxruntime")(x.numpy()), qmodel(x)
    assert found.keys() == expected.keys()
    for name, y in expected.items():
        assert (torch.from_numpy(found[name]) - y).norm() < 0.02 * y.norm()


class Written(nn.Module):
    """Layers and a function that calls them."""

    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module) if isinstance(module, nn.Module) else self.register_buffer(name, module)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def tokens(count: int = 8, width: int = 16) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def agree_on_engines(model, x, path, method="minmax", names=("onnxruntime", "openvino")) -> dict:
    """Quantize, fold and export; compare one and several images on engines; return what stayed in float."""
    randomized = user_models.randomize(model)
    qmodel = qwt2.quantize(randomized, x.split(len(x) // 2), method)
    expected = [y for y in tree_flatten(randomized(x.clone()))[0] if isinstance(y, torch.Tensor)]
    with full_precision(qmodel):
        found = [y for y in tree_flatten(qmodel(x))[0] if isinstance(y, torch.Tensor)]
    for exact, y in zip(expected, found, strict=True):
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=2e-5)
    file = qwt2.export_onnx(qwt2.fold(qmodel), path / "model.onnx", x[:1])
    for name in names:
        for images in (x[:1], x):
            outputs = load_engine(file, name)(images.numpy())
            simulated = [y for y in tree_flatten(qmodel(images))[0] if isinstance(y, torch.Tensor)]
            for y, exact in zip(outputs.values() if isinstance(outputs, dict) else [outputs], simulated, strict=True):
                assert y.shape == exact.shape and sqnr_db(y, exact.numpy()) > 35
    return qmodel.quantization.float_modules


def constants() -> dict:
    return {"a": nn.Linear(16, 8), "b": nn.Linear(8, 4), "scale": torch.rand(8) + 0.2, "offset": torch.randn(8)}


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.b(s.a(x) * 0.5), lambda s, x: s.b(s.a(x).relu() * s.scale + s.offset), lambda s, x: s.b(-s.a(x)),
        lambda s, x: s.b((s.a(x) - s.offset) / 2), lambda s, x: s.b((1 - s.a(x)) * s.scale),
        lambda s, x: s.b(s.a(x) * s.offset.sigmoid() * s.a(x).sigmoid()),
    ],
)  # fmt: skip
def test_scalings_behind_linears_of_few_rows_on_every_engine(function, tmp_path):
    """OpenVINO computes Linear, multiplication and quantizer wrongly in one kernel for fewer than 16 rows."""
    agree_on_engines(Written(function, **constants()), tokens(), tmp_path)


def test_batchnorm_behind_an_activation_of_few_rows(tmp_path):
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.BatchNorm1d(12), nn.Linear(12, 4))
    agree_on_engines(model, tokens(), tmp_path)


@pytest.mark.parametrize(
    "model, x",
    [
        # BatchNorm without parameters behind a Linear
        (nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12, affine=False), nn.ReLU(), nn.Linear(12, 4)), tokens()),
        # bounds of two Python types
        (Written(lambda s, x: s.b(s.a(x).clamp(-1, 0.5)), **constants()), tokens()),
        # a buffer called like an operation
        (Written(lambda s, x: s.b(s.a(x - x.mean(0, keepdim=True)[:0].sum(0) - s.mean)), a=nn.Linear(16, 8), b=nn.Linear(8, 4), mean=torch.ones(16)), tokens()),
        # submodules called like attributes of every captured graph
        (Written(lambda s, x: s.output(s.inputs(x).relu()), inputs=nn.Linear(16, 8), output=nn.Linear(8, 4)), tokens()),
        # writes into the input
        (Written(lambda s, x: s.b(s.a(x.sub_(0.5).mul_(2))), **constants()), tokens()),
        # numbers, None, and one tensor twice among the outputs
        (Written(lambda s, x: {"y": [y := s.b(s.a(x)), (y, None)], "n": 3, "count": x.shape[0]}, **constants()), tokens()),
        (nn.Sequential(nn.Conv1d(16, 8, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(40, 4)), torch.randn(8, 16, 5)),
        (nn.Sequential(nn.EmbeddingBag(9, 16, mode="mean"), nn.Linear(16, 8)), torch.arange(24).reshape(8, 3) % 9),
        (nn.DataParallel(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))), tokens()),
    ],
    ids=["batchnorm", "clamp", "buffer", "attributes", "in_place", "outputs", "circular", "bag", "wrapper"],
)  # fmt: skip
def test_constructs_of_users_code_agree_on_engines(model, x, tmp_path):
    assert agree_on_engines(model, x, tmp_path) == {}


def test_layers_under_autocast_stay_in_float_and_are_listed():
    def forward(s, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = s.a(x)
        return s.b(y.float())

    model = user_models.randomize(Written(forward, **constants()))
    info = qwt2.quantize(model, [tokens()], "minmax").quantization
    assert info.layers == ["b"] and info.float_modules == {"": "linear stays in float"}


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 4), nn.Linear(6, 4)

    def forward(self, image, meta):
        return self.a(image) + self.b(meta)


@torch.no_grad()
def test_batches_of_tuples_mappings_and_dictionaries_with_strings():
    from collections import UserDict

    model, x, meta = TwoInputs().eval(), tokens(4), torch.randn(4, 6)
    named = {"image": x, "meta": meta}
    for batch in ((x, meta), [x, meta, torch.zeros(4)], UserDict(named), named):
        assert sqnr_db(qwt2.quantize(model, [batch])(**named).numpy(), model(x, meta).numpy()) > 30
    with pytest.warns(UserWarning, match="path"):
        qwt2.quantize(model, [named | {"path": ["a.png"] * 4}])
    with pytest.raises(qwt2.Qwt2Error, match="entry 'meta' is a list"):
        qwt2.quantize(model, [{"image": x, "meta": [meta]}])


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


@pytest.mark.parametrize(
    "model, message",
    [
        (torch.jit.script(nn.Linear(16, 4)), "the model is TorchScript"), (nn.LazyLinear(4), "weight has no size yet"),
        (Written(lambda s, x: torch.cond(x.sum() > 0, s.a, s.c, (x,)), a=nn.Linear(16, 4), c=nn.Linear(16, 4)), "Written runs torch.cond"),
        (Written(lambda s, x: Output(s.a(x)), a=nn.Linear(16, 4)), r"Written cannot be captured: it returns a Output, unknown to PyTorch; call torch.export.register"),
        (Written(lambda s, x: s.a(x[:, "no"]), a=nn.Linear(16, 4)), "Written cannot run on"),
    ],
    ids=["torchscript", "lazy", "cond", "dataclass", "type_error"],
)  # fmt: skip
def test_what_is_not_a_graph_is_refused_in_one_sentence_and_nothing_is_printed(model, message, capfd):
    with pytest.raises(qwt2.Qwt2Error, match=message) as error:
        qwt2.quantize(model, [tokens()])
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")
