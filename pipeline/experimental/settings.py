"""Keys that the configurations of all experimental models have in common."""

from dataclasses import dataclass


@dataclass
class Train:
    """Keys of ``train`` in the configuration of a model."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    autocast: bool
    seed: int
