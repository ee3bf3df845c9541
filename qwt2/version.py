"""The version of the package, which pyproject.toml defines."""

import importlib.metadata
import tomllib
from pathlib import Path


def find_version() -> str:
    """Return the installed package's version, or that in pyproject.toml if the checkout is not installed."""
    try:
        return importlib.metadata.version("qwt2")
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"]


__version__ = find_version()
