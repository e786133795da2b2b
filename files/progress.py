"""How far long work has come: a bar on a terminal; in a log, a line now and then with an estimate of the time left."""

import sys
import time
from types import TracebackType

import torch
from tqdm import tqdm

PARTS = 10  # lines in a log
SIZE = 1024  # of the matrices by whose product a device's speed is told


class Progress:
    """A bar, or lines where stderr is no terminal. Nothing where `shown` is false."""

    def __init__(self, what: str, total: int, unit: str, shown: bool):
        self.what, self.total, self.unit = what, total, unit
        self.bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=None if shown else True)
        self.lines = shown and not sys.stderr.isatty()
        self.done, self.told, self.begin = 0, 0, time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def update(self, number: int = 1) -> None:
        """So much more is done."""
        self.done += number
        self.bar.update(number)
        if self.lines and (self.done - self.told) * PARTS >= self.total:
            self.told = self.done
            say(f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {self.left()}")

    def left(self) -> str:
        """An estimate, in words, by what has been done so far."""
        rest = (time.perf_counter() - self.begin) / max(1, self.done) * (self.total - self.done)
        return f"{in_words(rest)} left"


def say(line: str) -> None:
    """A line on stderr, past a bar that may be there."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def in_words(seconds: float) -> str:
    """A time to one or two figures: about 40 s, about 3 min, about 2.5 h."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def seconds_for(flops: float, device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """How long a device takes for so many FLOPs, by its speed in one product of matrices: a lower bound, roughly."""
    a = torch.ones(SIZE, SIZE, device=device, dtype=dtype)
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # which waits for the device
        taken.append(time.perf_counter() - begin)
    return flops * min(taken) / (2 * SIZE**3)
