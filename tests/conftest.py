"""Fixtures of all tests, and the last lines of a run, which list skipped tests and why."""

import gc
import re
from collections import defaultdict
from functools import partialmethod

import pytest


@pytest.fixture(scope="session")
def chromium_browser():
    """Yield one browser per process."""
    from benchmarks.browser import CHROMIUM, MISSING, chromium  # takes seconds, and pytest's own process needs none

    if CHROMIUM is None:
        pytest.skip(MISSING)
    with chromium() as browser:
        yield browser


@pytest.fixture
def short_learning(monkeypatch):
    """Make the learned method that ``quantize`` creates take a few steps instead of thousands."""
    from qwt2.quantization.methods.brecq import BRECQ

    few = partialmethod(BRECQ.__init__, iterations=30, learning_rate=3e-2, batch_size=8)
    monkeypatch.setattr(BRECQ, "__init__", few)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Keep the garbage collector away from all that the imports make: it would look through it again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """List the skipped tests below pytest's own summary, grouped by reason."""
    result = yield
    skipped = defaultdict(list)
    for report in terminalreporter.stats.get("skipped", ()):
        _, _, reason = report.longrepr
        test = re.sub(r"@[\w-]+$", "", report.nodeid)  # without the group that xdist adds to the name
        skipped[reason.removeprefix("Skipped: ")].append(test)
    if skipped:
        terminalreporter.section("tests that did not run")
    for reason, tests in sorted(skipped.items()):
        terminalreporter.write_line(f"{len(tests)} not run: {reason}")
        for test in sorted(tests):
            terminalreporter.write_line(f"    {test}")
    return result
