"""The version, which stands in pyproject.toml."""

import importlib.metadata
import tomllib
from pathlib import Path


def find_version() -> str:
    """Return the installed package's version, or what pyproject.toml says in a checkout that is not installed."""
    try:
        return importlib.metadata.version("qwt2")
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"]


__version__ = find_version()
