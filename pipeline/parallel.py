"""Independent pieces of one stage's work on several cores."""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def each(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> list[Any]:
    """`[work(item) for item in items]`, in forked processes if `workers` is above 1.

    Forking shares what the stage has imported and loaded, which would take a new process seconds. It needs
    single-threaded numeric libraries (`threads: 1`); results do not depend on the number of workers.
    """
    items = list(items)
    if workers == 1 or len(items) == 1:
        return [work(item) for item in items]
    global _work
    _work = work  # inherited by the forked processes: closures cannot be sent to them
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context) as pool:
        return list(pool.map(_call, items))


_work: Callable[[Any], Any]


def _call(item: Any) -> Any:
    return _work(item)
