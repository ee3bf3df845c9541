"""Markdown: tables, and the parts of a page that are written anew."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from qwt2.errors import Qwt2Error
from qwt2.io import write_text

MISSING = "–"  # stands for what was not measured


def table(headings: Sequence[str], lines: Iterable[Sequence[str]], words: Iterable[str] = ()) -> str:
    """Return a table.

    Args:
        headings: one per column.
        lines: the cells of each line.
        words: headings of columns that hold words, which are aligned to the left; the others hold numbers.
    """
    rule = ["---" if heading in words else "---:" for heading in headings]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *lines))


def marked(name: str, content: str) -> str:
    """Return a part of a page between its markers."""
    begin, end = _markers(name)
    return f"{begin}\n{content}\n{end}"


def replace(page: Path, name: str, content: str) -> None:
    """Replace the text between a part's markers.

    Raises:
        Qwt2Error: the page does not have each marker once, in this order.
    """
    begin, end = _markers(name)
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise Qwt2Error(f"{page} must hold the line {begin} once and {end} once after it; put them where it belongs.")
    write_text(page, text.partition(begin)[0] + marked(name, content) + text.partition(end)[2])


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin (written by `make readme`) -->", f"<!-- {name}:end -->"
