"""What goes wrong around the chain: damage, kills, two at once, no room, no permission, no home, no network, a clock that jumps.

On the first stages of the tiny chain, which need no torch; `make kills` does the same to all of it.
"""

import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from benchmarks import kills, synthetic, tiny_chain
from pipeline.build import dvcfiles
from tests.support.limits import in_namespace, unprivileged

pytestmark = pytest.mark.e2e

REPRO = ("dvc", "repro", "data")
VERIFY = (sys.executable, "-m", "pipeline.build.verify")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tiny_chain.make(tmp_path_factory.mktemp("chain") / "built")
    tiny_chain.run(folder, *REPRO)
    assert tiny_chain.run(folder, *VERIFY).stdout == "nothing is damaged\n"
    return folder


@pytest.fixture
def project(built, tmp_path) -> Path:
    """A copy of the tiny chain with its data built."""
    return Path(shutil.copytree(built, tmp_path / "project", symlinks=True))


@pytest.fixture
def sources(built, tmp_path) -> Path:
    """A copy in which nothing has been built."""
    skip = shutil.ignore_patterns("out", "cache", "tmp", "dvc.lock")
    return Path(shutil.copytree(built, tmp_path / "sources", ignore=skip))


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): dvcfiles.file_md5(path) for path in folder.rglob("*") if path.is_file()}


def overwrite(path: Path, content: bytes) -> None:
    """Change a file behind everybody's back: same rights, same time."""
    before = path.stat()
    path.chmod(0o600)
    path.write_bytes(content)
    path.chmod(stat.S_IMODE(before.st_mode))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_cached_byte(project: Path) -> str:
    largest = max((project / ".dvc/cache/files/md5").glob("??/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(largest, bytes(content))
    return largest.name


def truncate_lock(project: Path) -> str:
    lock = project / "dvc.lock"
    lock.write_bytes(lock.read_bytes()[: lock.stat().st_size - 40])
    return "dvc.lock"


def cut_output(project: Path) -> str:
    path = max((project / "out/data/digits").iterdir(), key=lambda path: path.stat().st_size)
    overwrite(path, path.read_bytes()[:1000])
    return "out/data"


def leave_half_written(project: Path) -> str:
    path = project / "out/data/digits/.train.4194305.safetensors"  # above any process id of Linux
    path.write_bytes(b"half")
    return path.name


@pytest.mark.parametrize("damage", [flip_cached_byte, truncate_lock, cut_output, leave_half_written])
def test_damage_is_found_and_the_remedy_heals(damage, project):
    before = contents(project / "out/data")
    name = damage(project)
    found = tiny_chain.run(project, *VERIFY, check=False)
    assert found.returncode == 2 and name in found.stdout
    assert "python -m pipeline.build.verify --repair`, then run `make repro`" in found.stderr
    tiny_chain.run(project, *VERIFY, "--repair")
    tiny_chain.run(project, *REPRO)
    assert tiny_chain.run(project, *VERIFY).stdout == "nothing is damaged\n"
    assert contents(project / "out/data") == before
    # The cache can give everything back.
    shutil.rmtree(project / "out")
    assert "Running stage" not in tiny_chain.run(project, *REPRO).stdout
    assert contents(project / "out/data") == before


def test_unfinished_and_changed_cells_are_found(project):
    cells = project / "out/cells"
    (cells / "0123456789abcdef").mkdir(parents=True)
    (cells / "locks").mkdir()
    changed = cells / "fedcba9876543210"
    (changed / "evaluate").mkdir(parents=True)
    (changed / "evaluate/rows.csv").write_text("changed")
    facts = '{"status": "finished", "outputs": {"evaluate/rows.csv": {"sha256": "' + "0" * 64 + '", "bytes": 7}}}'
    (changed / "cell.json").write_text(facts)
    for name in ("sound", "flipped", "unfinished"):
        (cells / "shared" / name).mkdir(parents=True)
        (cells / "shared" / name / "model.safetensors").write_bytes(b"weights")
        facts = {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7}
        if name != "unfinished":
            (cells / "shared" / name / "outputs.json").write_text(json.dumps({"model.safetensors": facts}))
    overwrite(cells / "shared/flipped/model.safetensors", b"weighty")
    found = tiny_chain.run(project, *VERIFY, check=False)
    assert found.returncode == 2 and "4 damaged" in found.stderr and "never finished" in found.stdout
    tiny_chain.run(project, *VERIFY, "--repair")
    assert {path.name for path in cells.iterdir()} == {"locks", "shared"} and tiny_chain.run(project, *VERIFY)
    assert [path.name for path in (cells / "shared").iterdir()] == ["sound"]


@pytest.mark.parametrize("what", ["dvc", "stage"])
def test_killed_and_run_again_gives_the_same(what, built, sources):
    rng = random.Random(what)
    kills.kill(sources, REPRO, what, rng.uniform(0.5, 2.5))
    tiny_chain.run(sources, *REPRO)
    assert contents(sources / "out/data") == contents(built / "out/data")
    tiny_chain.run(sources, *VERIFY)


def test_locks_of_ended_processes_are_found_and_released(project):
    """A zombie, which DVC takes for the holder of a lock, and a lock file cut short; never the lock of a running process."""
    force = ("dvc", "repro", "--force", "data")
    zombie = subprocess.Popen(["true"])  # never waited for
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    lock = project / ".dvc/tmp/rwlock"
    path, running = str(project / "out/data"), {str(project / "out/other"): {"pid": os.getpid(), "cmd": "dvc repro"}}
    holders = {"write": {path: {"pid": zombie.pid, "cmd": "dvc repro"}} | running, "read": {path: [{"pid": zombie.pid, "cmd": "dvc"}]}}
    for content in (json.dumps(holders), '{"write": {"'):
        lock.write_text(content)
        assert tiny_chain.run(project, *force, check=False).returncode
        found = tiny_chain.run(project, *VERIFY, check=False)
        assert found.returncode == 2 and str(lock.relative_to(project)) in found.stdout
        tiny_chain.run(project, *VERIFY, "--repair")
        assert json.loads(lock.read_text())["write"] == (running if content != '{"write": {"' else {})
        tiny_chain.run(project, *force)
    zombie.wait()
    lock.write_text(json.dumps({"write": {path: {"pid": zombie.pid, "cmd": "dvc repro"}}}))  # nobody has this number now
    assert tiny_chain.run(project, *VERIFY).stdout == "nothing is damaged\n"
    tiny_chain.run(project, *force)
    lock.write_text(json.dumps({"write": {path: running.popitem()[1]}}))
    assert tiny_chain.run(project, *VERIFY).stdout == "nothing is damaged\n"
    assert "is busy" in tiny_chain.run(project, *force, check=False).stderr


def test_two_at_once_build_once_or_one_says_why_not(built, sources):
    options = {"cwd": sources, "env": tiny_chain.environment(sources), "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(REPRO, stderr=subprocess.STDOUT, **options) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes[0] == 0
    for process, output in zip(both, outputs):
        assert process.returncode == 0 or "lock" in output or "busy" in output, output
    tiny_chain.run(sources, *REPRO)
    assert contents(sources / "out/data") == contents(built / "out/data")
    tiny_chain.run(sources, *VERIFY)


def test_full_disk_is_one_sentence_and_leaves_no_half(sources):
    script = f"""
        mkdir out && mount -t tmpfs -o size=200k tmpfs out && {sys.executable} -m pipeline.stages.resolve
        {sys.executable} -m pipeline.stages.data; echo "code $?"; find out -name '.*.*'; ls out"""
    done = tiny_chain.run(sources, *in_namespace("--mount"), "sh", "-c", script)
    assert "No space left on device; make room" in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout.split() == ["code", "2", *sorted(["code", "locks", "logs", "resolved"])]


def test_read_only_results_are_one_sentence(tmp_path):
    synthetic.write_out(tmp_path / "out")
    (tmp_path / "out/resolved").mkdir()
    (tmp_path / "out/resolved/report.yaml").write_text(yaml.safe_dump(synthetic.CONFIG))
    (tmp_path / "results").mkdir(mode=0o555)
    done = tiny_chain.run(
        tmp_path, *unprivileged(), sys.executable, "-m", "pipeline.stages.report", check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: cannot write results/") and "Permission denied; make room or give access" in done.stderr
    assert list((tmp_path / "results").iterdir()) == []


def test_without_a_home(project):
    environment = {key: value for key, value in tiny_chain.environment(project).items() if key != "HOME"}
    tiny_chain.run(project, "dvc", "repro", "--force", "data", env=environment)
    tiny_chain.run(project, *VERIFY, env=environment)


def test_without_a_network(project):
    """DVC and publishing ask nobody; with a key too, publishing finds out soon that nobody answers."""
    offline = in_namespace("--net")
    tiny_chain.run(project, *offline, "dvc", "repro", "--force", "data")
    baseline = project / "out/baseline/resnet_micro"
    baseline.mkdir(parents=True)
    (baseline / "metrics.json").write_text('{"top1": 90.0, "top5": 99.0}')
    environment = tiny_chain.environment(project) | {"WANDB_API_KEY": "0" * 40}
    environment.pop("WANDB_MODE", None)
    started = time.monotonic()
    done = tiny_chain.run(project, *offline, sys.executable, "-m", "pipeline.comparison.publish", env=environment)
    assert "1 runs published offline" in done.stdout and time.monotonic() - started < 60


JUMPING = """
import itertools, time
_real, _calls = time.time, itertools.count()
time.time = lambda: _real() + (-86400 if next(_calls) % 2 else 86400)
"""


def test_a_clock_that_jumps(project, tmp_path):
    """Neither durations nor what is built anew depend on the time of day."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    environment = tiny_chain.environment(project)
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    before = contents(project / "out/data")
    tiny_chain.run(project, "dvc", "repro", "--force", "data", env=environment)
    assert contents(project / "out/data") == before
    future = time.time() + 365 * 86400
    for path in (project / "out").rglob("*"):
        os.utime(path, (future, future))
    assert "Running stage" not in tiny_chain.run(project, *REPRO).stdout
    # A change that is dated long ago is a change all the same.
    config = project / "conf/data/digits.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    os.utime(config, (10**9, 10**9))
    assert "Running stage 'data'" in tiny_chain.run(project, *REPRO).stdout
    assert contents(project / "out/data") != before


def test_latency_is_measured_by_a_clock_that_does_not_jump(monkeypatch):
    from qwt2.evaluation.latency import measure_latency

    calls = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: -next(calls) * 1e6)
    measured = measure_latency({"a": [lambda: time.sleep(1e-3)]}, base="a", repeats=3, warmup=0)
    assert 0.9 < measured["a"].wall_ms < 500 and measured["a"].ratio == 1
