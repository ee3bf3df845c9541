"""Progress and logs: one line a piece of work in a file; bars and talk only for who asked."""

import io
import logging
import os
import sys
import time
import warnings

import pytest

from pipeline.common import parallel
from pipeline.common.logs import LOG, VERBOSE, log_to
from qwt2.errors import Qwt2Error


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.delenv(VERBOSE, raising=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_piece_of_work_is_logged_and_results_keep_their_order(workers, tmp_path, capsys):
    with log_to(tmp_path / "stage.log"):
        results = parallel.each("square", lambda run: run[1] ** 2, [("a", 2), ("b", 3)], workers)
    assert results == [4, 9]
    lines = (tmp_path / "stage.log").read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in lines] == ["square: a 2", "square: b 3"]
    assert capsys.readouterr() == ("", "")  # not a terminal: no bar


@pytest.mark.parametrize("workers", [1, 2])
def test_what_follows_a_piece_comes_after_it(workers, tmp_path):
    def begin(run: tuple[int]) -> int:
        time.sleep(0.2 / (1 + run[0]))  # the first ends last
        (tmp_path / str(run[0])).write_text("begun")
        return run[0] ** 2

    def finish(run: tuple[int]) -> str:
        path = tmp_path / str(run[0])
        path.write_text(f"{path.read_text()}, finished")
        return "is nobody's result"

    assert parallel.each("two", begin, [(0,), (1,), (2,)], workers, then=finish) == [0, 1, 4]
    assert [(tmp_path / str(number)).read_text() for number in range(3)] == ["begun, finished"] * 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_piece_that_fails_is_not_followed(workers, tmp_path):
    def fail(run: tuple[int]) -> None:
        if run[0] == 1:
            raise Qwt2Error("no")

    with pytest.raises(Qwt2Error, match="no"):
        parallel.each("two", fail, [(0,), (1,), (2,)], workers, then=lambda run: (tmp_path / str(run[0])).write_text(""))
    assert not (tmp_path / "1").exists()


def test_a_terminal_gets_a_bar_with_an_estimate(monkeypatch):
    class Terminal(io.StringIO):
        isatty = lambda self: True  # noqa: E731

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert parallel.each("fold", lambda run: run[0], [(1,), (2,)], 1) == [1, 2]
    assert "fold" in terminal.getvalue() and "2/2" in terminal.getvalue() and "<" in terminal.getvalue()


def test_verbose_shows_what_is_logged_and_warnings_go_to_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(VERBOSE, "1")
    with log_to(tmp_path / "a.log"):
        LOG.info("hello")
        warnings.warn("careful", stacklevel=1)
    shown = capsys.readouterr().err
    assert "hello" in shown and "careful" in shown
    text = (tmp_path / "a.log").read_text()
    assert "hello" in text and "careful" in text
    left = [*LOG.handlers, *logging.getLogger("py.warnings").handlers]
    assert not any(isinstance(handler, logging.FileHandler) for handler in left)


def test_a_second_run_starts_a_new_file(tmp_path):
    for word in ("first", "second"):
        with log_to(tmp_path / "a.log"):
            LOG.info(word)
    assert "first" not in (tmp_path / "a.log").read_text() and os.listdir(tmp_path) == ["a.log"]
