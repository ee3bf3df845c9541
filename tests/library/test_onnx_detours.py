"""Files compute on every engine what the model computes, also where an engine's own kernels are wrong."""

import numpy as np
import pytest
import torch
from torch import nn

import qwt2
from qwt2.evaluation.metrics import sqnr_db
from tests.support import tiny_models as tiny


class Extremes(nn.Module):
    """A classifier on the maxima or minima over an image's positions."""

    def __init__(self, kind: str):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 5)
        self.reduce = {
            "max": lambda x: x.amax((2, 3)),
            "min": lambda x: x.amin((2, 3), keepdim=True).flatten(1),
            "scaled": lambda x: 0.7 * x.amax((2, 3)),
            "pooled": lambda x: nn.functional.adaptive_max_pool2d(x, 1).flatten(1),
        }[kind]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.reduce(nn.functional.gelu(self.conv(x))))


class Rotary(nn.Module):
    """A rotary embedding of queries whose tables have one number per position or one per channel."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.q, self.out, self.heads = nn.Linear(3, 16 * heads), nn.Linear(16, 5), heads
        angles = torch.arange(64.0)[:, None] / 10
        self.register_buffer("angles", angles.expand(-1, width).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.q(x[:, :, :8, :8].flatten(2).transpose(1, 2)).unflatten(2, (self.heads, 16)).transpose(1, 2)
        x = x[:, 0] if self.heads == 1 else x
        turned = torch.cat([-x[..., 8:], x[..., :8]], -1)
        x = x * self.angles.cos() + turned * self.angles.sin()
        return self.out(x).mean(-2)


MODELS = {kind: lambda kind=kind: Extremes(kind) for kind in ("max", "min", "scaled", "pooled")}
MODELS |= {f"rotary {h}x{w}": lambda h=h, w=w: Rotary(h, w) for h in (1, 2) for w in (1, 16)}


@pytest.fixture(scope="module", params=MODELS)
def folded(request):
    torch.manual_seed(0)
    return qwt2.fold(qwt2.quantize(MODELS[request.param]().eval(), tiny.batches(16, 8), "percentile"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_engines_agree_with_the_model(folded, engine, tmp_path):
    images = tiny.images(6, seed=3)
    path = qwt2.export_onnx(folded, tmp_path / "model.onnx", images[:1])
    with torch.no_grad():
        expected = folded(images).numpy()
    session = qwt2.load_engine(path, engine)
    for count in (1, 6):
        found = np.concatenate([session(part.numpy()) for part in images.split(count)])
        assert sqnr_db(found, expected) > 40, count
