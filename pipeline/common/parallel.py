"""Running independent pieces of a stage's work on several cores."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm

from pipeline.common.logs import LOG


def each(
    label: str, work: Callable[[Any], Any], items: Iterable[Any], workers: int, then: Callable[[Any], Any] | None = None
) -> list[Any]:
    """Compute ``[work(item) for item in items]``, in forked processes if ``workers`` is above 1.

    Forked processes share what the stage has imported and loaded, which would take a new process seconds. Forking needs
    single-threaded numeric libraries (``threads: 1``). Results do not depend on the number of workers.

    Args:
        label: names the work in the log and on the terminal's progress bar.
        work: computes the result of one item.
        items: what to work on.
        workers: number of processes.
        then: called with an item after ``work``, as a separate job that may run in another process. Splitting the work
            keeps the workers busy when there are few items.

    Returns:
        The results of ``work``, in the order of ``items``.
    """
    items = list(items)
    if workers == 1 or len(items) == 1:
        return list(watched(label, (_in_turn(work, then, item) for item in items), items))
    global _work, _then
    _work, _then = work, then  # inherited by the forked processes: closures cannot be sent to them
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context) as pool:
        return list(watched(label, pool.map(_call, items) if then is None else _in_two_pieces(pool, items), items))


def _in_turn(work: Callable[[Any], Any], then: Callable[[Any], Any] | None, item: Any) -> Any:
    result = work(item)
    if then is not None:
        then(item)
    return result


def _in_two_pieces(pool: Executor, items: Sequence[Any]) -> Iterator[Any]:
    first = [pool.submit(_call, item) for item in items]
    numbers = {future: number for number, future in enumerate(first)}
    second = {}
    for done in as_completed(first):
        done.result()  # raises the error, if there was one
        second[numbers[done]] = pool.submit(_call_then, items[numbers[done]])
    for number, future in enumerate(first):
        second[number].result()
        yield future.result()


def watched(label: str, results: Iterable[Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yield the results of ``items`` as they come; log each item, and show a bar on a terminal if there are several."""
    bar = tqdm(zip(items, results), label, len(items), unit="model", disable=None if len(items) > 1 else True)
    for item, result in bar:
        LOG.info("%s: %s", label, " ".join(map(str, item)))
        yield result


_work: Callable[[Any], Any]
_then: Callable[[Any], Any] | None


def _call(item: Any) -> Any:
    return _work(item)


def _call_then(item: Any) -> None:
    _then(item)
