"""Keys that the configurations of several datasets have in common."""

from dataclasses import dataclass


@dataclass
class DrawnFromFolder:
    """Keys of a dataset whose images are drawn from the splits of a folder.

    Attributes:
        name: registered name of the dataset.
        path: the folder.
        num_classes: number of classes in it.
        train_images, val_images: number of images to draw from each split; ``None`` takes all.
        seed: seed of the draw.
    """

    name: str
    path: str
    num_classes: int
    train_images: int | None
    val_images: int | None
    seed: int
