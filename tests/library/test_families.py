"""Families of timm's that differ in their wiring: captured, quantized, compensated, folded, and run by engines."""

import csv
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import qwt2
from qwt2.capture import wiring
from qwt2.capture.export import capture
from qwt2.capture.graph import Product
from qwt2.capture.normalise import fold_batchnorms
from qwt2.quantization.allocation import centred_sqnr_db
from tests.support.graphs import operations
from tests.support.tiny_models import randomize

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Whose graph only is compared: dla46x_c amplifies noise by 40 dB with random weights; no other test has the others' wiring.
OTHERS = ["dla46x_c", "test_vit3", "ghostnet_050", "xcit_nano_12_p8_224"]
# The smallest other families of the list that `benchmarks.zoo` takes.
with (ROOT / "benchmarks/zoo.csv").open(newline="") as file:
    TIMM = [row["model"] for row in csv.DictReader(file) if row["source"] == "timm"]
SMALLEST = [model for model in TIMM if model not in OTHERS][:12]
SIZE = 64
IMAGES = torch.randn(24, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
OTHER_IMAGES = torch.randn(96, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
# Networks with random weights pass every rounding on: with one layer of 36 compensated or not, outputs move by 1.4 dB.
NOISE_DB = 1.5
LOWEST_DB = 3.0  # random networks pass errors on from layer to layer; other outputs than the model's have 0 dB or less
# Layers on positions alone give constants.
CONSTANT = ("pos_embed.token_projection", "rel_pos.mlp.fc1", "rel_pos.mlp.fc2")


def built(family: str, images: torch.Tensor) -> nn.Module:
    """The model with random weights that pass a signal on, and the images' statistics in its BatchNorms."""
    sized = {"img_size": SIZE} if family.startswith(("test_vit", "test_coatnet")) else {}
    model = randomize(timm.create_model(family, pretrained=False, num_classes=5, **sized))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = 1.0
    model(images)
    return model.eval()


def checked_graph(model: nn.Module, x: torch.Tensor, expected: torch.Tensor):
    """The graph, which computes the same, has every layer and has taken attention apart."""
    graph = capture(model, x[:2])
    assert expected.std() > 0 and (graph(x) - expected).norm() <= 1e-4 * expected.norm()
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and not n.endswith(CONSTANT)}
    assert layers <= set(wiring.layers(graph)) and not wiring.float_operations(graph)
    assert not any(name.startswith("scaled_dot_product") for name in operations(graph))
    return graph


@torch.no_grad()
@pytest.mark.parametrize("family", OTHERS)
def test_it_computes_the_same_and_every_layer_is_found(family):
    model = built(family, IMAGES)
    expected = model(IMAGES[:3])
    graph = checked_graph(model, IMAGES[:3], expected)
    graph.edit(fold_batchnorms)
    assert (graph(IMAGES[:3]) - expected).norm() <= 1e-4 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("family", SMALLEST)
def test_its_integer_files_are_close_to_the_model_on_other_images(family, tmp_path):
    calibration, test = list(OTHER_IMAGES[:64].split(16)), OTHER_IMAGES[64:]
    model = built(family, OTHER_IMAGES[:64])
    expected = model(test)
    graph = checked_graph(model, test, expected)
    qmodel = qwt2.quantize(graph, calibration, "repq" if graph.calls(Product) else "percentile")
    plain = centred_sqnr_db([expected], [qmodel(test)])
    assert qmodel.quantization.blocks and not qmodel.quantization.float_modules
    qwt2.compensate(qmodel, calibration)
    compensated = centred_sqnr_db([expected], [qmodel(test)])
    path = qwt2.export_onnx(qwt2.fold(qmodel), tmp_path / "model.onnx", test[:2], check=False)
    assert compensated > max(plain - NOISE_DB, LOWEST_DB)
    for engine in ("onnxruntime", "openvino"):
        found = torch.from_numpy(qwt2.load_engine(path, engine)(test.numpy()))
        assert centred_sqnr_db([expected], [found]) > compensated - 2
