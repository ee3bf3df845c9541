"""What a network gives on each batch, stored until it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


class ActivationStore:
    """One tree of tensors per batch, in memory or as one safetensors file a batch.

    What is stored is a copy, and what is read is the reader's own: blocks may overwrite their inputs.
    """

    def __init__(self, directory: str | None, prefix: str):
        self.directory = None if directory is None else Path(directory)
        self.prefix = prefix
        self.trees: dict[int, Any] = {}

    def __setitem__(self, index: int, tree: Any) -> None:
        if self.directory is None:
            self.trees[index] = _cloned(tree)
            return
        leaves, spec = tree_flatten(tree)
        tensors = {str(i): leaf.contiguous() for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self._path(index).write_bytes(save(tensors))  # a full disk is then an OSError with its number
        self.trees[index] = ([None if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def __getitem__(self, index: int) -> Any:
        if self.directory is None:
            return _cloned(self.trees[index])
        leaves, spec = self.trees[index]
        # Copied: a file's tensors are not aligned as fresh memory is, on which the last bits of sums depend.
        tensors = {name: tensor.clone() for name, tensor in load_file(self._path(index)).items()}
        return tree_unflatten([tensors[str(i)] if str(i) in tensors else leaf for i, leaf in enumerate(leaves)], spec)

    def pop(self, index: int) -> Any:
        """What is stored for a batch, and no longer is."""
        if self.directory is None:
            return self.trees.pop(index)
        tree = self[index]
        self._path(index).unlink()
        del self.trees[index]
        return tree

    def clear(self) -> None:
        if self.directory is not None:
            for index in self.trees:
                self._path(index).unlink(missing_ok=True)
        self.trees.clear()

    def _path(self, index: int) -> Path:
        return self.directory / f"{self.prefix}-{index}.safetensors"


def _cloned(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
