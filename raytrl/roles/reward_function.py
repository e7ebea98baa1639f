"""Reward functions: a user's Python, called with TRL's keywords in a process of its own.

A process, because only a process can be stopped: a function that hangs is killed and the next call starts afresh, one
that exits or crashes takes nobody with it, and it runs in a main thread, which libraries that bound their own work by
signals need. It stays up between calls, so a function may keep what it loaded.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from raytrl.config.reward import SourceSection
from raytrl.errors import ConfigError
from raytrl.roles.reward_call import Pair, completion_of

START_LIMIT_S = 120.0  # importing the function's module, which may import torch from a cold disk

# Columns of these names are TRL's own keywords, or the text that the response replaces.
_NOT_COLUMNS = frozenset(
    {"prompt", "completion", "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
)


class FunctionSource:
    """A function of `file.py:name` or `package.module:name`, sync or async.

    It is called with `prompts`, `completions`, `completion_ids`, every other column of the dataset, `trainer_state`
    (its `global_step` is the step), `log_extra` and `log_metric` (accepted; what they are given is not kept). A
    function without `**kwargs` is given only the keywords it names. `None` for a response means "does not apply".

    Raises ConfigError when the function cannot be loaded.
    """

    def __init__(self, section: SourceSection) -> None:
        self.section = section
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._one_call = threading.Lock()
        self._start()

    def call(self, pairs: Sequence[Pair]) -> Sequence[object]:
        """One value a response; see `RewardSource`."""
        limit_s = self.section.timeout_s
        # Two calls at once would take each other's answers from the pipe.
        if not self._one_call.acquire(timeout=limit_s):
            raise TimeoutError(f"was still busy with an earlier call after {limit_s:g} s")
        try:
            if self._connection is None:
                self._start()
            assert self._connection is not None
            self._connection.send(_keywords(pairs))
            return self._answer(limit_s, f"gave no answer within {limit_s:g} s and was stopped")
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise RuntimeError(f"its process ended with exit status {self._stop()}") from error
        finally:
            self._one_call.release()

    def close(self) -> None:
        """End the function's process."""
        self._stop()

    def _start(self) -> None:
        ours, theirs = Pipe()
        command = [sys.executable, "-m", "raytrl.roles.reward_function_process"]
        # The function must see what this process sees, however that got on its path.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = ours
        assert self.section.function is not None
        where = f"reward.sources.{self.section.name}.function: {self.section.function}"
        try:
            ours.send(self.section.function)
            self._answer(START_LIMIT_S, f"{where}: importing it took longer than {START_LIMIT_S:g} s")
        except (EOFError, BrokenPipeError):
            status = self._stop()
            raise ConfigError(f"{where}: its process ended while importing it, with exit status {status}") from None
        except _FunctionError as error:
            self._stop()
            raise ConfigError(f"{where}: cannot be loaded; {error}") from None

    def _answer(self, limit_s: float, late: str) -> Sequence[object]:
        """What the process sends back; stops it and raises TimeoutError(late) when nothing comes in time."""
        assert self._connection is not None
        if not self._connection.poll(limit_s):
            self._stop()
            raise TimeoutError(late)
        good, answer = self._connection.recv()
        if not good:
            raise _FunctionError(answer)
        return list(answer)

    def _stop(self) -> int | None:
        """Kill the process; returns its exit status, as it was if it had ended by itself."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is None:
            return None
        process, self._process = self._process, None
        try:
            # A process that closed its end is about to end by itself: let it say how.
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


class _FunctionError(Exception):
    """The function, or its import, raised; the text is the process's description."""


def _keywords(pairs: Sequence[Pair]) -> dict[str, Any]:
    """TRL's keywords, but for the callables, which cannot cross to the process."""
    names = {name for prompt, _ in pairs for name in prompt.columns} - _NOT_COLUMNS
    return {
        "prompts": [prompt.text for prompt, _ in pairs],
        "completions": [completion_of(pair) for pair in pairs],
        "completion_ids": [list(response.token_ids) for _, response in pairs],
        **{name: [prompt.columns.get(name) for prompt, _ in pairs] for name in sorted(names)},
        "trainer_state": pairs[0][0].step,
    }
