"""Independent pieces of one stage's work on several cores."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm

from pipeline.common.logs import LOG


def each(
    label: str, work: Callable[[Any], Any], items: Iterable[Any], workers: int, then: Callable[[Any], Any] | None = None
) -> list[Any]:
    """`[work(item) for item in items]`, in forked processes if `workers` is above 1.

    If given, `then(item)` follows `work(item)` as a piece of its own, perhaps in another process: few items in two
    pieces each keep the workers busy for longer. Results are those of `work`.

    Forking shares what the stage has imported and loaded, which would take a new process seconds. It needs
    single-threaded numeric libraries (`threads: 1`); results do not depend on the number of workers. What is done is
    logged, and shown as a bar on a terminal, under `label`.
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
        done.result()  # raises what went wrong
        second[numbers[done]] = pool.submit(_call_then, items[numbers[done]])
    for number, future in enumerate(first):
        second[number].result()
        yield future.result()


def watched(label: str, results: Iterable[Any], items: Sequence[Any]) -> Iterator[Any]:
    """Pass on the results of `items` as they come; log each, and show a bar on a terminal if there are several."""
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
