"""What all stages share: configuration, failure, threads; and the files they write."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.common import stage
from qwt2 import io
from qwt2.errors import Qwt2Error

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty working directory with the resolved configuration of one cell of stage `demo`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo", "net-w4a4"])
    monkeypatch.setattr(stage, "set_threads", lambda count: None)
    io.write_text("out/resolved/demo@net-w4a4.yaml", "threads: 3\nmodel: {name: net}\n")
    return tmp_path


def test_stage_gets_its_configuration_and_folders(workspace):
    seen = []
    stage.run_stage("demo", lambda cfg, cell: seen.append((cfg, cell)))
    (cfg, cell), = seen
    assert cfg == {"threads": 3, "model": {"name": "net"}}
    assert cell.folder("evaluate") == Path("out/evaluate/net-w4a4") and cell.baseline == Path("out/baseline/net")
    assert cell.quantized("repq", "ptq", 2) == Path("out/quantize/net-w4a4/repq-seed2.safetensors")
    assert cell.quantized("repq_published", "cwac", 0) == Path("out/quantize/net-w4a4/repq_published+cwac-seed0.safetensors")


def test_a_stage_logs_into_a_file_of_its_own_and_why_it_failed(workspace, monkeypatch, capsys):
    monkeypatch.setenv("QWT2_VERBOSE", "")  # restored afterwards: -v sets it
    log = Path("out/logs/demo@net-w4a4.log")
    stage.run_stage("demo", lambda cfg, cell: None)
    assert "stage demo@net-w4a4" in log.read_text() and "finished" in log.read_text() and capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        stage.run_stage("demo", _fail_with(Qwt2Error("the moon is full")))
    assert "Traceback" in log.read_text() and capsys.readouterr().err == "error: the moon is full\n"
    monkeypatch.setattr(sys, "argv", ["demo", "net-w4a4", "-v"])
    stage.run_stage("demo", lambda cfg, cell: None)
    assert "stage demo@net-w4a4" in capsys.readouterr().err


@pytest.mark.parametrize("read", [lambda cfg: cfg["seeds"], lambda cfg: cfg["model"]["train"]])
def test_reading_an_undeclared_key_is_an_error(workspace, read):
    with pytest.raises(KeyError, match="not among the keys this stage declares"):
        stage.run_stage("demo", lambda cfg, cell: read(cfg))


def _fail_with(error):
    def main(cfg, cell):
        io.write_text(cell.folder("demo") / "half.txt", "half")
        raise error

    return main


@pytest.mark.parametrize(
    "error, sentence",
    [
        (Qwt2Error("the moon is full"), "error: the moon is full\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x.npy"), "error: cannot write out/x.npy: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "error: cannot write out: Permission denied"),
    ],
)
def test_what_a_user_can_repair_is_one_sentence_and_leaves_nothing(workspace, capsys, error, sentence):
    with pytest.raises(SystemExit) as caught:
        stage.run_stage("demo", _fail_with(error))
    output = capsys.readouterr().err
    assert caught.value.code == 2 and output.startswith(sentence) and output.count("\n") == 1
    assert not Path("out/demo/net-w4a4").exists()


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError(errno.EIO, "broken disk"), KeyboardInterrupt()])
def test_a_defect_keeps_its_traceback_and_leaves_nothing(workspace, error):
    with pytest.raises(type(error)):
        stage.run_stage("demo", _fail_with(error))
    assert not Path("out/demo/net-w4a4").exists()


def test_stages_run_from_the_command_line_name_what_is_missing(tmp_path):
    for arguments in (["pipeline.stages.data"], ["pipeline.stages.baseline", "no_such_model"]):
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith("error: out/resolved/") and "run `dvc repro`" in done.stderr


@pytest.mark.slow
def test_threads_limit_torch():
    code = "from pipeline.common.stage import set_threads; set_threads(1); import torch; print(torch.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "1"


WRITERS = {
    "text.txt": lambda path: io.write_text(path, "new"),
    "data.json": lambda path: io.write_json(path, {"a": 1}),
    "array.npy": lambda path: io.write_array(path, np.arange(3)),
    "arrays.safetensors": lambda path: io.save_arrays(path, {"a": np.arange(3)}),
    "tensors.safetensors": lambda path: io.save_tensors(path, {"a": torch.arange(3)}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_leaves_the_old_file(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        WRITERS[name](path)
    assert [p.name for p in tmp_path.iterdir()] == [name] and path.read_bytes() == b"old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always-full device")
@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_reports_a_full_disk_as_such(name, tmp_path, monkeypatch):
    real = io.Path.with_name
    monkeypatch.setattr(io.Path, "with_name", lambda self, _: _linked_to_full(real(self, "temporary")))
    with pytest.raises(OSError) as caught:
        WRITERS[name](tmp_path / name)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def _linked_to_full(path: Path) -> Path:
    path.symlink_to("/dev/full")
    return path


def test_files_survive_a_round_trip(tmp_path):
    io.write_json(tmp_path / "a.json", {"x": [1, None, "ü"]})
    assert io.read_json(tmp_path / "a.json") == {"x": [1, None, "ü"]}
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    io.write_array(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(io.read_array(tmp_path / "a.npy"), array)
    io.save_arrays(tmp_path / "a.safetensors", {"transposed": array.T})
    np.testing.assert_array_equal(io.load_arrays(tmp_path / "a.safetensors")["transposed"], array.T)
    weight = torch.nn.Parameter(torch.randn(4, 4))
    io.save_tensors(tmp_path / "t.safetensors", {"whole": weight, "tied": weight, "part": weight[1:].T})
    loaded = io.load_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in {"tied": weight, "part": weight[1:].T}.items())


@pytest.mark.parametrize("read, name", [
    (io.read_json, "x.json"), (io.read_array, "x.npy"), (io.load_arrays, "x.safetensors"), (io.load_tensors, "x.safetensors"),
])  # fmt: skip
def test_missing_damaged_and_misplaced_files_are_named(read, name, tmp_path):
    path = tmp_path / name
    with pytest.raises(Qwt2Error, match=f"{name} does not exist"):
        read(path)
    path.write_bytes(b"\xff nonsense")
    with pytest.raises(Qwt2Error, match=f"{name} is damaged"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(Qwt2Error, match=f"{name} is damaged"):
        read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(Qwt2Error, match=f"{name} is a folder"):
        read(path)


def test_pickled_arrays_are_not_read(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(Qwt2Error, match="x.npy is damaged"):
        io.read_array(tmp_path / "x.npy")
