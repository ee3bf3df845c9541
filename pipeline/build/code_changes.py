"""Tell which source files changed since a stage last ran.

dvc.lock keeps only one hash per stage. This module stores the files behind each of these hashes:

out/code/<hash>.yaml    the files of a stage's code, each with its own hash
"""

from pathlib import Path

import yaml

from pipeline.build import code_hashes, dvcfiles
from pipeline.common.folders import OUT
from pipeline.common.stage import config_path
from qwt2.io import write_text

HISTORY = OUT / "code"
SHOWN = 5


def remember() -> None:
    """Store the files behind every stage's present hash, and delete the records of hashes that no stage ran with."""
    present = {code_hashes.fingerprint([stage]): stage for stage in code_hashes.MODULES}
    for path in HISTORY.glob("*.yaml"):
        if path.stem not in {*present, *_ran_with().values()}:
            path.unlink()
    for digest, stage in present.items():
        write_text(_path(digest), yaml.safe_dump(code_hashes.sources([stage])))


def messages() -> list[str]:
    """Return one sentence per stage that will run again because of its code; it names the files that changed."""
    return [f"{stage} runs again: {_listed(files)}" for stage, files in changes().items()]


def changes() -> dict[str, list[str]]:
    """Return stage of dvc.lock -> the files that changed since it last ran; the list is empty if they are unknown."""
    found = {}
    for name, digest in _ran_with().items():
        stage = name.partition("@")[0]
        if digest != code_hashes.fingerprint([stage]):
            found[name] = _differing(digest, stage)
    return found


def _differing(digest: str, stage: str) -> list[str]:
    if not _path(digest).is_file():
        return []
    before, now = yaml.safe_load(_path(digest).read_text(encoding="utf-8")), code_hashes.sources([stage])
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _listed(files: list[str]) -> str:
    if not files:
        return "its code changed"
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f"{', '.join(files[:SHOWN])}{more} changed"


def _ran_with() -> dict[str, str]:
    """Return stage of dvc.lock -> the hash of the code that it last ran with."""
    code = config_path("code").as_posix()
    found = {}
    for name, stage in dvcfiles.locked_stages().items():
        for digest in stage.get("params", {}).get(code, {}).values():
            if name.partition("@")[0] in code_hashes.MODULES:
                found[name] = digest
    return found


def _path(digest: str) -> Path:
    return HISTORY / f"{digest}.yaml"
