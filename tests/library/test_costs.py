"""Sizes, operation counts and latency ratios of networks whose figures are known by hand."""

import functools
import time

import numpy as np
import pytest
import torch
from torch import nn

from qwt2.evaluation.costs import multiply_accumulates, stored_numbers
from qwt2.evaluation.latency import measure_latency


def test_stored_numbers_counts_parameters_and_buffers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert stored_numbers(model) == 3 * 4 * 9 + 4 + 4 * 4 + 1  # BatchNorm: weight, bias, mean, variance, batch counter


def test_multiply_accumulates():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 10))
    assert multiply_accumulates(model, torch.zeros(1, 3, 8, 8)) == 64 * 3 * 9 * 4 + 4 * 64 * 10


class Clock:
    """A clock that only advances when told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "process_time", lambda: self.now / 2)

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_latency_is_a_median_and_the_ratio_one_within_rounds(monkeypatch):
    clock = Clock(monkeypatch)
    rng = np.random.default_rng(0)
    load = {"factor": 1.0}

    def call(seconds):
        def run():
            clock.spend(seconds * load["factor"])
            if rng.random() < 0.1:
                clock.spend(10.0)  # something else took the processor

        return run

    measured = measure_latency({"a": [call(2e-3)], "b": [call(3e-3)]}, base="a", repeats=101)
    assert measured["a"].wall_ms == pytest.approx(2) and measured["b"].wall_ms == pytest.approx(3)
    assert measured["a"].cpu_ms == pytest.approx(1)
    assert measured["a"].ratio == 1 and measured["b"].ratio == pytest.approx(1.5)


def test_latency_ratio_does_not_see_a_drift_of_the_machine(monkeypatch):
    clock = Clock(monkeypatch)

    def slower_and_slower():
        clock.spend(1e-3 + clock.now * 1e-3)

    measured = measure_latency({"a": [slower_and_slower], "b": [slower_and_slower]}, base="a", repeats=100)
    assert measured["b"].ratio == pytest.approx(1, abs=5e-3)


def test_every_instance_takes_its_turn_and_the_order_changes(monkeypatch):
    clock = Clock(monkeypatch)
    order = []

    def called(name, instance):
        order.append((name, instance))
        clock.spend(1e-3)

    calls = {name: [functools.partial(called, name, i) for i in range(2)] for name in "ab"}
    measure_latency(calls, base="a", repeats=10, warmup=0)
    assert len(order) == 10 * 2 * 2  # rounds, names, and the untimed call before each timed one
    assert order[::2] == order[1::2]
    timed = order[1::2]
    assert {t for t in timed} == {("a", 0), ("a", 1), ("b", 0), ("b", 1)}
    assert {timed[i][0] for i in range(0, len(timed), 2)} == {"a", "b"}
