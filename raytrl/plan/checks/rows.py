"""One pass over the rows of a dataset: in batches, by several processes where there are many, told in row order."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

_BATCH = 1000
_ALONE = 20_000  # rows that are through before other processes have started


@dataclass
class Tally:
    """Rows of which one thing is true."""

    rows: int = 0
    amount: int = 0  # tokens or characters, summed
    first: int = 0  # the first of them, from 1
    what: str = ""  # of the first

    def add(self, row: int, amount: int = 0, what: str = "") -> None:
        if not self.rows:
            self.first, self.what = row, what
        self.rows += 1
        self.amount += amount


@dataclass
class Found:
    """What a pass over some rows found."""

    rows: int = 0
    tokens: int = 0
    longest: dict[str, tuple[int, int]] = field(default_factory=dict)  # by whose tokens: (how many, the row's number)
    tallies: dict[str, Tally] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)

    def tally(self, name: str) -> Tally:
        return self.tallies.setdefault(name, Tally())

    def measure(self, whose: str, row: int, tokens: int) -> None:
        if tokens > self.longest.get(whose, (0, 0))[0]:
            self.longest[whose] = (tokens, row)

    def count(self, name: str, amount: int = 1) -> None:
        self.totals[name] = self.totals.get(name, 0) + amount

    def take(self, later: "Found") -> None:
        """Adds what was found in later rows."""
        self.rows += later.rows
        self.tokens += later.tokens
        for whose, (tokens, row) in later.longest.items():
            self.measure(whose, row, tokens)
        for name, tally in later.tallies.items():
            own = self.tally(name)
            if not own.rows:
                own.first, own.what = tally.first, tally.what
            own.rows += tally.rows
            own.amount += tally.amount
        for name, total in later.totals.items():
            self.count(name, total)


Batch = Mapping[str, Sequence[Any]]
Check = Callable[[int, Batch], Found]  # (number of the first row from 1, columns)


def go_through(dataset: Any, columns: Sequence[str], check: Check, *, alone: bool = False) -> Found:
    """Applies `check` to every row.

    Args:
        check: it pickles; it raises DataError for a row that cannot be used.
        alone: in this process only.

    Raises:
        DataError: of the first such row.
    """
    chosen, found = dataset.select_columns(list(columns)), Found()
    batches = ((i * _BATCH + 1, batch) for i, batch in enumerate(chosen.iter(batch_size=_BATCH)))
    workers = len(os.sched_getaffinity(0))
    if alone or workers == 1 or len(dataset) <= _ALONE:
        for first, batch in batches:
            found.take(check(first, batch))
        return found
    # Spawned: this process has threads, and a fork of it might wait for a lock that nobody holds.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _hold, (check,)) as pool:
        try:
            for part in _in_order(pool, batches, 2 * workers):
                found.take(part)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _in_order(pool: ProcessPoolExecutor, batches: Iterator[tuple[int, Batch]], most: int) -> Iterator[Found]:
    """Each batch's findings, with at most so many batches on their way: a dataset need not fit into memory."""
    flight: deque[Future[Found]] = deque()
    for first, batch in batches:
        flight.append(pool.submit(_apply, first, batch))
        if len(flight) >= most:
            yield flight.popleft().result()
    while flight:
        yield flight.popleft().result()


_held: Check | None = None  # of this process, if it is one of the pool's


def _hold(check: Check) -> None:
    global _held
    _held = check


def _apply(first: int, batch: Batch) -> Found:
    assert _held is not None
    return _held(first, batch)
