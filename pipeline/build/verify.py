"""Command: re-hash everything that DVC and the sweeps stored, and list what is damaged (make verify).

DVC trusts its cache and dvc.lock; this command does not. The option ``--repair`` deletes only what is damaged. The next
``make repro``, or the next run of the sweep, then builds it again.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from pipeline.build import dvcfiles, locks
from pipeline.common.folders import CELLS, LOCKS, OUT, OUTPUTS, RESULTS, SHARED, read_record
from qwt2.errors import Qwt2Error, guarded

PER_CELL = ("baseline", "quantize", "evaluate")
OBJECTS = Path(".dvc/cache/files/md5")
# Names of temporary files of qwt2.io.atomic_path: a dot, the file's name, the writer's process id, the suffix.
TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)(\.\w+)?")


@dataclass(frozen=True)
class Damage:
    """A file or folder that is not as it was stored.

    Attributes:
        path: the file or folder to delete.
        what: what is wrong with it, as the rest of a sentence that begins with the path.
        remedy: the command that builds it again once it is deleted.
    """

    path: Path
    what: str
    remedy: str = "make repro"


def main(arguments: list[str] | None = None) -> None:
    """List what is damaged, and delete it with ``--repair``.

    Raises:
        Qwt2Error: something is damaged and was not deleted, or there is no dvc.yaml here.
    """
    options = _parser().parse_args(arguments)
    dvcfiles.stages()  # refuses to run anywhere but in the repository
    found = list(damages())
    for damage in found:
        print(f"{damage.path}: {damage.what}")
    if not found:
        print("nothing is damaged")
        return
    remedies = " and ".join(dict.fromkeys(f"`{damage.remedy}`" for damage in found))
    if not options.repair:
        raise Qwt2Error(
            f"{len(found)} damaged; delete them with `python -m pipeline.build.verify --repair`, then run {remedies}"
        )
    for damage in found:
        repair(damage)
    print(f"{len(found)} deleted; now run {remedies}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.build.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--repair", action="store_true", help="delete what is damaged")
    return parser


def damages() -> Iterator[Damage]:
    """Yield everything that is damaged, causes before their consequences."""
    yield from abandoned_locks()
    yield from damaged_lock()
    yield from damaged_objects()
    yield from damaged_outputs()
    yield from half_written()
    yield from damaged_cells()


def abandoned_locks() -> Iterator[Damage]:
    """Yield DVC's lock file, if DVC cannot work with it; see :func:`pipeline.build.locks.is_sound`."""
    if not locks.is_sound():
        yield Damage(locks.PATH, "is damaged, or holds locks of processes that have ended")


def damaged_lock() -> Iterator[Damage]:
    """Yield dvc.lock, if it cannot be read."""
    try:
        dvcfiles.locked_stages()
    except Qwt2Error:
        yield Damage(dvcfiles.LOCK, "is damaged (truncated?); without it DVC finds what it built in its run cache")


def damaged_objects() -> Iterator[Damage]:
    """Yield the objects of DVC's cache whose content does not have the hash in their name."""
    objects = sorted(path for path in OBJECTS.glob("??/*") if path.is_file())
    for path in tqdm(objects, "DVC's cache", unit="object", disable=None):
        if dvcfiles.file_md5(path) != path.parent.name + path.name.removesuffix(dvcfiles.DIRECTORY):
            yield Damage(path, "is not the object that it is named after (damaged cache)")


def damaged_outputs() -> Iterator[Damage]:
    """Yield the outputs of stages that differ from dvc.lock. A missing output is no damage: DVC builds it."""
    try:
        stages = dvcfiles.locked_stages()
    except Qwt2Error:
        return
    declared = set(dvcfiles.stages())
    current = {name: stage for name, stage in stages.items() if name.partition("@")[0] in declared}
    for name, stage in tqdm(current.items(), "outputs", unit="stage", disable=None):
        for out in stage.get("outs", []):
            path = Path(out["path"])
            if path.exists() and dvcfiles.md5(path) != out["md5"]:
                yield Damage(path, f"is not what stage {name} wrote (changed, or half-written)")
    recorded = {out["path"] for stage in stages.values() for out in stage.get("outs", [])}
    for stage in PER_CELL:
        for path in sorted((OUT / stage).glob("*/")):
            if path.as_posix() not in recorded:
                yield Damage(path, f"is not in dvc.lock: stage {stage} was interrupted, or dvc.lock is truncated")


def half_written() -> Iterator[Damage]:
    """Yield temporary files whose writer is no longer running."""
    for folder in (OUT, RESULTS):
        for path in sorted(folder.rglob(".*")):
            match = TEMPORARY.fullmatch(path.name)
            if match and path.is_file() and not psutil.pid_exists(int(match["pid"])):
                yield Damage(path, "was left half-written by a process that ended")


def damaged_cells() -> Iterator[Damage]:
    """Yield unfinished cells of sweeps, and cells and shared folders whose files differ from their records."""
    remedy = "the sweep that it belongs to"
    for folder in sorted(CELLS.glob("*/")):
        if folder.name in (SHARED.name, LOCKS.name):
            continue
        record = read_record(folder)
        if record is None:
            yield Damage(folder, "is a cell that was never finished", remedy)
        elif _changed(folder, record.get("outputs", {})):
            yield Damage(folder, "has results that are not what was recorded", remedy)
    for folder in sorted(SHARED.glob("*/")):
        outputs = read_record(folder, OUTPUTS)
        if outputs is None:
            yield Damage(folder, "was never finished", remedy)
        elif _changed(folder, outputs):
            yield Damage(folder, "is not what was recorded", remedy)


def _changed(folder: Path, outputs: dict[str, dict[str, Any]]) -> bool:
    return any(_sha256(folder / name) != facts["sha256"] for name, facts in outputs.items())


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def repair(damage: Damage) -> None:
    """Delete what is damaged. A sound dvc.lock is taken from Git if there is one; locks of running processes stay."""
    if damage.path == locks.PATH:
        locks.release_abandoned()
    elif damage.path.is_dir():
        shutil.rmtree(damage.path)
    else:
        damage.path.unlink(missing_ok=True)
    if damage.path == dvcfiles.LOCK:
        subprocess.run(["git", "checkout", "--quiet", "--", str(damage.path)], capture_output=True, check=False)


if __name__ == "__main__":
    guarded(main)
