"""What rollout and reward actors share: attempts, turns, and what they say of themselves.

Actors are plain classes: `ray.remote` is applied where they are started. Loading is not part of `__init__`, so that its
errors reach whoever asked, and so that a reborn actor loads when it is first asked. Calls that only look or prepare run
in threads of their own (`CONTROL`, `STATUS`, `WEIGHTS`), beside a long `generate`.
The driver imports these modules to start the actors, so nothing heavy is imported before it is needed.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import ray

from raytrl.errors import ActorBrokenError, RaytrlError, StaleAttemptError
from raytrl.launch.session.logs import LOG
from raytrl.records.samples import Attempt

CONTROL, STATUS, WEIGHTS, WORK = "control", "status", "weights", "work"
MAX_IN_FLIGHT = 128  # requests that one rollout actor works on at a time
CONCURRENCY_GROUPS = {CONTROL: 4, STATUS: 1, WEIGHTS: 1}  # weights: one thread, so that buckets keep their order
Method = TypeVar("Method", bound=Callable[..., Any])


def in_group(name: str) -> Callable[[Method], Method]:
    """Calls of the method run in the threads of this group and do not queue behind those of others.

    Said here and not at each call: a driver that has joined through `ray://` cannot say it there.
    """
    return cast(Callable[[Method], Method], ray.method(concurrency_group=name))


class _Gate:
    """Lets calls through alone or, where they say so, several beside each other; one that must be alone goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._alone, self._want_alone = 0, False, 0

    @contextmanager
    def passed(self, concurrent: bool) -> Iterator[None]:
        with self._changed:
            if concurrent:
                self._changed.wait_for(lambda: not self._alone and not self._want_alone)
            else:
                self._want_alone += 1
                self._changed.wait_for(lambda: not self._inside)
                self._want_alone -= 1
                self._alone = True
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside, self._alone = self._inside - 1, False
                self._changed.notify_all()


class Actor:
    """An attempt is one life of a run's learner group; older ones of the same run are not served any more."""

    def __init__(self) -> None:
        self._newest: dict[str, int] = {}  # by run: a sweep's trials share reward actors
        self._gate = _Gate()  # before the engine or the sources
        self._doing: list[str] = []
        self._broken = ""  # what it broke of: it does nothing more

    @in_group(STATUS)
    def doing(self) -> str:
        """What it is at, for messages; answers at any time."""
        doing = list(self._doing)
        return "nothing" if not doing else doing[0] + (f", and {len(doing) - 1} more" if len(doing) > 1 else "")

    @in_group(CONTROL)
    def end_if_broken(self) -> None:
        """Ends a process that raised `ActorBrokenError`, so that Ray starts it anew; one that was has no need to."""
        if self._broken:
            os._exit(1)  # whatever its other threads hang in

    @in_group(CONTROL)
    def begin(self, attempt: Attempt) -> None:
        """Requests of earlier attempts, also those at work, are not served from now on."""
        self._newest[attempt.run] = max(self._newest.get(attempt.run, attempt.number), attempt.number)

    def _is_newest(self, attempt: Attempt) -> bool:
        return attempt.number >= self._newest.get(attempt.run, attempt.number)

    def _refuse_if_old(self, attempt: Attempt) -> None:
        if not self._is_newest(attempt):
            newest = self._newest[attempt.run]
            raise StaleAttemptError(f"{attempt.run}: request of attempt {attempt.number}; this actor serves {newest}")

    @contextmanager
    def _busy(self, text: str, concurrent: bool = False, beside: bool = False) -> Iterator[None]:
        """`concurrent`: beside other calls of that kind; `beside`: beside any; else alone."""
        with nullcontext() if beside else self._gate.passed(concurrent):
            if self._broken:
                raise ActorBrokenError(self._broken)
            doing = f"{text}, since {time.strftime('%H:%M:%S')}"
            self._doing.append(doing)
            began = time.perf_counter()
            try:
                yield
                LOG.log(logging.DEBUG if concurrent else logging.INFO, "%s: %.3f s", text, time.perf_counter() - began)
            except Exception as error:
                is_meant = isinstance(error, RaytrlError)
                LOG.error(
                    "%s: failed after %.3f s: %s", text, time.perf_counter() - began, error, exc_info=not is_meant
                )
                if is_meant:
                    raise
                self._broken = f"{text}: {type(error).__name__}: {error}"
                raise ActorBrokenError(self._broken) from error
            finally:
                self._doing.remove(doing)
