"""Methods, compensations and engines of other installed packages: found by their entry points, no file of this tree edited."""

import importlib
import sys

import numpy as np
import pytest
import torch

import qwt2
from qwt2.compensation.methods import COMPENSATIONS
from qwt2.engines import ENGINES
from qwt2.errors import Qwt2Error
from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.precision import Precision
from qwt2.registry import Registry
from tests.support.tiny_models import batches, images, vit

# Ranges of two thirds of what is seen: no method of this library has them.
METHOD = """
from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PTQMethod, Recipe


@PTQ_METHODS.register("narrow")
class Narrow(PTQMethod):
    recipe = Recipe(observer="minmax")

    def fit(self, walk, recipe):
        super().fit(walk, recipe)
        for name in walk.model.quantization.layers:
            quantizer = walk.model.get_submodule(name).weight_quantizer
            quantizer.set_parameters(quantizer.scale * 2 / 3, quantizer.zero_point)
"""
# The output's mean error is taken off, as a bias; alpha stays 1.
COMPENSATION = """
from dataclasses import dataclass

import torch

from qwt2.compensation.methods import COMPENSATIONS
from qwt2.compensation.report import ModuleReport
from qwt2.quantization.layers import QuantizedLayer


@COMPENSATIONS.register("mean_error")
@dataclass
class MeanError:
    share: float = 1.0

    def fit(self, walk, recipe):
        reports = []
        for visit in walk.visits(QuantizedLayer):
            errors = []
            for _, quantized, full in visit.layer_outputs("global"):
                errors.append((full - quantized).movedim(visit.module.channel_axis, -1).flatten(0, -2))
            beta = self.share * torch.cat(errors).mean(0)
            visit.module.set_compensation(torch.ones_like(beta), beta)
            reports.append(ModuleReport(visit.name, 0.0, 0.0, 0.0, True, ""))
        return reports
"""
ENGINE = """
import numpy as np

from qwt2.engines import ENGINES


@ENGINES.register("zeros")
class Zeros:
    def __init__(self, model, threads):
        self.outputs = [value.name for value in model.graph.output]

    def __call__(self, feeds):
        return {name: np.zeros((len(next(iter(feeds.values()))), 5), np.float32) for name in self.outputs}

    def operations(self):
        return []
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install packages of one module each: a module on the path, and its distribution's metadata beside it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in (PTQ_METHODS, COMPENSATIONS, ENGINES):
        registry.names()  # imports what this library has
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    modules = set(sys.modules)

    def add(package: str, source: str, group: str, name: str) -> None:
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        metadata = tmp_path / f"{module}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
        importlib.invalidate_caches()

    yield add
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


def weight_scales(model) -> list[torch.Tensor]:
    return [model.get_submodule(name).weight_quantizer.scale for name in model.quantization.layers]


def test_a_ptq_method_of_another_package(install):
    install("my-narrow", METHOD, "qwt2.ptq_methods", "narrow")
    assert "narrow" in PTQ_METHODS.names() and "my_narrow" not in sys.modules
    PTQ_METHODS.get("repq")
    assert "my_narrow" not in sys.modules  # it is imported when it is asked for
    plain, narrow = (qwt2.quantize(vit(), batches(), method, Precision(4, 4)) for method in ("minmax", "narrow"))
    for ours, theirs in zip(weight_scales(plain), weight_scales(narrow), strict=True):
        torch.testing.assert_close(theirs, ours * 2 / 3)


def test_a_compensation_of_another_package(install):
    install("my-mean-error", COMPENSATION, "qwt2.compensations", "mean_error")
    model = qwt2.quantize(vit(), batches(), "minmax", Precision(4, 8))
    before = qwt2.fold(model)(images())
    report = qwt2.compensate(model, batches(), "mean_error")
    assert [module.module for module in report.modules] == model.quantization.layers
    with torch.no_grad():
        gap = vit()(images()).mean(0) - qwt2.fold(model)(images()).mean(0)
    assert gap.abs().max() < 0.05 * (vit()(images()).mean(0) - before.mean(0)).abs().max()
    with pytest.raises(Qwt2Error, match="mean_error: unknown option 'target'; use some of: share"):
        qwt2.compensate(model, batches(), "mean_error", target="local")


@pytest.mark.slow
def test_an_engine_of_another_package(install, tmp_path):
    install("my-zeros", ENGINE, "qwt2.engines", "zeros")
    folded = qwt2.fold(qwt2.quantize(vit(), batches(), "minmax"))
    path = qwt2.export_onnx(folded, tmp_path / "model.onnx", images(1))
    assert np.array_equal(qwt2.load_engine(path, "zeros")(images(3).numpy()), np.zeros((3, 5)))


SAYS = {
    "taken": ("from qwt2.quantization.methods import PTQ_METHODS\nPTQ_METHODS.register('repq')(1)\n", "repq",
              "the PTQ method 'repq' of package my-taken cannot be used: the name 'repq' is taken by another PTQ method; "
              "correct or uninstall that package"),
    "broken": ("import absent_library\n", "broken",
               "the PTQ method 'broken' of package my-broken cannot be used: ModuleNotFoundError: No module named "
               "'absent_library'; correct or uninstall that package"),
    "half": ("from qwt2.quantization.methods import PTQ_METHODS\nPTQ_METHODS.register('half')(1)\nraise ValueError('two\\nlines')\n",
             "half", "the PTQ method 'half' of package my-half cannot be used: ValueError: two; correct or uninstall that package"),
    "empty": ("", "empty", "the PTQ method 'empty' of package my-empty cannot be used: my_empty registers nothing of that "
                           "name; correct or uninstall that package"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAYS)
def test_a_plugin_that_cannot_be_used_is_named_in_one_sentence(install, case):
    source, name, sentence = SAYS[case]
    install(f"my-{case}", source, "qwt2.ptq_methods", name)
    for _ in range(2):  # the second time as the first: nothing of it stays
        with pytest.raises(Qwt2Error) as error:
            PTQ_METHODS.get(name)
        assert str(error.value) == sentence
    assert PTQ_METHODS.get("minmax").recipe.observer == "minmax"  # other names work


def test_two_packages_with_one_name(install):
    install("my-first", METHOD, "qwt2.ptq_methods", "narrow")
    install("my-second", METHOD, "qwt2.ptq_methods", "narrow")
    with pytest.raises(Qwt2Error, match=r"of package my-(first|second) cannot be used: the name 'narrow' is taken"):
        PTQ_METHODS.get("narrow")


def test_an_unknown_name_lists_plugins(install):
    install("my-narrow", METHOD, "qwt2.ptq_methods", "narrow")
    with pytest.raises(Qwt2Error, match="unknown PTQ method 'narow'; use one of: .*minmax, mse, narrow, percentile"):
        PTQ_METHODS.get("narow")


def test_packages_are_looked_into_once(monkeypatch):
    """A page of runs asks for names thousands of times, and each look reads the metadata of every installed package."""
    asked = []
    monkeypatch.setattr("qwt2.registry.entry_points", lambda **wanted: asked.append(wanted) or ())
    fresh = Registry("thing", "qwt2.quantization.methods", "qwt2.nobody_has_this")
    for _ in range(3):
        assert fresh.names() == []
        with pytest.raises(Qwt2Error, match="unknown thing"):
            fresh.get("nothing")
    assert asked == [{"group": "qwt2.nobody_has_this"}]
