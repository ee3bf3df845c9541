"""Labels, colours and order of compensations, from attributes of the registered classes.

Results name a compensation as the configuration does. A name that is not registered, such as that of a second CWAC with
other settings, is shown as it is, after the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qwt2.compensation.methods import COMPENSATIONS

SUBJECT = "cwac"  # the compensation that the benchmark is about; the others are compared with it
FREE = ("refit", "cwac")  # the compensations whose standing against the references heads the page
REFERENCES = ("qwt", "qwt_global")  # the strongest compensations that cost time in the engine
PTQ_COLOUR, OTHER_COLOUR = "#d97706", "#a855f7"


def label(name: str) -> str:
    """Return the display name of a compensation, such as "QwT"."""
    return getattr(_registered(name), "LABEL", name)


def heading(name: str) -> str:
    """Return the display name of methods with a compensation, such as "PTQ + QwT"; "PTQ" for the empty name."""
    return f"PTQ + {label(name)}" if name else "PTQ"


def colour(name: str) -> str:
    """Return the colour of a compensation in charts; the empty name is plain PTQ."""
    return getattr(_registered(name), "COLOUR", OTHER_COLOUR) if name else PTQ_COLOUR


def order(name: str) -> tuple[float, str]:
    """Return a sort key: plain PTQ, then registered compensations by their ``ORDER``, then other names."""
    return (-1.0 if not name else getattr(_registered(name), "ORDER", float("inf"))), name


def shown(names: Iterable[str] = ()) -> list[str]:
    """Return plain PTQ (the empty name), the registered compensations and these names, in order."""
    return sorted({"", *COMPENSATIONS.names(), *names}, key=order)


def _registered(name: str) -> Any:
    return COMPENSATIONS.get(name) if name in COMPENSATIONS.names() else None
