"""The user's request to :func:`qwt2.quantize`, without the model and its calibration set."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from qwt2.errors import Qwt2Error
from qwt2.quantization.precision import Precision


@dataclass(frozen=True)
class Request:
    """The settings that a model is quantized with; a stored model is rebuilt from them.

    Attributes:
        method: a registered PTQ method.
        target: the engines that the model will run on.
        precision: bit widths.
        blocks: the blocks that compensation will work on; ``None`` to find them automatically.
        parts: the modules to quantize; ``None`` for all.
        exclude: names or patterns of modules that stay in float.
        bits: name or pattern -> bit widths of the modules that it matches; later entries override earlier ones.
        rotate: whether the residual stream is rotated first.
    """

    method: str
    target: str
    precision: Precision
    blocks: tuple[str, ...] | None = None
    parts: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    bits: dict[str, Precision] = field(default_factory=dict)
    rotate: bool = False

    def check(self, names: Collection[str]) -> None:
        """Refuse patterns that match no module in ``names``, the modules that can be quantized.

        Raises:
            Qwt2Error: if a pattern matches nothing; the message names the pattern and modules with similar names.
        """
        for argument, patterns in (("exclude", self.exclude), ("bits", self.bits)):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in names):
                    known = list(dict.fromkeys(prefix for name in names for prefix in reversed(_prefixes(name))))
                    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:3]
                    raise Qwt2Error(
                        f"{argument}: {pattern!r} matches no module that can be quantized; near names are: "
                        f"{', '.join(near)}"
                    )

    def is_excluded(self, name: str) -> bool:
        """Return whether ``exclude`` keeps a module in float."""
        return any(matches(name, pattern) for pattern in self.exclude)

    def bits_of(self, name: str) -> Precision | None:
        """Return the bit widths that ``bits`` gives a module, or ``None``."""
        return next((p for pattern, p in reversed(self.bits.items()) if matches(name, pattern)), None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """Create a request from the result of ``dataclasses.asdict``, possibly read from JSON."""
        bits = {pattern: Precision(**own) for pattern, own in values["bits"].items()}
        lists = {key: None if values[key] is None else tuple(values[key]) for key in ("blocks", "parts", "exclude")}
        return cls(**{**values, **lists, "precision": Precision(**values["precision"]), "bits": bits})


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern (``blocks.0.attn``, ``blocks.*.mlp``, ``*.fc1``) matches a module or a parent of it."""
    return any(fnmatchcase(prefix, pattern) for prefix in _prefixes(name))


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
