"""Publishing to W&B: offline files read back against summary.csv, the choice of the mode, and a server that is none."""

import contextlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from benchmarks import synthetic
from pipeline.comparison import publish
from pipeline.comparison.runs import all_runs
from pipeline.stages import resolve
from pipeline.stages.report import report
from qwt2.errors import Qwt2Error
from qwt2.report.results import read_layers, read_rows
from tests.support.limits import unprivileged

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
KEY = "0" * 40
MODELS, PRECISIONS = ["vit_micro"], ["w8a8", "w3a3"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with the (made-up) results of a small grid."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(ROOT / "conf", folder / "conf")
    (folder / "conf/grid.yaml").write_text(yaml.safe_dump({"grid": {"model": MODELS, "precision": PRECISIONS}}))
    synthetic.write_out(folder / "out")
    report(synthetic.CONFIG | {"grid": {"model": MODELS, "precision": PRECISIONS}}, folder / "out", folder / "results")
    before = Path.cwd()
    os.chdir(folder)
    resolve.main([])
    os.chdir(before)
    return folder


def publish_in(folder: Path, *arguments: str, prefix: Sequence[str] = (), **environment: str | None) -> subprocess.CompletedProcess:
    """A variable of the environment that is None is taken out of it."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment = clean | {"PYTHONPATH": str(ROOT), "NETRC": str(folder / "no-netrc")} | environment
    return subprocess.run(
        [*prefix, sys.executable, "-m", "pipeline.comparison.publish", *arguments], cwd=folder, capture_output=True, text=True, timeout=120,
        env={key: value for key, value in environment.items() if value is not None},
    )  # fmt: skip


@pytest.fixture(scope="module")
def published(results) -> Path:
    done = publish_in(results)
    assert done.returncode == 0, done.stderr
    return results


def records(path: Path):
    """The records of a .wandb file: after a header, LevelDB's log format, 32 KiB blocks of (crc, length, type, data)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def read_run(folder: Path) -> dict:
    """What a run's file tells a server: run, configuration, summary and logged values."""
    (path,) = folder.glob("*.wandb")
    found = {"config": {}, "summary": {}, "history": {}, "folder": folder}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "tags": set(record.run.tags), "group": record.run.run_group,
                      "job_type": record.run.job_type, "project": record.run.project, "name": record.run.display_name}
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind in ("config", "summary", "history"):
            items = record.history.item if kind == "history" else getattr(record, kind).update
            found[kind] |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
    return found


def offline_runs(folder: Path) -> list[dict]:
    return [read_run(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]


def test_every_figure_of_summary_csv_is_published_once_and_nothing_else(published):
    expected = {}
    for row in read_rows(published / "results/summary.csv"):
        key = (row.model, row.precision, row.method, f"{row.engine}/{row.metric}")
        expected[key] = row.value
        if row.std is not None:
            expected[*key[:3], key[3] + "_std"] = row.std
    found = {}
    for run in offline_runs(published):
        model, precision, method = run["name"].split("-")
        assert {model, precision, method, "grid"} == run["tags"]
        assert (run["group"], run["job_type"], run["project"]) == ("grid", "evaluate", "qwt2")
        beside = {name: run["summary"].pop(name) for name in ("fp32/top1", "ptq/top1") if name in run["summary"]}
        ours = {name: value for name, value in run["summary"].items() if "/" in name}
        assert not found.keys() & {(model, precision, method, name) for name in ours}
        found |= {(model, precision, method, name): value for name, value in ours.items()}
        assert beside["fp32/top1"] == pytest.approx(expected[model, "fp32", "fp32", "torch/top1"], abs=1e-4)
        if method != "fp32":
            assert beside["ptq/top1"] == pytest.approx(expected[model, precision, method.split("+")[0], "torch/top1"], abs=1e-4)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key  # summary.csv has four decimals


def test_configuration_and_layers_are_published(published):
    runs = {run["name"]: run for run in offline_runs(published)}
    run = runs["vit_micro-w3a3-repq+cwac"]
    assert run["config"]["precision"]["weight_bits"] == 3 and run["config"]["compensation"].keys() == {"cwac"}
    assert run["config"]["model"]["train"]["steps"] == 1500 and run["config"]["method"] == "repq+cwac"
    (file,) = (run["folder"] / "files/media/table").glob("layers_*.json")
    table = json.loads(file.read_text())
    layers = [x for x in read_layers(published / "out/evaluate/vit_micro-w3a3/layers.csv") if x.method == "repq+cwac"]
    assert {"module", "sqnr_after_db", "alpha_p50", "onnxruntime_steps"} <= set(table["columns"]) and len(layers) > 20
    assert table["data"] == [[layer.record.get(name) for name in table["columns"]] for layer in layers]
    (chart,) = (run["folder"] / "files/media/table").glob("sqnr_by_module_*.json")
    fitted = [[layer.module, layer.sqnr_after_db] for layer in layers if layer.sqnr_after_db is not None]
    assert json.loads(chart.read_text())["data"] == fitted
    assert any("visualize.sqnr_by_module" in key for key in run["config"])  # the chart
    assert not (runs["vit_micro-w3a3-repq"]["folder"] / "files/media").exists()
    assert not (run["folder"] / "files/requirements.txt").exists()  # packages of the process that published


def test_publishing_again_changes_nothing_and_new_figures_replace_the_old(published, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(published, folder)
    before = {run["id"]: run["folder"].name for run in offline_runs(folder)}
    again = publish_in(folder)
    assert f"0 runs published offline, {len(before)} there already" in again.stdout
    assert {run["id"]: run["folder"].name for run in offline_runs(folder)} == before

    rows = folder / "out/evaluate/vit_micro-w3a3/rows.csv"
    lines = rows.read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if ",repq,torch,top1," in line)
    fields = lines[number].split(",")
    fields[7] = "12.5"
    rows.write_text("\n".join([*lines[:number], ",".join(fields), *lines[number + 1 :]]) + "\n")
    changed = publish_in(folder)
    after = {run["id"]: run for run in offline_runs(folder)}
    assert after.keys() == before.keys() and len(list((folder / "wandb").glob("offline-run-*"))) == len(before)
    assert {run["name"] for run in after.values() if run["folder"].name != before[run["id"]]} <= {
        "vit_micro-w3a3-repq", "vit_micro-w3a3-repq+qwt", "vit_micro-w3a3-repq+cwac"
    }  # fmt: skip
    (run,) = [run for run in after.values() if run["name"] == "vit_micro-w3a3-repq"]
    assert run["summary"]["torch/top1"] == 12.5 and "3 runs published" in changed.stdout


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_without_a_home_nothing_is_missing_or_said(home, published, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns("wandb"))
    before = {path.name for path in folder.iterdir()}
    done = publish_in(folder, HOME=home)
    assert done.returncode == 0 and done.stderr == "" and len(offline_runs(folder)) == len(offline_runs(published))
    assert {path.name for path in folder.iterdir()} == before | {"wandb"}


def test_a_read_only_folder_is_one_sentence(published, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns("wandb"))
    (folder / "wandb").mkdir(mode=0o555)
    done = publish_in(folder, prefix=unprivileged())
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and "give access, then run again" in done.stderr


@contextlib.contextmanager
def server(status: int | None):
    """On loopback; answers every request with `status`, or accepts and stays silent if it is None."""
    if status is None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        return

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.send_response(status)
            self.end_headers()

        do_GET = do_POST = answer
        log_message = lambda *_: None  # noqa: E731

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()


@pytest.mark.parametrize(
    "status, key, mode",
    [(200, True, "online"), (404, True, "online"), (200, False, "offline"), (None, True, "offline")],
)
def test_mode_follows_key_and_server(status, key, mode, tmp_path):
    with server(status) as url:
        environment = {"WANDB_BASE_URL": url, "NETRC": str(tmp_path / "none")} | ({"WANDB_API_KEY": KEY} if key else {})
        started = time.monotonic()
        assert publish.choose_mode(environment) == mode
        assert time.monotonic() - started < publish.PROBE_SECONDS + 1


def test_mode_follows_netrc_and_wandb_mode(tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    with server(200) as url:
        assert publish.choose_mode({"WANDB_BASE_URL": url, "NETRC": str(netrc)}) == "online"
        assert publish.choose_mode({"WANDB_BASE_URL": url, "NETRC": str(netrc), "WANDB_MODE": "offline"}) == "offline"
    assert publish.choose_mode({"WANDB_MODE": "online"}) == "online"
    assert publish.choose_mode({"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}) == "offline"
    with pytest.raises(Qwt2Error, match="WANDB_MODE is 'on'; use one of: online, offline"):
        publish.choose_mode({"WANDB_MODE": "on"})


def test_a_server_that_refuses_ends_with_a_sentence_and_soon(published, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns("wandb"))
    with server(403) as url:
        started = time.monotonic()
        done = publish_in(folder, WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    assert time.monotonic() - started < 60
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: W&B refused run vit_micro-" in done.stderr and "WANDB_MODE=offline needs no server" in done.stderr


def test_the_report_compares_what_is_published(published, monkeypatch):
    monkeypatch.chdir(published)
    runs = all_runs()
    page = publish.report("qwt2", "team", runs)
    metrics = {name for run in runs for name in publish.summary(run)}
    panels = [panel for block in page.blocks for panel in getattr(block, "panels", [])]
    named = [getattr(panel, axis).name for panel in panels for axis in ("x", "y") if getattr(panel, axis, None)]
    assert {name for name in named if "/" in name} <= metrics and len(named) >= 8
    assert {name for name in named if "/" not in name} == {"precision.weight_bits"}
    assert sum("latency" in panel.title for panel in panels if getattr(panel, "title", None)) == 2  # one an engine
