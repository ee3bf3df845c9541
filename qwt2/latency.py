"""Latency of several models, measured interleaved so that a noisy machine disturbs all alike."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable, Mapping

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
    calls: Mapping[str, Callable[[], Any]], base: str, repeats: int, warmup: int = 10
) -> dict[str, Latency]:
    """Time ``calls`` in rounds, each round every call once, in alternating order.

    Args:
        calls: name -> function without arguments.
        base: the call that ratios refer to.
        repeats: rounds that count.
        warmup: rounds before those.
    """
    names = list(calls)
    wall, cpu = np.zeros((repeats, len(names))), np.zeros((repeats, len(names)))
    for round_number in range(-warmup, repeats):
        # Alternating directions cancel the effect of always following the same neighbour.
        order = range(len(names)) if round_number % 2 else reversed(range(len(names)))
        for i in order:
            started, cpu_started = time.perf_counter(), time.process_time()
            calls[names[i]]()
            if round_number >= 0:
                cpu[round_number, i] = time.process_time() - cpu_started
                wall[round_number, i] = time.perf_counter() - started
    base_wall = wall[:, names.index(base)]
    return {
        name: Latency(
            1e3 * float(np.median(wall[:, i])), 1e3 * float(np.median(cpu[:, i])), float(np.median(wall[:, i] / base_wall))
        )
        for i, name in enumerate(names)
    }
