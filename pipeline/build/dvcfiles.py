"""Reading dvc.yaml and dvc.lock, and hashing files as DVC does."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.common.unchanged import while_unchanged
from qwt2.errors import Qwt2Error

LOCK = Path("dvc.lock")
DIRECTORY = ".dir"
HASH = re.compile(r"[0-9a-f]{32}(\.dir)?")


def stages() -> dict[str, Any]:
    """Read the stages of dvc.yaml.

    Raises:
        Qwt2Error: the current folder is not the repository's root.
    """
    path = Path("dvc.yaml")
    if not path.is_file():
        raise Qwt2Error("there is no dvc.yaml here; run the command in the repository's root")
    return yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]


def locked_stages() -> dict[str, Any]:
    """Read dvc.lock's record of every stage that ran, by the stage's name; empty if there is no dvc.lock.

    Raises:
        Qwt2Error: dvc.lock is truncated or otherwise damaged.
    """
    return _locked_stages(LOCK) if LOCK.is_file() else {}


@while_unchanged  # every cell of a sweep reads it several times, and the file is long
def _locked_stages(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        recorded = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"]
        complete = text.endswith("\n") and all(
            HASH.fullmatch(out["md5"]) for stage in recorded.values() for out in stage.get("outs", [])
        )
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError):
        complete = False
    if not complete:
        raise Qwt2Error(f"{path} is damaged; `make verify` says what to do")
    return recorded


def md5(path: Path) -> str | None:
    """Return the hash that DVC gives to a file or folder, or None if there is nothing at ``path``."""
    if path.is_dir():
        files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
        listing = json.dumps([{"md5": file_md5(file), "relpath": name} for name, file in files], sort_keys=True)
        return hashlib.md5(listing.encode()).hexdigest() + DIRECTORY
    return file_md5(path) if path.is_file() else None


def file_md5(path: Path) -> str:
    """Return the MD5 hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
