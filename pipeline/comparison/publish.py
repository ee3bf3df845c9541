"""Command: publish finished runs to Weights & Biases (make publish).

The command reads existing results and computes nothing. It works offline unless there is an API key and the server
answers, or WANDB_MODE says otherwise. ``wandb sync wandb/offline-run-*`` later sends what was published offline. A
run's id is a hash of its configuration, so publishing again replaces the run and does not duplicate it. ``--report``
makes a page of comparisons on the server.
"""

import argparse
import hashlib
import json
import netrc
import os
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from pipeline.comparison.runs import Run, all_runs
from qwt2.errors import Qwt2Error, guarded
from qwt2.io import read_json, write_json

FOLDER = Path("wandb")
PUBLISHED = FOLDER / "published.json"
MODES = ("online", "offline")
PROBE_SECONDS = 2.0
SERVER = "https://api.wandb.ai"


def main(arguments: list[str] | None = None) -> None:
    """Publish runs, or make the report, as the command line says.

    Raises:
        Qwt2Error: there are no runs, WANDB_MODE is wrong, or the server refuses.
    """
    options = _parser().parse_args(arguments)
    runs = chosen(all_runs(), options.sweep)
    mode = choose_mode(os.environ)
    if options.report:
        if mode != "online":
            raise Qwt2Error("a report needs the W&B server: set WANDB_API_KEY, and check that WANDB_BASE_URL answers")
        print(f"report: {save_report(options.project, options.entity, runs)}")
        return
    done = publish(runs, mode, options.project, options.entity)
    print(f"{done} runs published {mode}, {len(runs) - done} there already" + _advice(mode))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.comparison.publish", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sweep", action="append", help="publish only the runs of this sweep ('grid' for DVC's); repeatable"
    )
    parser.add_argument("--project", default="qwt2")
    parser.add_argument("--entity", help="team or user on the server; your default one if not given")
    parser.add_argument("--report", action="store_true", help="make the page of comparisons instead of publishing")
    return parser


def _advice(mode: str) -> str:
    return "" if mode == "online" else f"; `wandb sync {FOLDER}/offline-run-*` sends them"


def chosen(runs: list[Run], sweeps: list[str] | None) -> list[Run]:
    """Return the finished runs, only of these sweeps if any are given.

    Raises:
        Qwt2Error: a sweep has no finished run.
    """
    finished = [run for run in runs if run.status == "finished"]
    known = sorted({sweep for run in finished for sweep in run.sweeps})
    for sweep in sweeps or []:
        if sweep not in known:
            raise Qwt2Error(f"sweep {sweep!r} has no finished run; use one of: {', '.join(known) or 'none yet'}")
    return [run for run in finished if not sweeps or set(sweeps) & set(run.sweeps)]


def choose_mode(environment: Mapping[str, str]) -> str:
    """Choose "online" or "offline" before W&B starts; with a key but no network, W&B would wait for minutes.

    Raises:
        Qwt2Error: WANDB_MODE is neither "online" nor "offline".
    """
    if mode := environment.get("WANDB_MODE"):
        if mode not in MODES:
            raise Qwt2Error(f"WANDB_MODE is {mode!r}; use one of: {', '.join(MODES)}, or unset it")
        return mode
    url = environment.get("WANDB_BASE_URL") or SERVER
    return "online" if has_key(environment, url) and answers(url) else "offline"


def has_key(environment: Mapping[str, str], url: str) -> bool:
    """Return whether WANDB_API_KEY or the netrc file holds a key for the server."""
    if environment.get("WANDB_API_KEY"):
        return True
    try:
        path = environment.get("NETRC") or Path.home() / ".netrc"
        return netrc.netrc(path).authenticators(urlsplit(url).hostname or "") is not None
    except (OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: no home folder
        return False


def answers(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Return whether an HTTP server at ``url`` answers anything within ``seconds``, including name resolution."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an error is an answer too
        except (OSError, ValueError):
            return
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(seconds)


def publish(runs: list[Run], mode: str, project: str, entity: str | None = None) -> int:
    """Publish the runs that are not already published with the same content.

    Returns:
        How many runs were published.

    Raises:
        Qwt2Error: the server refuses a run, or W&B cannot write its files.
    """
    # By default these folders are below HOME, which may not exist. Tables of offline runs stay in them.
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(FOLDER.resolve() / "cache"))
    import wandb

    published = read_json(PUBLISHED) if PUBLISHED.is_file() else {}
    done = 0
    for run in tqdm(runs, "publish", unit="run", disable=None):
        state = {"content": _content_digest(run), "to": f"{mode} {entity or ''}/{project}"}
        if published.get(run.id) == state and (mode == "online" or _offline_folders(run.id)):
            continue
        for folder in _offline_folders(run.id):
            shutil.rmtree(folder)
        try:
            _publish_one(run, mode, project, entity)
        except wandb.errors.Error as error:
            raise Qwt2Error(
                f"W&B refused run {run.name}: {str(error).splitlines()[0]}; WANDB_MODE=offline needs no server"
            ) from error
        except PermissionError as error:  # W&B's own, which has no errno
            raise Qwt2Error(f"W&B cannot write run {run.name} below {FOLDER}/; give access, then run again") from error
        published[run.id] = state
        write_json(PUBLISHED, published)
        done += 1
    return done


def _offline_folders(run_id: str) -> list[Path]:
    return [*FOLDER.glob(f"offline-run-*-{run_id}")]


def _content_digest(run: Run) -> str:
    """Hash everything that is published of a run, so that a re-measured run is published again."""
    content = [
        run.sweeps,
        run.figures,
        run.ptq,
        run.fp32,
        run.config,
        run.artifacts,
        [layer.record for layer in run.layers()],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _publish_one(run: Run, mode: str, project: str, entity: str | None) -> None:
    import wandb

    FOLDER.mkdir(exist_ok=True)
    published = wandb.init(
        project=project, entity=entity, id=run.id, name=run.name, mode=mode,
        resume="allow" if mode == "online" else None,
        group=run.sweeps[0] if run.sweeps else None, job_type="evaluate", tags=tags(run), config=config(run),
        reinit="create_new",
        settings=wandb.Settings(
            silent=True, console="off", init_timeout=30, finish_timeout=60, finish_timeout_raises=True,
            x_graphql_retry_max=3, x_file_stream_retry_max=3, x_file_transfer_retry_max=3,
            x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True, disable_git=True,
            x_save_requirements=False,  # they would be this process's, and listing them takes longest of all
        ),
    )  # fmt: skip
    try:
        layers = run.layers()
        if layers:
            columns = list(dict.fromkeys(name for layer in layers for name in layer.record))
            fitted = [[layer.module, layer.sqnr_after_db] for layer in layers if layer.sqnr_after_db is not None]
            sqnr = wandb.Table(["module", "sqnr_after_db"], fitted)
            published.log({
                "layers": wandb.Table(columns, [[layer.record.get(name) for name in columns] for layer in layers]),
                "sqnr_by_module": wandb.plot.bar(sqnr, "module", "sqnr_after_db", title="SQNR after compensation, dB"),
            })  # fmt: skip
        published.summary.update(summary(run))
    finally:
        published.finish()


def tags(run: Run) -> list[str]:
    """Return a run's model, precision, method and sweeps as tags. W&B allows 64 characters per tag."""
    return [tag[:64] for tag in dict.fromkeys((run.model, run.precision, run.method, *run.sweeps))]


def config(run: Run) -> dict[str, Any]:
    """Return a run's configuration as W&B shows it, with its method, artifacts and sweeps."""
    return run.config | {"method": run.method, "artifacts": run.artifacts, "sweeps": list(run.sweeps)}


def summary(run: Run) -> dict[str, float]:
    """Return a run's figures as ``<engine>/<metric>``, with the accuracy of plain PTQ and of the float network."""
    simulated = f"torch/{run.headline}"
    beside = {f"fp32/{run.headline}": run.fp32[simulated]}
    if simulated in run.ptq:
        beside[f"ptq/{run.headline}"] = run.ptq[simulated]
    return dict(run.figures) | beside


def report(project: str, entity: str | None, runs: list[Run]) -> Any:
    """Make the page of comparisons as a report of ``wandb_workspaces``. Nothing is sent until it is saved."""
    import wandb_workspaces.reports.v2 as wr

    engines = sorted({name.partition("/")[0] for run in runs for name in run.figures} - {"torch"})
    headlines = sorted({run.headline for run in runs}, reverse=True)
    runset = wr.Runset(project=project, **({"entity": entity} if entity else {}))
    accuracy = [
        panel
        for name in headlines
        for panel in (
            wr.ScatterPlot(
                f"{name} against bits", x=wr.Config("precision.weight_bits"), y=wr.SummaryMetric(f"torch/{name}")
            ),
            wr.BarPlot(f"{name} by method", metrics=[wr.SummaryMetric(f"torch/{name}")], groupby=wr.Config("method")),
            wr.ScatterPlot(
                f"{name}: gain over plain PTQ", x=wr.SummaryMetric(f"ptq/{name}"), y=wr.SummaryMetric(f"torch/{name}")
            ),
        )
    ]
    speed = [
        wr.ScatterPlot(
            f"{name} against latency, {engine}",
            x=wr.SummaryMetric(f"{engine}/latency_ms"),
            y=wr.SummaryMetric(f"{engine}/{name}"),
        )
        for name in headlines
        for engine in engines
    ]
    return wr.Report(
        project=project, title="qwt2: compensated quantization", **({"entity": entity} if entity else {}),
        description="PTQ, QwT and QwT-v2 compared by accuracy, bits and latency on integer engines.",
        blocks=[
            wr.H1("Accuracy"), wr.PanelGrid(runsets=[runset], panels=accuracy),
            wr.H1("Latency"), wr.PanelGrid(runsets=[runset], panels=speed),
            wr.H1("Two runs side by side"), wr.PanelGrid(runsets=[runset], panels=[wr.RunComparer(diff_only="split")]),
        ],
    )  # fmt: skip


def save_report(project: str, entity: str | None, runs: list[Run]) -> str:
    """Save the page of comparisons on the server and return its address.

    Raises:
        Qwt2Error: the server refuses it.
    """
    import requests
    import wandb

    page = report(project, entity, runs)
    try:
        page.save()
    except (wandb.errors.Error, requests.RequestException, ValueError) as error:
        raise Qwt2Error(f"W&B refused the report: {str(error).splitlines()[0]}") from error
    return page.url


if __name__ == "__main__":
    guarded(main)
