"""What a sweep says that compensation regains: figures of its cells, also of detectors and of cells that failed."""

import json

from pipeline.common.folders import CELLS
from pipeline.sweeps.regained import regained
from pipeline.sweeps.sweep import job_path


def add_cell(number: int, model: dict, figures: dict | None, fp32: dict) -> None:
    """Record a cell of sweep "s": with these figures by method, or failed."""
    record = {"number": number, "overrides": {"n": str(number)}, "cell": f"c{number}", "model": model["name"], "precision": "w2a3"}
    path, folder = job_path("s", record["overrides"]), CELLS / f"c{number}"
    for parent in (path.parent, folder):
        parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    cell = {"status": "finished" if figures else "failed", "config": {"model": model, "precision": {"name": "w2a3"}},
            "fp32": fp32, "figures": figures}  # fmt: skip
    (folder / "cell.json").write_text(json.dumps(cell))


def figures(metric: str, simulated: float, engine: float, ratio: float, more: float) -> dict[str, float]:
    return {f"torch/{metric}": simulated, "torch/extra_params": more, f"onnxruntime/{metric}": engine,
            "onnxruntime/latency_ratio_to_ptq": ratio}  # fmt: skip


def test_the_sentence_has_the_figures_of_the_engine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = {"name": "net", "timm": "resnet18"}
    plain = figures("top1", 40.4, 40.5, 1.0, 0)
    add_cell(0, net, {"mse": plain, "mse+qwt": figures("top1", 91.0, 91.2, 1.52, 8160)}, {"top1": 97.66})
    add_cell(1, net, {"mse": plain, "mse+cwac": figures("top1", 90.0, 90.3, 1.004, 0)}, {"top1": 97.66})
    add_cell(2, net, None, {"top1": 97.66})
    table, _, sentence = regained("s").rpartition("\n\n")
    assert sentence == (
        "On ONNX Runtime, W2A3 takes net from 97.7 to 40.5 % top-1; CWAC brings it to 90.3 %, with 0 more parameters and "
        "1.00 times the latency; QwT brings it to 91.2 %, with 8,160 more parameters and 1.52 times the latency."
    )
    assert [line.split()[0] for line in table.splitlines()[3:]] == ["fp32", "PTQ", "PTQ", "PTQ"]


def test_detectors_have_their_own_metric_and_several_seeds_their_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = {"name": "det", "mmdet": "some.py"}
    for number, value in enumerate((30.0, 32.0)):
        methods = {"repq": figures("bbox_ap", value, value, 1.0, 0), "repq+cwac": figures("bbox_ap", 50.0, 50.0, 1.0, 0)}
        add_cell(number, net, methods, {"bbox_ap": 60.0})
    assert "takes det from 60.0 to 31.0 % box AP; CWAC brings it to 50.0 %" in regained("s")


def test_cells_without_an_engine_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add_cell(0, {"name": "net", "timm": "resnet18"}, {"mse": {"torch/top1": 40.0}}, {"top1": 97.0})
    assert regained("s").endswith("net was not measured on ONNX Runtime.")
