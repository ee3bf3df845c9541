"""Latency of several models, measured interleaved so that a noisy machine disturbs all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call.

    Attributes:
        wall_ms, cpu_ms: medians of wall time and of the process' CPU time.
        ratio: median over rounds of this call's wall time over the base call's in the same round.
    """

    wall_ms: float
    cpu_ms: float
    ratio: float


def measure_latency(
    calls: Mapping[str, Sequence[Callable[[], Any]]], base: str, repeats: int, warmup: int = 5
) -> dict[str, Latency]:
    """Time ``calls`` in rounds, each round every name once, in an order drawn anew for each round.

    Every timed call follows an untimed one of the same kind, so that what another model left in the
    caches does not count.

    Args:
        calls: name -> equivalent functions without arguments. Several instances of a model, used in
            turn, keep the luck of one instance's place in memory (up to 10 % for millisecond
            models) out of the ratios.
        base: the name that ratios refer to.
        repeats: rounds that count.
        warmup: rounds before those.
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
