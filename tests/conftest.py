"""Fixtures of all tests: one browser per process, and the last lines of a run, which list skipped tests and why."""

from collections import defaultdict

import pytest

from benchmarks.browser import CHROMIUM, MISSING, chromium


@pytest.fixture(scope="session")
def chromium_browser():
    if CHROMIUM is None:
        pytest.skip(MISSING)
    with chromium() as browser:
        yield browser


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """List the skipped tests below pytest's own summary, grouped by reason."""
    result = yield
    skipped = defaultdict(list)
    for report in terminalreporter.stats.get("skipped", ()):
        _, _, reason = report.longrepr
        skipped[reason.removeprefix("Skipped: ")].append(report.nodeid)
    if skipped:
        terminalreporter.section("tests that did not run")
    for reason, tests in sorted(skipped.items()):
        terminalreporter.write_line(f"{len(tests)} not run: {reason}")
        for test in sorted(tests):
            terminalreporter.write_line(f"    {test}")
    return result
