"""The options of the configuration's groups, as error messages list them."""

from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"


def options(group: str) -> str:
    """Return the words with which a message lists the options of a group."""
    return f"options of group '{group}' are: {', '.join(sorted(path.stem for path in (CONF / group).glob('*.yaml')))}"
