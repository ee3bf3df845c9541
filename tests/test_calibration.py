"""The pipeline's calibration sets."""

import pytest
import torch

from pipeline.tasks import calibration_batches
from qwt2.errors import Qwt2Error


class Images:
    """Stands for a dataset: image k is the constant k."""

    def calibration(self, count: int, seed: int) -> torch.Tensor:
        return torch.arange(seed, seed + count).float()[:, None, None, None].expand(-1, 3, 2, 2)


def settings(images: int, batch_size: int) -> dict:
    return {"calibration": {"images": images, "batch_size": batch_size}}


def test_batches_hold_every_image_once_and_in_order():
    batches = calibration_batches(settings(10, 4), Images(), seed=3)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches)[:, 0, 0, 0], torch.arange(3, 13).float())


def test_fewer_images_than_one_batch_are_refused():
    message = "calibration.images is 3, less than one batch of calibration.batch_size 4; give more images or smaller batches"
    with pytest.raises(Qwt2Error, match=message):
        calibration_batches(settings(3, 4), Images(), seed=0)
