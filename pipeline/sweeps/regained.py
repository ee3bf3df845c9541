"""The accuracy that compensation regains in a sweep: a table and a sentence per model and precision."""

from collections.abc import Iterator

from tabulate import tabulate

from pipeline.sweeps.groups import FP32, Group, groups
from qwt2.report.compensations import SUBJECT, heading, label
from qwt2.report.findings import ENGINES
from qwt2.report.metrics import HEADLINE, METRICS
from qwt2.report.results import Method

_MISSING = "–"


def regained(sweep: str) -> str:
    """Return the text of a sweep's finished cells."""
    finished = [group for group in groups(sweep) if group.methods]
    return "\n\n".join(text for group in finished for text in (_table(group), _sentence(group)))


def _table(group: Group) -> str:
    headline = HEADLINE[group.task]
    accuracy = METRICS[headline].heading
    columns = [(f"{accuracy}\nsimulated", f"torch/{headline}", "{:.1f}")]
    columns += [(f"{accuracy}\n{name}", f"{engine}/{headline}", "{:.1f}") for engine, name in ENGINES.items()]
    columns += [
        (f"latency ÷ PTQ\n{name}", f"{engine}/latency_ratio_to_ptq", "{:.2f}") for engine, name in ENGINES.items()
    ]
    columns += [("parameters\nadded", "torch/extra_params", "{:,.0f}")]
    lines = [
        [_title(method), *(form.format(figures[key]) if key in figures else _MISSING for _, key, form in columns)]
        for method, figures in group.methods.items()
    ]
    headings = [f"{group.model} {group.precision.upper()}", *(text for text, _, _ in columns)]
    return tabulate(lines, headings, disable_numparse=True, colalign=("left", *["right"] * len(columns)))


def _title(method: str) -> str:
    """Return a method's name in the table: ``percentile+cwac`` becomes "PTQ (percentile) + CWAC"."""
    ptq, compensation = Method.parse(method)
    return method if method == FP32 else heading(compensation).replace("PTQ", f"PTQ ({ptq})", 1)


def _sentence(group: Group) -> str:
    """Say what plain PTQ loses on the first engine and what each compensation regains there, at which cost."""
    engine, name = next(iter(ENGINES.items()))
    accuracy = HEADLINE[group.task]
    plain = next((method for method in group.methods if method != FP32 and Method.parse(method).is_plain), "")
    fp32, lost = group.get(FP32, f"torch/{accuracy}"), group.get(plain, f"{engine}/{accuracy}")
    if fp32 is None or lost is None:
        return f"{group.model} was not measured on {name}."
    unit = f"% {METRICS[accuracy].heading.removesuffix(' %')}"
    fall = f"On {name}, {group.precision.upper()} takes {group.model} from {fp32:.1f} to {lost:.1f} {unit}"
    return "; ".join([fall, *_phrases(group, engine, plain)]) + "."


def _phrases(group: Group, engine: str, plain: str) -> Iterator[str]:
    methods = [method for method in group.methods if Method.parse(method).ptq == plain and method != plain]
    for method in sorted(methods, key=lambda name: Method.parse(name).compensation != SUBJECT):
        figures = group.methods[method]
        if (accuracy := figures.get(f"{engine}/{HEADLINE[group.task]}")) is not None:
            yield (
                f"{label(Method.parse(method).compensation)} brings it to {accuracy:.1f} %, with "
                f"{figures['torch/extra_params']:,.0f} more parameters and "
                f"{figures[f'{engine}/latency_ratio_to_ptq']:.2f} times the latency"
            )
