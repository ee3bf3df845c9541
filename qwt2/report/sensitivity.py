"""The error that quantizing each module causes at the network's output, as a table and a chart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qwt2.extras import extra
from qwt2.io import write_csv, write_text
from qwt2.quantization.sensitivity import ModuleCost

with extra("report"):
    import altair as alt
    import vl_convert

# Above this, names of modules cannot be read any more.
_SHOWN = 60


def write_sensitivity(costs: Sequence[ModuleCost], path: str | os.PathLike) -> tuple[Path, Path]:
    """Write the costs of all modules as CSV, and a chart of the most expensive ones as SVG.

    Args:
        costs: from :func:`qwt2.sensitivity`.
        path: of the two files, without suffix.

    Returns:
        The paths of the table and of the chart.
    """
    table, picture = (Path(f"{os.fspath(path)}{suffix}") for suffix in (".csv", ".svg"))
    write_csv(table, [{**asdict(cost), "sqnr_db": cost.sqnr_db} for cost in costs])
    write_text(picture, vl_convert.vegalite_to_svg(chart(costs).to_dict()))
    return table, picture


def chart(costs: Sequence[ModuleCost]) -> alt.Chart:
    """A bar per module: the SQNR at the outputs, in dB, if only this module were quantized; the lowest on top."""
    records = [{"module": c.module, "kind": c.kind, "sqnr_db": c.sqnr_db} for c in costs[:_SHOWN] if c.error > 0]
    return (
        alt.Chart(alt.Data(values=records))
        .mark_bar()
        .encode(
            x=alt.X("sqnr_db:Q", title="SQNR of the outputs with only this module quantized, dB"),
            y=alt.Y("module:N", sort=None, title=None),
            color=alt.Color("kind:N", title=None),
        )
    )
