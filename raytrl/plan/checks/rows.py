"""One pass over the rows of a dataset: in batches, by several processes where there are many, told in row order, and kept."""

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import xxhash

import raytrl

_BATCH = 1000
_ALONE = 20_000  # rows that are through before other processes have started
_VERSION = 1  # goes up when the same rows are found to be something else


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


Tell = Callable[[str, int, int], None]  # (key of a dataset, rows that are through, all rows)


def in_silence(_where: str, _done: int, _all: int) -> None:
    """For who does not wait for it."""


def in_no_hurry() -> None:
    """For who starts nothing meanwhile."""


class Check(Protocol):
    """What is found in rows."""

    @property
    def where(self) -> str:
        """The dataset's key."""
        ...

    @property
    def identity(self) -> str | None:
        """All that its findings follow from besides the rows; None where that cannot be said."""
        ...

    def __call__(self, first: int, batch: Batch) -> Found:
        """Of a batch's columns; `first` is the number of its first row, from 1."""
        ...


def go_through(
    dataset: Any, columns: Sequence[str], check: Check, *, alone: bool = False, tell: Tell = in_silence
) -> Found:
    """Applies `check` to every row; what was found in many rows is kept by their content.

    Args:
        check: it pickles; it raises DataError for a row that cannot be used.
        alone: in this process only.
        tell: called after every thousand rows where there are many.

    Raises:
        DataError: of the first such row.
    """
    chosen, found = dataset.select_columns(list(columns)), Found()
    if len(dataset) <= _ALONE:
        for first, batch in _batches(chosen):
            found.take(check(first, batch))
        return found
    kept = Kept.of(chosen, check.identity)
    if kept is not None and (earlier := kept.read()) is not None:
        return earlier
    workers = 1 if alone else len(os.sched_getaffinity(0))
    parts = _by_many(chosen, check, workers) if workers > 1 else (check(*each) for each in _batches(chosen))
    for part in parts:
        found.take(part)
        tell(check.where, found.rows, len(dataset))
    if kept is not None:
        kept.write(found)
    return found


def _batches(dataset: Any) -> Iterator[tuple[int, Batch]]:
    return ((i * _BATCH + 1, batch) for i, batch in enumerate(dataset.iter(batch_size=_BATCH)))


def _by_many(dataset: Any, check: Check, workers: int) -> Iterator[Found]:
    """Each batch's findings, in order, with a few batches on their way: a dataset need not fit into memory."""
    # Rows that lie in files are read where they are looked at; others travel.
    in_files = bool(dataset.cache_files)
    jobs = ((first, None) for first in range(1, len(dataset) + 1, _BATCH)) if in_files else _batches(dataset)
    held = (check, dataset if in_files else None)
    # Spawned: this process has threads, and a fork of it might wait for a lock that nobody holds.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _hold, (held,)) as pool:
        flight: deque[Future[Found]] = deque()
        try:
            for first, batch in jobs:
                flight.append(pool.submit(_apply, first, batch))
                if len(flight) >= 2 * workers:
                    yield flight.popleft().result()
            while flight:
                yield flight.popleft().result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_held: tuple[Check, Any] | None = None  # of this process, if it is one of the pool's


def _hold(held: tuple[Check, Any]) -> None:
    global _held
    _held = held


def _apply(first: int, batch: Batch | None) -> Found:
    assert _held is not None
    check, dataset = _held
    return check(first, dataset[first - 1 : first - 1 + _BATCH] if batch is None else batch)


@dataclass(frozen=True)
class Kept:
    """Findings in a file whose name says all that they follow from."""

    file: Path

    @classmethod
    def of(cls, dataset: Any, identity: str | None) -> "Kept | None":
        """`identity` is the check's; None: nobody can say whether it would find the same again."""
        if identity is None:
            return None
        import datasets
        import transformers

        name = repr((_VERSION, raytrl.__version__, transformers.__version__, dataset._fingerprint, identity))
        folder = Path(datasets.config.HF_DATASETS_CACHE, "raytrl-rows")
        return cls(folder / f"{xxhash.xxh3_128_hexdigest(name.encode())}.json")

    def read(self) -> Found | None:
        if not self.file.is_file():
            return None
        values = json.loads(self.file.read_text(encoding="utf-8"))
        values["longest"] = {whose: (tokens, row) for whose, (tokens, row) in values["longest"].items()}
        values["tallies"] = {name: Tally(**tally) for name, tally in values["tallies"].items()}
        return Found(**values)

    def write(self, found: Found) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(found)), encoding="utf-8")
        partial.replace(self.file)
