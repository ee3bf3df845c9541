"""Command: kill the chain at random points and run it again (make kills); the results must equal an undisturbed run's.

Each round starts the tiny chain from nothing and sends SIGKILL to DVC or to the running stage at a random moment. Then
it only repeats the command, without any other step.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks import tiny_chain
from pipeline.comparison.differences import differences
from qwt2.errors import guarded

SUMMARY = Path("results/summary.csv")
REPRO = ("dvc", "repro")


def main(arguments: list[str] | None = None) -> None:
    """Print every round, and exit with code 1 unless all recovered."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="qwt2-") as parent:
        outcomes = rounds(Path(parent), options.kills, random.Random(options.seed))
    recovered = sum(not problem for problem in outcomes)
    print(f"{recovered} of {len(outcomes)} kills recovered")
    if recovered < len(outcomes):
        raise SystemExit(1)


def rounds(parent: Path, kills: int, rng: random.Random) -> list[str]:
    """Run all rounds and return what went wrong in each; "" where nothing did."""
    quiet = tiny_chain.make(parent / "quiet")
    started = time.monotonic()
    tiny_chain.run(quiet, *REPRO)
    length = time.monotonic() - started
    print(f"undisturbed: {length:.1f} s")
    outcomes = []
    for number in tqdm(range(kills), "kills", unit="kill", disable=None):
        folder, victim = parent / f"kill{number}", None
        while victim is None:
            shutil.rmtree(folder, ignore_errors=True)
            tiny_chain.make(folder)
            victim = kill(folder, REPRO, rng.choice(["dvc", "stage"]), rng.uniform(0.5, 0.95 * length))
        outcomes.append(recover(folder, quiet))
        print(f"{number + 1}: {victim}: {outcomes[-1] or 'recovered'}", flush=True)
    return outcomes


def kill(folder: Path, command: tuple[str, ...], what: str, after: float) -> str | None:
    """Start the chain and kill DVC or the running stage after some seconds.

    Args:
        folder: where the chain runs.
        command: what starts it.
        what: "dvc" or "stage".
        after: seconds until the kill.

    Returns:
        What was killed and when; None if the chain had ended before.
    """
    process = subprocess.Popen(
        command, cwd=folder, env=tiny_chain.environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(after)
    victim = None
    while victim is None and process.poll() is None:  # between two stages there is nothing to kill yet
        victim = _victim(psutil.Process(process.pid), what)
        time.sleep(0.01)
    if victim is None:
        return None
    name = " ".join(victim.cmdline()[-3:])
    victim.send_signal(signal.SIGKILL)
    process.wait()
    # A machine that loses power leaves no process behind. Here a killed process stays listed until init reaps it, which
    # takes seconds on a busy machine. DVC considers the lock of a listed process to be held.
    psutil.wait_procs([victim], timeout=60)
    return f"{name} killed after {after:.1f} s"


def _victim(started: psutil.Process, what: str) -> psutil.Process | None:
    """Return DVC's process, or the stage's: the youngest of those that run a module of ``pipeline``."""
    try:
        family = [started, *started.children(recursive=True)]
        if what == "dvc":
            return next((p for p in family if any(word.endswith("/dvc") for word in p.cmdline()[:2])), None)
        stages = [p for p in family if p.pid != started.pid and "-m" in p.cmdline() and _is_stage(p)]
        return max(stages, key=lambda process: process.create_time(), default=None)
    except psutil.NoSuchProcess:
        return None


def _is_stage(process: psutil.Process) -> bool:
    return any(word.startswith("pipeline.") for word in process.cmdline())


def recover(folder: Path, quiet: Path) -> str:
    """Run the chain again and return what is wrong with the outcome, or ""."""
    again = tiny_chain.run(folder, *REPRO, check=False)
    if again.returncode:
        return f"the chain ended with {again.returncode}: {(again.stdout + again.stderr)[-1500:]}"
    if found := differences(folder / SUMMARY, quiet / SUMMARY):
        return f"{len(found)} figures differ, first: {found[0]}"
    sound = tiny_chain.run(folder, sys.executable, "-m", "pipeline.build.verify", check=False)
    return "" if sound.returncode == 0 else sound.stdout + sound.stderr


if __name__ == "__main__":
    guarded(main)
