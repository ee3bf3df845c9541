"""What every stage may ask of a dataset, whatever it is made of."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qwt2.errors import Qwt2Error

if TYPE_CHECKING:
    import torch


class Dataset(ABC):
    """Labelled images in the splits `train` and `val`, normalised as the model expects them.

    A subclass says what the labels are and loads images by index; the order of everything below follows
    only from its arguments. NumPy is the base, so that stages which run no torch need not import it.
    """

    classes: list[str]

    @abstractmethod
    def labels(self, split: str) -> np.ndarray:
        """Class numbers (N,) int64 of a split."""

    @abstractmethod
    def images(self, split: str, indices: np.ndarray) -> np.ndarray:
        """The images (len(indices), 3, H, W) of a split, normalised float32."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def size(self, split: str) -> int:
        """Number of images of a split."""
        return len(self.labels(split))

    def array_batches(
        self, split: str, batch_size: int, shuffle: int | Sequence[int] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (images, labels) of a whole split: in stored order, or in the order that the seed `shuffle` gives.

        The last batch may be smaller.
        """
        labels = self.labels(split)
        order = np.arange(len(labels))
        if shuffle is not None:
            order = np.random.default_rng(shuffle).permutation(order)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield self.images(split, indices), labels[indices]

    def batches(
        self, split: str, batch_size: int, shuffle: int | Sequence[int] | None = None
    ) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
        """`array_batches` as torch tensors: images (N, 3, H, W) float32, labels (N,) int64."""
        import torch

        for images, labels in self.array_batches(split, batch_size, shuffle):
            yield torch.from_numpy(images), torch.from_numpy(labels)

    def calibration(self, count: int, seed: int) -> "torch.Tensor":
        """`count` training images (count, 3, H, W) float32, drawn without replacement as `seed` says.

        A larger count with the same seed starts with the images of the smaller one. Raises `Qwt2Error`
        if the training split is smaller than `count`, or `count` is not positive.
        """
        import torch

        available = self.size("train")
        if not 0 < count <= available:
            raise Qwt2Error(
                f"calibration asks for {count} images, but must be between 1 and the {available} training images"
            )
        indices = np.random.default_rng(seed).permutation(available)[:count]
        return torch.from_numpy(self.images("train", indices))
