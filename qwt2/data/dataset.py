"""The interface of every classification dataset."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qwt2.errors import Qwt2Error

if TYPE_CHECKING:
    import torch

UNLABELLED = -1  # label of an image whose class is not known; it counts for agreement, but not for accuracy


class Dataset(ABC):
    """Labelled images in the splits ``train`` and ``val``, normalised as the model expects them.

    A subclass provides the labels and loads images by index. The order of images depends only on the arguments of the
    methods. Arrays are NumPy's, so that stages without torch do not need to import it.

    Attributes:
        classes: names of the classes, in the order of the class numbers.
    """

    classes: list[str]

    @abstractmethod
    def labels(self, split: str) -> np.ndarray:
        """Return the class numbers (N,), int64, of a split; ``UNLABELLED`` where the class is not known."""

    @abstractmethod
    def images(self, split: str, indices: np.ndarray) -> np.ndarray:
        """Return the images (len(indices), 3, H, W) of a split, normalised float32."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    def size(self, split: str) -> int:
        """Return the number of images of a split."""
        return len(self.labels(split))

    def array_batches(
        self, split: str, batch_size: int, shuffle: int | Sequence[int] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over a whole split in batches. The last batch may be smaller.

        Args:
            split: "train" or "val".
            batch_size: images per batch.
            shuffle: seed of a random order; without it, images come in stored order.

        Yields:
            Images (N, 3, H, W), float32, and labels (N,), int64.
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
        """Iterate over a whole split as :meth:`array_batches` does, and yield torch tensors."""
        import torch

        for images, labels in self.array_batches(split, batch_size, shuffle):
            yield torch.from_numpy(images), torch.from_numpy(labels)

    def calibration(self, count: int, seed: int) -> "torch.Tensor":
        """Draw training images without replacement.

        A larger count with the same seed starts with the images of a smaller count.

        Args:
            count: number of images.
            seed: seed of the draw.

        Returns:
            Images (count, 3, H, W), float32.

        Raises:
            Qwt2Error: ``count`` is not positive or larger than the training split.
        """
        import torch

        available = self.size("train")
        if not 0 < count <= available:
            raise Qwt2Error(
                f"calibration asks for {count} images, but must be between 1 and the {available} training images"
            )
        indices = np.random.default_rng(seed).permutation(available)[:count]
        return torch.from_numpy(self.images("train", indices))
