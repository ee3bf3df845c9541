"""Independent pieces of one stage's work on several cores."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tqdm import tqdm

from pipeline.logs import LOG


def each(label: str, work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> list[Any]:
    """`[work(item) for item in items]`, in forked processes if `workers` is above 1.

    Forking shares what the stage has imported and loaded, which would take a new process seconds. It needs
    single-threaded numeric libraries (`threads: 1`); results do not depend on the number of workers. What is done is
    logged, and shown as a bar on a terminal, under `label`.
    """
    items = list(items)
    if workers == 1 or len(items) == 1:
        return list(watched(label, map(work, items), items))
    global _work
    _work = work  # inherited by the forked processes: closures cannot be sent to them
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context) as pool:
        return list(watched(label, pool.map(_call, items), items))


def watched(label: str, results: Iterable[Any], items: Sequence[Any]) -> Iterator[Any]:
    """Pass on the results of `items` as they come; log each, and show a bar on a terminal if there are several."""
    bar = tqdm(zip(items, results), label, len(items), unit="model", disable=None if len(items) > 1 else True)
    for item, result in bar:
        LOG.info("%s: %s", label, " ".join(map(str, item)))
        yield result


_work: Callable[[Any], Any]


def _call(item: Any) -> Any:
    return _work(item)
