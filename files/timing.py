"""Times of several contenders at the same work, taken in turn, so that what disturbs one disturbs the others."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Work(NamedTuple):
    """What is timed. `prepare` makes, untimed, what `do` is given."""

    prepare: Callable[[], Any]
    do: Callable[[Any], None]
    warmups: int = 1


def wait_for(device: str) -> None:
    """Return when the device has done what it was told; a GPU is told ahead."""
    if device != "cpu":
        torch.accelerator.synchronize()


def once(work: Work, device: str) -> float:
    """Seconds of one run."""
    given = work.prepare()
    wait_for(device)
    begin = time.perf_counter()
    work.do(given)
    wait_for(device)
    return time.perf_counter() - begin


def interleaved(
    works: dict[str, Work], seconds: float, device: str, fewest: int = 5, most: int = 51
) -> dict[str, list[float]]:
    """Run A B C A B C ... after each has been warmed up. Returns seconds, by contender and round.

    As many rounds as fit into so many seconds, within bounds. Garbage is collected between rounds, not in them.
    """
    for work in works.values():
        for _ in range(work.warmups):
            once(work, device)
    taken: dict[str, list[float]] = {name: [] for name in works}
    begin = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for i in range(most):
            for name, work in works.items():
                taken[name].append(once(work, device))
            gc.collect(0)
            if i + 1 >= fewest and time.perf_counter() - begin > seconds:
                break
    finally:
        gc.enable()
    return taken


def let_go(device: str) -> None:
    """Give back what models that are gone have held on the device, so that the next ones have all of it."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def ratios(taken: list[float], yardstick: list[float]) -> list[float]:
    """Quotients of times taken in the same round."""
    return [t / y for t, y in zip(taken, yardstick, strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
