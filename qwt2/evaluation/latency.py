"""Latency of several models, measured in turns so that a noisy machine disturbs all of them equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Latency of one call.

    Attributes:
        wall_ms, cpu_ms: median wall time and median CPU time of the process, in milliseconds.
        ratio: median over rounds of this call's wall time, divided by the base call's in the same round.
    """

    wall_ms: float
    cpu_ms: float
    ratio: float


def measure_latency(
    calls: Mapping[str, Sequence[Callable[[], Any]]], base: str, repeats: int, warmup: int = 5
) -> dict[str, Latency]:
    """Time ``calls`` in rounds. Each round times every name once, in a random order.

    Every timed call follows an untimed one of the same kind, so that it does not start with the caches that another
    model left behind.

    Args:
        calls: name -> equivalent functions without arguments, which are used in turn. Give several instances of a
            model: the place of one instance in memory changes the latency of millisecond models by up to 10 %.
        base: the name that ratios refer to.
        repeats: number of timed rounds.
        warmup: number of untimed rounds before those.

    Returns:
        Name -> :class:`Latency`, in the order of ``calls``.
    """
    names = list(calls)
    wall, cpu = np.zeros((repeats, len(names))), np.zeros((repeats, len(names)))
    rng = np.random.default_rng(0)
    for round_number in range(-warmup, repeats):
        for i in rng.permutation(len(names)):
            call = calls[names[i]][round_number % len(calls[names[i]])]
            call()
            started, cpu_started = time.perf_counter(), time.process_time()
            call()
            if round_number >= 0:
                cpu[round_number, i] = time.process_time() - cpu_started
                wall[round_number, i] = time.perf_counter() - started
    wall_ms, cpu_ms = 1e3 * np.median(wall, axis=0), 1e3 * np.median(cpu, axis=0)
    ratio = np.median(wall / wall[:, [names.index(base)]], axis=0)
    return {n: Latency(float(wall_ms[i]), float(cpu_ms[i]), float(ratio[i])) for i, n in enumerate(names)}
