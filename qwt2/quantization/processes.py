"""Several processes that share one calibration set (``torch.distributed``).

Every process reads all batches, and runs every n-th of them. Statistics are sums: the processes exchange them and merge
them in the order of their ranks, so that all solve the same equations and set the same parameters. No activation
travels. Ranges are chosen from the first images, which every process runs itself.
"""

from __future__ import annotations

import dataclasses
import operator
import zlib
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qwt2.capture.batch import Inputs, tensors
from qwt2.errors import Qwt2Error

Sums = TypeVar("Sums")  # a dataclass of a count and tensors, whose ``+`` merges the sums of two sets


class Processes:
    """The processes of a group.

    Args:
        group: their group; ``None`` for this process only.

    Attributes:
        count: number of processes.
        rank: number of this process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.count, self.rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))

    def share(self, batches: int) -> range:
        """Return the numbers of the batches that this process runs."""
        return range(self.rank, batches, self.count)

    def merged(self, parts: dict[bool, Sums]) -> dict[bool, Sums]:
        """Return the sums under each key, merged by ``+`` over all processes.

        Args:
            parts: this process's sums by key, at least one, with tensors of the same shapes everywhere. A key that it
                has no images for is missing.
        """
        if self.count == 1:
            return parts
        some: Any = next(iter(parts.values()))
        names = [field.name for field in dataclasses.fields(some)]
        nothing = [0, *(torch.zeros_like(getattr(some, name)) for name in names[1:])]
        found: dict[bool, Sums] = {}
        for key in (False, True):
            mine = [getattr(parts[key], name) for name in names] if key in parts else nothing
            sums = [type(some)(int(count), *tensors) for count, *tensors in self._gathered(mine) if count > 0]
            found |= {key: reduce(operator.add, sums)} if sums else {}
        return found

    def added(self, parts: Sequence[Tensor | float]) -> list[Tensor]:
        """Return the sums of numbers or float64 tensors over all processes."""
        return [reduce(operator.add, values) for values in zip(*self._gathered(parts))]

    def _gathered(self, parts: Sequence[Any]) -> list[list[Tensor]]:
        """Return every process's float64 tensors, in the order of the ranks; the same bits everywhere."""
        values = [torch.as_tensor(part, dtype=torch.float64) for part in parts]
        if self.count == 1:
            return [values]
        mine = torch.cat([value.to(values[-1].device).flatten() for value in values])
        theirs = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(theirs, mine, group=self.group)
        sizes = [value.numel() for value in values]
        return [[v.reshape(like.shape) for v, like in zip(one.split(sizes), values)] for one in theirs]

    def check_batches(self, batches: list[Inputs], shared: bool = True) -> None:
        """Refuse batches that the processes cannot share.

        Args:
            batches: the batches.
            shared: whether they share them; otherwise each of them runs all.

        Raises:
            Qwt2Error: if there are fewer batches than processes, or if the processes have different ones.
        """
        if shared and len(batches) < self.count:
            raise Qwt2Error(
                f"{self.count} processes share {len(batches)} calibration batches, so that some have none; start fewer "
                "processes or make smaller batches"
            )
        self._check_equal(map(_checksum, batches), "have different calibration images; give all the same, in one order")

    def check_parameters(self, model: torch.nn.Module) -> None:
        """Refuse a model that the processes have changed in different ways.

        Raises:
            Qwt2Error: if a parameter or a buffer differs.
        """
        state = map(_checksum_of, model.state_dict().values())
        self._check_equal(state, "found different parameters; run one process, or a method that adds up sums")

    def _check_equal(self, checksums: Iterable[int], what: str) -> None:
        if self.count == 1:
            return
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        mine = torch.tensor([reduce(lambda a, b: zlib.crc32(b.to_bytes(4, "big"), a), checksums, 0)], device=device)
        theirs = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(theirs, mine, group=self.group)
        other = next((rank for rank, value in enumerate(theirs) if not value.equal(theirs[0])), None)
        if other is not None:
            raise Qwt2Error(f"processes 0 and {other} {what}")


def _checksum(inputs: Inputs) -> int:
    return reduce(lambda a, b: a ^ _checksum_of(b), tensors(inputs).values(), 0)


def _checksum_of(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes())


ALONE = Processes()
