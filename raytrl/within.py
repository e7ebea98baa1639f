"""A limit for a call that has none."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class NotInTimeError(Exception):
    """The call goes on, and its result will be thrown away."""


def within(timeout_s: float, work: Callable[[], T]) -> T:
    """The result of `work()`, called in a thread of its own; what it raises, this raises.

    A thread cannot be stopped: after the limit `work` goes on in the background. So this is for waits that end by themselves
    (a socket with its own timeout, a forward pass), or whose process soon does; not for a user's code.

    Raises:
        NotInTimeError: after `timeout_s` seconds.
    """
    results: queue.SimpleQueue[tuple[T, None] | tuple[None, Exception]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((work(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=run, name="within", daemon=True).start()
    try:
        result, error = results.get(timeout=timeout_s)
    except queue.Empty:
        raise NotInTimeError(f"gave no answer within {timeout_s:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # no error: it is what `work` returned
