"""Markdown of the benchmarks' files: other tools, real networks, cost of calibration and models from outside."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.comparison.markdown import MISSING, replace, table
from qwt2.report.compensations import heading, order
from qwt2.report.findings import ENGINES


def read_dicts(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Engine -> the other tool that makes models for it: the name in the files, and the title.
_TOOLS = {
    "onnxruntime": ("quantize_static", "quantize_static"), "openvino": ("nncf", "NNCF"),
    "inductor": ("torchao", "torchao"),
}  # fmt: skip


def peers_table(rows: list[dict[str, str]]) -> str:
    """Return Markdown: per engine, model and batch, the latencies in multiples of folded CWAC's, and all SQNRs."""
    ratios = {"fp32": "fp32", "bf16": "bf16", "ptq": "PTQ", "cwac_unfolded": "CWAC unfolded", "qwt": "QwT"}
    headings = ["Engine", "Model", "Batch", "CWAC, ms", *(f"{name} ÷ CWAC" for name in ratios.values())]
    headings += ["Other tool, setting", "Other tool ÷ CWAC", "SQNR PTQ, dB", "SQNR CWAC, dB", "SQNR other tool, dB"]
    lines = []
    cells = {(r["engine"], r["model"], r["batch"], r["variant"]): r for r in rows}
    for engine, model, batch in sorted({key[:3] for key in cells}):
        own = {variant: row for (*key, variant), row in cells.items() if key == [engine, model, batch]}
        tool, title = _TOOLS[engine]
        base = float(own["cwac"]["latency_ratio_to_ptq"])
        times = [_figure(own, variant, "latency_ratio_to_ptq", base, 2) for variant in (*ratios, tool)]
        distances = [_figure(own, variant, "logits_sqnr_db", 1, 1) for variant in ("ptq", "cwac", tool)]
        best = f"{title}: {own[tool]['setting']}" if tool in own else MISSING
        name = "Inductor" if engine == "inductor" else ENGINES[engine]
        latency = f"{float(own['cwac']['latency_ms']):.1f}"
        lines.append([name, model, batch, latency, *times[:-1], best, times[-1], *distances])
    facts = f"{rows[0]['cpu']} ({rows[0]['instruction_sets']}), {rows[0]['threads']} thread; {rows[0]['versions']}"
    return f"{facts}\n\n{table(headings, lines, words=('Engine', 'Model', 'Other tool, setting'))}"


def _figure(rows: dict[str, dict[str, str]], variant: str, column: str, base: float, digits: int) -> str:
    """Return a variant's figure in multiples of ``base``, or a dash if it was not measured."""
    return f"{float(rows[variant][column]) / base:.{digits}f}" if variant in rows else MISSING


# Task -> the two figures of its tables: (column, format).
_REAL = {
    "classification": (("top1", "{:.1f}"), ("agreement", "{:.1f}")),
    "retrieval": (("recall1", "{:.1f}"), ("cosine", "{:.4f}")),
}


def real_table(rows: list[dict[str, str]]) -> str:
    """Return Markdown: real networks at all precisions on the engines."""
    quantized = [row for row in rows if row["method"] != "fp32" and row["engine"] in ENGINES]
    names = sorted({row["method"].partition("+")[2] for row in quantized}, key=order)
    fp32 = {row["model"]: row for row in rows if row["method"] == "fp32"}
    lines = []
    cells = {(r["model"], r["precision"], r["engine"], r["method"].partition("+")[2]): r for r in quantized}
    for model, precision, engine in dict.fromkeys(key[:3] for key in cells):
        found = [cells.get((model, precision, engine, name)) for name in names]
        figures = [MISSING if row is None else _accuracy(row) for row in found]
        lines.append([model, precision.upper(), ENGINES[engine], _accuracy(fp32[model]), *figures])
    shown = table(["Model", "Bits", "Engine", "fp32", *map(heading, names)], lines, words=("Model", "Bits", "Engine"))
    return f"{rows[0]['cpu']} ({rows[0]['instruction_sets']}); {rows[0]['versions']}\n\n{shown}"


def real_table_of_one_engine(rows: list[dict[str, str]]) -> str:
    """Return Markdown: real networks at all precisions on the first engine only, for README.md."""
    return real_table([row for row in rows if row["engine"] in ("torch", next(iter(ENGINES)))])


def real_peers_table(rows: list[dict[str, str]]) -> str:
    """Return Markdown: real networks at 8 bits, beside the best setting of each other tool.

    Latency is CPU time: calls of a few milliseconds on one thread are easily interrupted by the machine's other work.
    """
    headings = ["Engine", "Model", "File", "Accuracy", "SQNR, dB", "Latency, CPU ms", "Latency ÷ PTQ", "MB"]
    lines = []
    for engine, model in dict.fromkeys((row["engine"], row["model"]) for row in rows):
        own = [row for row in rows if (row["engine"], row["model"]) == (engine, model)]
        base = next(float(row["latency_cpu_ms"]) for row in own if row["variant"] == "ptq (this library)")
        for row in _best_of_each_tool(own):
            sqnr = MISSING if row["variant"] == "fp32" else f"{float(row['logits_sqnr_db']):.1f}"
            latency = float(row["latency_cpu_ms"])
            size = f"{int(row['file_bytes']) / 1e6:.1f}"
            times = [f"{latency:.2f}", f"{latency / base:.2f}"]
            lines.append([ENGINES[engine], model, row["variant"], _accuracy(row), sqnr, *times, size])
    return table(headings, lines, words=("Engine", "Model", "File"))


def _best_of_each_tool(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Leave out all settings of another tool but the one that is nearest to full precision."""

    def nearness(row: dict[str, str]) -> tuple[float, float]:
        return float(row[_REAL[row["task"]][1][0]]), float(row["logits_sqnr_db"])

    tools: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        name = row["variant"]
        tools.setdefault(name if "(this library)" in name else name.partition(" (")[0], []).append(row)
    return [max(own, key=nearness) for own in tools.values()]


def _accuracy(row: dict[str, str]) -> str:
    """Return a row's figures of its task, such as "74.3 / 92.4"; the second is missing in full precision."""
    return " / ".join(shown.format(float(row[name])) for name, shown in _REAL[row["task"]] if row.get(name))


def costs_table(rows: list[dict[str, str]]) -> str:
    """Return Markdown: a row per step, and how many times that the implementation which stores everything takes."""
    stored = {row["method"]: row for row in rows if row["implementation"] == "stored"}
    headings = ["Step", "Seconds", "CPU seconds", "Float passes", "MB added"]
    headings += ["stored ÷ this, CPU seconds", "stored ÷ this, MB"]
    lines = []
    for row in (row for row in rows if row["implementation"] == "qwt2"):
        other = stored.get(row["method"])
        times = [
            MISSING if other is None else f"{float(other[key]) / float(row[key]):.1f}"
            for key in ("cpu_seconds", "added_mb")
        ]
        lines.append([row["method"], row["seconds"], row["cpu_seconds"], row["float_passes"], row["added_mb"], *times])
    first = rows[0]
    facts = (
        f"{first['model']}, {first['precision']}, {first['images']} images; {first['cpu']}, {first['threads']} threads"
    )
    return f"{facts}\n\n{table(headings, lines, words=('Step',))}"


def processes_table(rows: list[dict[str, str]]) -> str:
    """Return Markdown: a row per step and number of processes."""
    lines = [[row["step"], row["processes"], row["seconds"], row["speedup"]] for row in rows]
    first = rows[0]
    facts = f"{first['model']}, {first['images']} images; {first['cpu']}, {first['threads']} thread per process"
    return f"{facts}\n\n{table(['Step', 'Processes', 'Seconds', 'Times faster'], lines, words=('Step',))}"


# Heading -> column of the zoo's rows.
_ZOO = {
    "Outcome": "outcome", "Graph against model, dB": "same_db", "Layers": "layers", "Products": "products",
    "Units of QwT": "blocks", "MACs in integers, %": "integer_macs_percent", "Float with 1 % noise, dB": "noise_db",
    "PTQ, dB": "ptq_db", "CWAC, dB": "cwac_db", "QwT, dB": "qwt_db", "NNCF, dB": "nncf_db",
    "quantize_static, dB": "quantize_static_db", "ONNX Runtime against simulation, dB": "onnxruntime_db",
    "OpenVINO against simulation, dB": "openvino_db", "CWAC, float passes": "cwac_passes",
    "QwT, float passes": "qwt_passes",
}  # fmt: skip
_ZOO_TOOLS = {"nncf": "NNCF", "quantize_static": "quantize_static"}
_FEW_PASSES = 3.5  # aim for the cost of CWAC


def zoo_table(rows: list[dict[str, str]]) -> str:
    """Return Markdown: what holds for all models together, then a row per model, with the reason if it failed."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["source"], row["family"])):
        figures = [row[column] or MISSING for column in _ZOO.values()]
        figures[0] += f": {row['reason']}" if row["reason"] else ""
        for tool in _ZOO_TOOLS:
            if row[tool] and row[tool] != "runs":
                figures[list(_ZOO.values()).index(f"{tool}_db")] = row[tool].partition(":")[0]
        lines.append([f"{row['source']}: {row['family']}", row["model"], *figures])
    shown = table(["Family", "Model", *_ZOO], lines, words=("Family", "Model", "Outcome"))
    return f"{_zoo_facts(rows)}. {rows[0]['cpu']}; {rows[0]['versions']}\n\n{shown}"


def _zoo_facts(rows: list[dict[str, str]]) -> str:
    taken = [row for row in rows if row["outcome"] != "not taken"]
    facts = [
        f"{source}: {sum(r['outcome'] == 'through' for r in own)} of {len(own)}"
        for source in sorted({row["source"] for row in taken})
        for own in [[row for row in taken if row["source"] == source]]
    ]
    text = f"Through, of those taken: {', '.join(facts)}"
    through = [row for row in taken if row["outcome"] == "through"]
    if through:
        shares = [float(row["integer_macs_percent"]) for row in through]
        passes = [float(row["cwac_passes"]) for row in through]
        text += f"; on average {sum(shares) / len(shares):.1f} % of the multiply-accumulates in integers"
        text += f"; QwT has units in {sum(int(row['blocks']) > 0 for row in through)} of {len(through)}; CWAC costs at "
        text += f"most {_FEW_PASSES} float passes in {sum(cost <= _FEW_PASSES for cost in passes)} and "
        text += f"{max(passes)} in all"
    both = [row for row in taken if all(row[tool] for tool in _ZOO_TOOLS)]
    if both:
        runs = [f"{sum(r[tool] == 'runs' for r in both)} through {name}" for tool, name in _ZOO_TOOLS.items()]
        here = sum(row["outcome"] == "through" for row in both)
        text += f". Of {len(both)} models that other tools got too, {here} come through here, {' and '.join(runs)}"
    return text


# Part of a page -> the files that it shows, one per machine, and what makes the text of a file's rows.
Parts = Mapping[str, tuple[str, Callable[[list[dict[str, str]]], str]]]
README_PARTS: Parts = {"real": ("real-grid-*.csv", real_table_of_one_engine)}
PARTS: Parts = {
    "peers": ("peers-*.csv", peers_table),
    "real": ("real-grid-*.csv", real_table),
    "real-peers": ("real-peers-*.csv", real_peers_table),
    "costs": ("calibration-cost-*.csv", costs_table),
    "processes": ("processes-*.csv", processes_table),
    "zoo": ("zoo-*.csv", zoo_table),
}


def replace_benchmarks(page: Path, folder: Path, parts: Parts = PARTS) -> None:
    """Replace the tables of the benchmarks that were run.

    Args:
        page: the page that has the parts' markers.
        folder: the folder of the benchmarks' files.
        parts: the parts of this page.
    """
    for name, (pattern, text_of) in parts.items():
        if texts := [text_of(read_dicts(file)) for file in sorted(folder.glob(pattern))]:
            replace(page, name, "\n\n".join(texts))
