"""The warm process: what a stage does in a fork of it is what it would do alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGE = """
import os, sys, time
from pathlib import Path
from pipeline.common.warm import delegate

WARM = "pipeline.common.warm" in sys.modules and sys.modules["__main__"].__spec__ is not None and "torch" in sys.modules

def main():
    what, *rest = sys.argv[1:]
    if what == "tell":
        print("torch loaded" if WARM else "alone", rest, os.environ["COLOUR"], Path.cwd().name)
        print("to stderr", file=sys.stderr)
        raise SystemExit(int(rest[0]))
    if what == "break":
        raise ValueError("broken")
    if what == "die":
        os.kill(os.getpid(), 9)
    if what == "wait":
        child = os.fork()
        Path("started").write_text("") if child else None
        time.sleep(60)

if __name__ == "__main__":
    code = delegate()
    if code is not None:
        raise SystemExit(code)
    main()
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "demo.py").write_text(STAGE)
    (tmp_path / "timm.py").write_text("")  # a quick stand-in
    return tmp_path


def start(folder: Path, *command: str, **streams) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "COLOUR": "blue"}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE, **streams)


def run(folder: Path, *command: str) -> tuple[int, str, str]:
    with start(folder, *command, stdout=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def demo(*words: str) -> list[str]:
    return [sys.executable, "-m", "demo", *words]


def warm(*command: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.common.warm", *command]


@pytest.mark.parametrize("code", [0, 2])
def test_arguments_streams_environment_and_exit_code_pass_through(folder, code):
    told = f"['{code}', 'two words'] blue {folder.name}\n"
    assert run(folder, *demo("tell", str(code), "two words")) == (code, f"alone {told}", "to stderr\n")
    assert run(folder, *warm(*demo("tell", str(code), "two words"))) == (code, f"torch loaded {told}", "to stderr\n")


def test_a_stage_that_breaks_shows_its_traceback(folder):
    code, _, err = run(folder, *warm(*demo("break")))
    assert code == 1 and "ValueError: broken" in err


def test_a_stage_that_is_killed_fails_with_a_sentence(folder):
    code, _, err = run(folder, *warm(*demo("die")))
    assert code == 1 and err == "error: the process that ran demo was killed; run again\n"


def test_work_ends_with_the_process_that_asked_for_it(folder):
    script = f"{' '.join(demo('wait'))} & echo $! > asker; wait"
    with start(folder, *warm("sh", "-c", script)) as process:
        await_file(folder / "started")
        os.kill(int((folder / "asker").read_text()), signal.SIGKILL)
        process.communicate(timeout=30)  # it waits for the work, and the work holds its stderr: both have ended


def test_a_command_outlives_a_warm_process_that_is_killed(folder):
    script = f"touch started; while ! test -e go; do sleep 0.1; done; {' '.join(demo('tell', '0'))} > answer"
    with start(folder, *warm("sh", "-c", script)) as process:
        await_file(folder / "started")
        process.kill()
        (folder / "go").write_text("")
        process.communicate(timeout=30)
    assert (folder / "answer").read_text().startswith("alone")


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
