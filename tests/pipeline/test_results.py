"""The results table: one written form, and every malformed table refused in one sentence that names it."""

import csv
import random

import pytest

from benchmarks import synthetic
from qwt2.compensation.methods import COMPENSATIONS
from qwt2.errors import Qwt2Error
from qwt2.report import compensations
from qwt2.report.results import (
    COLUMNS,
    LAYER_COLUMNS,
    LAYER_FIGURES,
    Method,
    Results,
    format_number,
    method_order,
    precision_order,
    read_layers,
    read_rows,
    write_layers,
    write_rows,
)

GOOD = "classification,digits,vit,w4a4,repq,torch,top1,83.9,0.4,percent,3"
GOOD_LAYER = "vit,w4a4,repq+cwac,0,head,layer,10.5,12.5,True,,9.9,10.1,2.0,1.01,0.02,0.3" + ",1.5" * 7 + ",0.25" * 7


def table(*lines: str, columns=COLUMNS) -> str:
    return "\n".join((",".join(columns), *lines)) + "\n"


def changed(line: str, columns, **fields: str) -> str:
    values = dict(zip(columns, line.split(","))) | fields
    return ",".join(values.values())


def test_written_rows_read_back_sorted_whatever_their_order(tmp_path):
    rows = synthetic.cell_rows("vit_micro", "w3a3")
    random.Random(0).shuffle(rows)
    write_rows(tmp_path / "a.csv", rows)
    write_rows(tmp_path / "b.csv", reversed(rows))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    read = read_rows(tmp_path / "a.csv")
    assert [row.key for row in read] == sorted(row.key for row in rows)
    by_key = {row.key: row for row in rows}
    for row in read:
        assert row.value == pytest.approx(by_key[row.key].value, rel=1e-3, abs=1e-4)
        assert (row.unit, row.n, row.std is None) == (*by_key[row.key][9:], by_key[row.key].std is None)
    with (tmp_path / "a.csv").open(newline="") as file:
        assert next(csv.reader(file)) == list(COLUMNS)


def test_reading_and_writing_again_changes_no_byte(tmp_path):
    write_rows(tmp_path / "first.csv", synthetic.cell_rows("swin_micro", "w8a8"))
    write_rows(tmp_path / "second.csv", read_rows(tmp_path / "first.csv"))
    assert (tmp_path / "first.csv").read_bytes() == (tmp_path / "second.csv").read_bytes()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, ""), (0.0, "0"), (-0.0, "0"), (3, "3"), (-0.05, "-0.05"), (83.91666666, "83.9167")),
        *((1310512, "1310512"), (1234567.3333333, "1234567.3333"), (2.5e9, "2500000000")),
        *((0.123456, "0.1235"), (3.3333333e-8, "0.00000003333")),
    ],
)
def test_number_format(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "must have the columns"),
        (table(columns=COLUMNS[:-1]), "must have the columns"),
        (table(columns=(*COLUMNS, "note")), "must have the columns"),
        (table(GOOD + ",x"), "line 2: has too many or too few fields"),
        (table(GOOD, GOOD.rpartition(",")[0]), "line 3: has too many or too few fields"),
        (table(GOOD, GOOD), "top1 twice"),
        (table(GOOD, changed(GOOD, COLUMNS, value="80")), "top1 twice"),
        (table(changed(GOOD, COLUMNS, value="nan")), "value is nan"),
        (table(changed(GOOD, COLUMNS, value="-inf")), "value is -inf"),
        (table(changed(GOOD, COLUMNS, value="good")), "value is 'good', not a number"),
        (table(changed(GOOD, COLUMNS, value="")), "value is '', not a number"),
        (table(changed(GOOD, COLUMNS, std="nan")), "std is nan"),
        (table(changed(GOOD, COLUMNS, std="-1")), "std of top1 is -1"),
        (table(changed(GOOD, COLUMNS, metric="top2")), "unknown metric 'top2'; known: top1"),
        (table(changed(GOOD, COLUMNS, unit="points")), "top1 is in 'points', but must be in 'percent'"),
        (table(changed(GOOD, COLUMNS, n="0")), "n of top1 is 0"),
        (table(changed(GOOD, COLUMNS, n="2.5")), "n is '2.5', not a whole number"),
        (table(changed(GOOD, COLUMNS, model="")), "model is empty"),
        (table('"' + GOOD), "is not CSV"),
    ],
)
def test_malformed_table_is_refused(tmp_path, content, complaint):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(Qwt2Error) as error:
        read_rows(path)
    assert str(path) in str(error.value) and complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_binary_tables_are_refused(tmp_path):
    with pytest.raises(Qwt2Error, match="rows.csv does not exist; run"):
        read_rows(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Qwt2Error, match="rows.csv is not UTF-8"):
        read_rows(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    "bad",
    [
        synthetic.figure("vit", "w4a4", "repq", "torch", "top1", float("nan")),
        synthetic.figure("vit", "w4a4", "repq", "torch", "top1", 80.0, float("inf"), 3),
        synthetic.figure("vit", "w4a4", "repq", "torch", "top1", 80.0)._replace(unit="dB"),
    ],
)
def test_nothing_is_written_of_a_table_that_could_not_be_read(tmp_path, bad):
    path = tmp_path / "summary.csv"
    path.write_text("what was there")
    with pytest.raises(Qwt2Error, match="summary.csv"):
        write_rows(path, [synthetic.figure("vit", "w4a4", "repq", "torch", "top5", 99.0), bad])
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_layers_keep_their_order_and_may_lack_scales(tmp_path):
    path = tmp_path / "layers.csv"
    qwt = "vit,w4a4,repq+qwt,0,blocks.0,block,10,9.5,False,no gain" + "," * len(LAYER_FIGURES)
    path.write_text(table(GOOD_LAYER, qwt, columns=LAYER_COLUMNS))
    cwac, block = read_layers(path)
    assert (cwac.module, cwac.sqnr_before_db, cwac.sqnr_after_db, cwac.kept) == ("head", 10.5, 12.5, True)
    assert (cwac.figures["beta_rms"], cwac.figures["alpha_p95"], cwac.figures["beta_min"]) == (0.3, 1.5, 0.25)
    assert (block.module, block.seed, block.kept, block.reason) == ("blocks.0", 0, False, "no gain")
    assert set(block.figures.values()) == {None} and block.mismatch == {}


def test_written_layers_read_back_with_the_engines_they_were_compared_on(tmp_path):
    path = tmp_path / "layers.csv"
    record = {"model": "vit", "precision": "w4a4", "method": "repq", "seed": 0, "module": "a.matmul1", "kind": "product"}
    on_one = {"openvino_steps": 0.5, "openvino_fraction": 1e-4, "more": "than has a column"}
    write_layers(path, [record | on_one, record | {"module": "head", "kind": "layer", "kept": False}], ["ort", "openvino"])
    product, head = read_layers(path)
    assert product.mismatch == {"openvino": (0.5, 1e-4)} and product.kept is None and product.sqnr_before_db is None
    assert head.mismatch == {} and head.kept is False


@pytest.mark.parametrize(
    ("field", "text", "complaint"),
    [
        ("kept", "maybe", "kept is 'maybe'"),
        ("kind", "unit", "kind is 'unit'"),
        ("sqnr_after_db", "high", "sqnr_after_db is 'high'"),
        ("sqnr_before_db", "inf", "sqnr_before_db is inf"),
        ("alpha_mean", "nan", "alpha_mean is nan"),
        ("seed", "first", "seed is 'first'"),
    ],
)
def test_malformed_layers_are_refused(tmp_path, field, text, complaint):
    path = tmp_path / "layers.csv"
    path.write_text(table(changed(GOOD_LAYER, LAYER_COLUMNS, **{field: text}), columns=LAYER_COLUMNS))
    with pytest.raises(Qwt2Error, match="layers.csv, line 2") as error:
        read_layers(path)
    assert complaint in str(error.value)


def test_method_names_come_apart():
    assert Method.parse("repq") == ("repq", "")
    assert Method.parse("repq+cwac") == ("repq", "cwac")
    assert Method.parse("repq_published+qwt") == ("repq_published", "qwt")
    assert Method.parse("repq_published+qwt").is_published and not Method.parse("repq+qwt").is_published
    assert Method.parse("percentile+cwac").ptq == "percentile"


def test_reading_order_of_precisions_and_methods():
    assert sorted(("w2a4", "mixed", "w3a3", "w8a8", "fp32", "w4a8", "w4a4"), key=precision_order) == [
        *("fp32", "w8a8", "w4a8", "w4a4", "w3a3", "w2a4", "mixed"),
    ]
    assert sorted(("repq_published", "repq+cwac", "repq+zeta", "repq", "mse", "repq+qwt"), key=method_order) == [
        *("mse", "repq", "repq+qwt", "repq+cwac", "repq+zeta", "repq_published"),
    ]


def test_lookup():
    results = Results(synthetic.cell_rows("vit_micro", "w3a3") + synthetic.cell_rows("vit_micro", "w8a8"))
    assert results.models == ["vit_micro"]
    assert results.precisions("vit_micro") == ["w8a8", "w3a3"]
    assert results.methods("vit_micro", "w8a8")[:3] == ["repq", "repq+qwt", "repq+cwac"]
    assert results.engines() == ["torch", "onnxruntime", "openvino"]
    assert results.get("vit_micro", "w8a8", "repq", "openvino", "latency_ms").unit == "ms"
    assert results.get("vit_micro", "w8a8", "repq_published", "openvino", "latency_ms") is None


def test_a_compensation_says_how_it_is_shown(monkeypatch):
    monkeypatch.setattr(COMPENSATIONS, "_entries", dict(COMPENSATIONS._entries))

    @COMPENSATIONS.register("between")
    class Between:
        LABEL, ORDER, COLOUR = "In between", 15, "#123456"

    names = ["repq+cwac", "repq+own", "repq+between", "repq", "repq+qwt"]
    assert sorted(names, key=method_order) == ["repq", "repq+qwt", "repq+between", "repq+cwac", "repq+own"]
    assert compensations.heading("between") == "PTQ + In between" and compensations.colour("between") == "#123456"
    assert compensations.heading("own") == "PTQ + own" and compensations.heading("") == "PTQ"


@pytest.mark.parametrize("settings, exportable", [({}, True), ({"granularity": "block"}, False)])
def test_a_compensation_says_whether_engines_can_run_it(settings, exportable):
    assert COMPENSATIONS.get("cwac")(**settings).exportable is exportable
