"""Storage, in memory or on disk, for the activations that are alive in a network on each batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


class ActivationStore:
    """Maps batch numbers to trees of tensors.

    Args:
        directory: existing folder for one safetensors file per batch; ``None`` keeps everything in memory.
        prefix: prefix of the file names.
        limit: bytes that stay in memory before files are written.
    """

    def __init__(self, directory: str | None, prefix: str, limit: int = 0):
        self.directory = None if directory is None else Path(directory)
        self.prefix, self.limit = prefix, limit
        self._trees: dict[int, Any] = {}
        self._sizes: dict[int, int] = {}
        self._on_disk: set[int] = set()

    def __contains__(self, index: int) -> bool:
        return index in self._trees

    def __setitem__(self, index: int, tree: Any) -> None:
        self._forget(index)
        in_memory = sum(size for other, size in self._sizes.items() if other not in self._on_disk)
        self._sizes[index] = size_of(tree)
        if self.directory is None or in_memory + self._sizes[index] <= self.limit:
            self._trees[index] = tree_map(_compact, tree)
            return
        leaves, spec = tree_flatten(tree)
        # Cloned because safetensors refuses a tensor and a view of it in one file.
        tensors = {
            str(i): leaf.clone(memory_format=torch.contiguous_format)
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor)
        }
        self._on_disk.add(index)
        self._path(index).write_bytes(save(tensors))  # so a full disk raises an OSError with its errno
        self._trees[index] = ([None if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def __getitem__(self, index: int) -> Any:
        if index not in self._on_disk:
            return self._trees[index]
        leaves, spec = self._trees[index]
        # Cloned because tensors from a file have another memory alignment, which changes the last bits of sums.
        tensors = {name: tensor.clone() for name, tensor in load_file(self._path(index)).items()}
        return tree_unflatten([tensors.get(str(i), leaf) for i, leaf in enumerate(leaves)], spec)

    def size(self, index: int) -> int:
        """Return the bytes of a batch's tensors."""
        return self._sizes[index]

    def clear(self) -> None:
        """Forget every batch and delete its file."""
        for index in list(self._sizes):
            self._forget(index)

    def _forget(self, index: int) -> None:
        if index in self._on_disk:
            self._path(index).unlink(missing_ok=True)
        self._on_disk.discard(index)
        self._trees.pop(index, None)
        self._sizes.pop(index, None)

    def _path(self, index: int) -> Path:
        assert self.directory is not None  # nothing is written without a directory
        return self.directory / f"{self.prefix}-{index}.safetensors"


def size_of(tree: Any) -> int:
    """Return the bytes of a tree's tensors."""
    return sum(leaf.nbytes for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def _compact(leaf: Any) -> Any:
    """Clone a small view of a large tensor, because the view would keep the whole tensor alive."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() > 2 * leaf.nbytes else leaf
