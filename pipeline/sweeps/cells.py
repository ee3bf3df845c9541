"""Cells outside the grid. Each goes through the whole chain in one process, and is skipped once it is finished.

out/cells/<id>/      config.yaml, evaluate/, log.txt and, written last, cell.json (all that comparisons need);
                     ``id`` is a hash of the configuration; until then, stored.json names the finished stages, with
                     which a cell that was killed goes on
out/cells/shared/    datasets and baselines that DVC has not built; outputs.json, written last, has their hashes
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from pipeline.build import code_hashes, dvcfiles
from pipeline.build.compose import checked, is_experimental, select
from pipeline.common.folders import CELLS, LOCKS, OUT, OUTPUTS, SHARED, read_record
from pipeline.common.logs import LOG, log_to
from pipeline.common.stage import Cell, config_path, declared, locked, set_threads
from pipeline.stages.baseline import main as make_baseline
from pipeline.stages.data import main as make_data
from pipeline.stages.evaluate import main as evaluate
from pipeline.stages.quantize import main as quantize
from pipeline.tasks import TASKS, task_of
from qwt2.errors import Qwt2Error
from qwt2.io import read_json, write_json, write_text
from qwt2.report.metrics import ACCURACY, METRICS
from qwt2.report.results import Row, read_rows

STORED = "stored.json"
CHAIN = {"quantize": quantize, "evaluate": evaluate}
# Keys of conf/cell.yaml that do not change a cell's results: they say how it is run and stored.
_FILING = ("seed", "sweep", "keep_models", "objective", "printed", "experiment")


def cell_config(composed: DictConfig) -> dict[str, Any]:
    """Turn a composed conf/cell.yaml into a cell's checked configuration.

    The cell has no compensation, or one, which moves under its method's name, or several under names of their own.

    Raises:
        Qwt2Error: a key, name or value is wrong.
    """
    cfg = OmegaConf.create(OmegaConf.to_container(composed))
    compensations = _by_name(OmegaConf.to_container(cfg.compensation))
    with open_dict(cfg):
        cfg.seeds = [cfg.seed]
        for key in _FILING:
            cfg.pop(key, None)
        cfg.compensation = compensations
    return checked(cfg)


def _by_name(compensation: dict[str, Any]) -> dict[str, Any]:
    """Return name -> settings of the compensations of a composed cell."""
    if compensation and all(isinstance(settings, dict) for settings in compensation.values()):
        return compensation
    method = compensation.get("method")
    if not isinstance(method, str):
        raise Qwt2Error(
            f"compensation.method is {method!r}; choose the compensation by compensation=cwac, qwt, all or none"
        )
    return {} if method == "none" else {method: compensation}


def cell_id(cfg: dict[str, Any]) -> str:
    """Hash every setting that can change a cell's results. The number of workers cannot; code is recorded apart."""
    settings = cfg | {"workers": 0}
    return _digest(*(select(settings, stage) for stage in ("data", "baseline", *CHAIN)))


def cell_folder(cfg: dict[str, Any]) -> Path:
    """Return the folder of a cell."""
    return CELLS / cell_id(cfg)


def run_cell(cfg: dict[str, Any], keep_models: bool = False) -> dict[str, Any]:
    """Take a cell through the chain, unless it is finished.

    A cell counts as finished as long as neither the code of its stages nor its baseline has changed. One that was
    killed goes on behind its last finished stage.

    Args:
        cfg: a configuration from :func:`cell_config`.
        keep_models: keep the cell's weights and ONNX files.

    Returns:
        The cell's record, as stored in ``cell.json``. Its ``status`` is "finished", "skipped" or "failed". If the cell
        failed, ``error`` is one sentence, and ``log.txt`` has the traceback.
    """
    set_threads(cfg["threads"])
    folder = cell_folder(cfg)
    with locked(LOCKS / folder.name):
        data, baseline = data_folder(cfg), baseline_folder(cfg)
        weights = hashlib.sha256((baseline / "model.safetensors").read_bytes()).hexdigest()
        made_from = {"code": present_code(cfg), "baseline": weights}
        record = read_record(folder)
        if record and _is_finished(record, made_from, keep_models):
            return record | {"status": "skipped"}
        _keep_stored(folder, made_from)
        write_text(folder / "config.yaml", yaml.safe_dump(cfg, sort_keys=True))
        started = time.perf_counter()
        with log_to(folder / "log.txt"):
            outcome = _attempt(cfg, Cell("", data, baseline, folder), keep_models)
        facts = {"id": folder.name, "made_from": made_from, "seconds": time.perf_counter() - started, "config": cfg}
        record = facts | {"fp32": read_json(baseline / "metrics.json"), "models_kept": keep_models} | outcome
        write_json(folder / "cell.json", record)
        (folder / STORED).unlink()
    return record


def present_code(cfg: dict[str, Any]) -> str:
    """Return the hash of the code that a cell is made by."""
    return _code(cfg, "data", "baseline", *CHAIN)


def _code(cfg: dict[str, Any], *stages: str) -> str:
    """Hash the code of these stages, with that of the cell's task where the stages' own hash does not cover it."""
    return code_hashes.fingerprint(stages, [TASKS.get(cfg["task"]).__module__] if is_experimental(cfg["task"]) else [])


def _is_finished(record: dict[str, Any], made_from: dict[str, str], keep_models: bool) -> bool:
    same = record["status"] == "finished" and record["made_from"] == made_from
    return same and record["models_kept"] >= keep_models


def _keep_stored(folder: Path, made_from: dict[str, str]) -> None:
    """Delete a cell's folder, except for the stages that a killed run finished with the same code and baseline."""
    stored = read_record(folder, STORED) or {"made_from": None}
    found = stored["stages"] if stored["made_from"] == made_from else {}
    whole = list(takewhile(lambda stage: found.get(stage) == _hashes(folder, stage), CHAIN))
    for path in [path for path in folder.glob("*") if path.name not in whole]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(folder / STORED, {"made_from": made_from, "stages": {stage: found[stage] for stage in whole}})


def _attempt(cfg: dict[str, Any], cell: Cell, keep_models: bool) -> dict[str, Any]:
    try:
        _run_chain(cfg, cell)
        rows = read_rows(cell.folder("evaluate") / "rows.csv")
        results = {"method": own_method(rows), "figures": by_method(rows)}
        results |= {"artifacts": _hashes(cell.out, "quantize"), "outputs": _hashes(cell.out, "evaluate")}
    except Exception as error:  # of any kind: the other cells of the sweep go on
        LOG.debug("failed", exc_info=error)
        _remove(cell, CHAIN)
        return {"status": "failed", "error": sentence(error)}
    if not keep_models:
        _remove(cell, ["quantize"])
    return {"status": "finished"} | results


def _run_chain(cfg: dict[str, Any], cell: Cell) -> None:
    for stage, run in CHAIN.items():
        if stage not in read_json(cell.out / STORED)["stages"]:
            LOG.info("stage %s", stage)
            run(declared(select(cfg, stage)), cell)
            _note(cell, stage)


def _note(cell: Cell, stage: str) -> None:
    """Note that a stage has written its folder."""
    stored = read_json(cell.out / STORED)
    write_json(cell.out / STORED, stored | {"stages": stored["stages"] | {stage: _hashes(cell.out, stage)}})


def own_method(rows: Iterable[Row]) -> str:
    """Return the method that a cell was run for: plain PTQ without compensations, and of several the last by name."""
    return max((row.method for row in rows), key=lambda method: ("+" in method, method))


def by_method(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return method -> ``<engine>/<metric>`` -> value."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row.method, {})[f"{row.engine}/{row.metric}"] = row.value
    return found


def sentence(error: Exception) -> str:
    """Return one line about an error; if it is not a user's mistake, with its class, which may be the clearest part."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, Qwt2Error) else f"{type(error).__name__}: {text} (traceback in the cell's log.txt)"


def figures(record: dict[str, Any]) -> dict[str, float]:
    """Return the figures by which cells are compared: accuracy as its task shows it, SQNR in dB, latency over PTQ's."""
    own, ptq = record["figures"][record["method"]], record["figures"][record["method"].partition("+")[0]]
    accuracy = [name for name in ACCURACY[task_of(record["config"]["model"])] if not METRICS[name].hidden]
    found = {f"fp32_{name}": record["fp32"][name] for name in accuracy}
    found |= {f"ptq_{name}": ptq[f"torch/{name}"] for name in accuracy}
    measured = {name: name for name in (*accuracy, "segm_ap", "agreement", "cosine")} | {"sqnr_db": "logits_sqnr_db"}
    found |= {name: own[f"torch/{metric}"] for name, metric in measured.items() if f"torch/{metric}" in own}
    for engine in sorted({name.partition("/")[0] for name in own} - {"torch"}):
        found |= {f"{engine}_{name}": own[f"{engine}/{name}"] for name in accuracy}
        found[f"{engine}_latency_ratio"] = own[f"{engine}/latency_ratio_to_ptq"]
    return found


def _hashes(root: Path, *folders: str) -> dict[str, dict[str, Any]]:
    files = sorted(path for folder in folders for path in (root / folder).rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }


def _remove(cell: Cell, stages: Iterable[str]) -> None:
    for stage in stages:
        shutil.rmtree(cell.folder(stage), ignore_errors=True)


def data_folder(cfg: dict[str, Any]) -> Path:
    """Return the folder of the cell's dataset: DVC's if DVC built it, otherwise one that all cells share."""
    stored = _made_with("data", config_path("data"))
    if cfg["datasets"].items() <= stored.get("datasets", {}).items() and is_whole("data", "data"):
        return OUT / "data"
    return _shared("data", make_data, cfg, Cell("", Path(), Path()))


def baseline_folder(cfg: dict[str, Any]) -> Path:
    """Return the folder of the cell's full-precision model: DVC's if DVC built it, otherwise one that cells share."""
    model = cfg["model"]["name"]
    config = yaml.safe_load(select(cfg, "baseline"))
    if _made_with(f"baseline@{model}", config_path("baseline", model)) == config and is_whole(
        f"baseline@{model}", f"baseline/{model}"
    ):
        return OUT / "baseline" / model
    return _shared("baseline", make_baseline, cfg, Cell("", data_folder(cfg), Path()))


def _made_with(stage: str, path: Path) -> dict[str, Any]:
    """Return the configuration that a DVC stage last ran with; empty if it never ran."""
    return dvcfiles.locked_stages().get(stage, {}).get("params", {}).get(path.as_posix(), {})


def is_whole(stage: str, out: str) -> bool:
    """Return whether the output of a DVC stage is still what the stage wrote."""
    return dvcfiles.md5(OUT / out) == dvcfiles.locked_stages()[stage]["outs"][0]["md5"]


def _shared(stage: str, make: Callable[[Any, Cell], None], cfg: dict[str, Any], cell: Cell) -> Path:
    config = select(cfg, stage)
    folder = SHARED / f"{stage}-{_digest(config, _code(cfg, stage))}"
    with locked(LOCKS / folder.name):
        if not (folder / OUTPUTS).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            with log_to(SHARED / f"{folder.name}.log"):
                make(declared(config), replace(cell, **{stage: folder}))
            write_text(folder / "config.yaml", config)
            write_json(folder / OUTPUTS, _hashes(folder, "."))
    return folder


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
