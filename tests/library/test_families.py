"""Families of timm's that differ in their wiring: captured, with BatchNorm folded, each is the function it was."""

import pytest
import timm
import torch
from torch import nn

from qwt2.capture import wiring
from qwt2.capture.export import capture
from qwt2.capture.normalise import fold_batchnorms
from tests.support.graphs import operations
from tests.support.tiny_models import randomize

pytestmark = pytest.mark.slow

# Small members of those whose wiring no other test has, and the size of image that they take here;
# `benchmarks/families.py` takes all families.
FAMILIES = {
    "test_byobnet": 32, "test_convnext": 32, "test_efficientnet": 32, "test_nfnet": 32, "test_vit3": 32, "ghostnet_050": 32,
    "edgenext_xx_small": 64, "xcit_nano_12_p8_224": 32,
}  # fmt: skip
# A layer on positions alone gives constants.
CONSTANT = {"pos_embed.token_projection"}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_same_and_every_layer_is_found(family):
    sized = {"img_size": FAMILIES[family]} if "vit" in family else {}
    # timm's own residual branches start at almost zero, which would hide them.
    model = randomize(timm.create_model(family, pretrained=False, num_classes=5, **sized))
    x = torch.randn(3, 3, FAMILIES[family], FAMILIES[family], generator=torch.Generator().manual_seed(0))
    expected = model(x)
    graph = capture(model, x[:2])
    assert expected.std() > 0 and (graph(x) - expected).norm() <= 1e-4 * expected.norm()
    graph.edit(fold_batchnorms)
    assert (graph(x) - expected).norm() <= 1e-4 * expected.norm()
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert layers - set(wiring.layers(graph)) <= CONSTANT and not wiring.float_operations(graph)
    assert not any(name.startswith("scaled_dot_product") for name in operations(graph))
