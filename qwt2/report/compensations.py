"""How compensations are shown. Each says it itself, by attributes of the class that is registered.

Results name a compensation as the configuration does. A name under which none is registered (a second CWAC with other
settings, say) is shown as it is, behind the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qwt2.compensation.methods import COMPENSATIONS

SUBJECT = "cwac"  # the compensation that the benchmark is about, and the others are compared with
PTQ_COLOUR, OTHER_COLOUR = "#d97706", "#a855f7"


def label(name: str) -> str:
    """Return the name for reading: "QwT"."""
    return getattr(_registered(name), "LABEL", name)


def heading(name: str) -> str:
    """Return what a method with this compensation is: "PTQ + QwT"; "PTQ" for the empty name."""
    return f"PTQ + {label(name)}" if name else "PTQ"


def colour(name: str) -> str:
    """Return the colour of charts; the empty name is plain PTQ."""
    return getattr(_registered(name), "COLOUR", OTHER_COLOUR) if name else PTQ_COLOUR


def order(name: str) -> tuple[float, str]:
    """Sort key: plain PTQ, then compensations in the order that they say, then other names."""
    return (-1.0 if not name else getattr(_registered(name), "ORDER", float("inf"))), name


def shown(names: Iterable[str] = ()) -> list[str]:
    """Return plain PTQ (the empty name), the registered compensations and these names, in order."""
    return sorted({"", *COMPENSATIONS.names(), *names}, key=order)


def _registered(name: str) -> Any:
    return COMPENSATIONS.get(name) if name in COMPENSATIONS.names() else None
