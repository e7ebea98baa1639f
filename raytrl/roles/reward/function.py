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

import raytrl
from raytrl.config.sections.reward import SourceSection
from raytrl.errors import ConfigError
from raytrl.roles.reward.call import CallError, Pair, completion_of

START_LIMIT_S = 120.0  # importing the function's module, which may import torch from a cold disk
_LAST_WORDS_S = 1.0  # a process that closed its end of the pipe is about to end by itself, and to say how

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
            raise CallError(f"was still busy with an earlier call after {limit_s:g} s")
        try:
            if self._connection is None:
                self._start()
            return self._exchange(_keywords(pairs), limit_s)
        finally:
            self._one_call.release()

    def close(self) -> None:
        """End the function's process."""
        self._stop()

    def _start(self) -> None:
        assert self.section.function is not None
        ours, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "raytrl.roles.reward.function_process"]
        # However this package got on the path: the process must find it before it is told where else to look.
        folders = filter(None, [os.environ.get("PYTHONPATH"), raytrl.FOLDER])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
        self._process = subprocess.Popen(  # noqa: S603 (our own module)
            [*command, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = ours
        try:
            self._exchange((self.section.function, [path or os.getcwd() for path in sys.path]), START_LIMIT_S)
        except CallError as error:
            self._stop()
            raise ConfigError(
                f"reward.sources.{self.section.name}.function: cannot load {self.section.function}: {error}"
                "; expected: a function of that name; name the file by its path from the working directory"
            ) from None

    def _exchange(self, message: object, limit_s: float) -> Sequence[object]:
        """Send to the process and return its answer; CallError when it fails, ends, or is late, and then is stopped."""
        assert self._connection is not None
        try:
            self._connection.send(message)
            if not self._connection.poll(limit_s):
                self._stop()
                raise CallError(f"gave no answer within {limit_s:g} s and was stopped")
            good, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise CallError(f"ended its process, with exit status {self._stop(_LAST_WORDS_S)}") from None
        if not good:
            raise CallError(answer)
        return list(answer)

    def _stop(self, wait_s: float = 0.0) -> int | None:
        """End the process, at once or when it has not ended by itself in `wait_s`; returns its exit status."""
        if self._connection is not None:
            self._connection.close()
        process, self._process, self._connection = self._process, None, None
        if process is None:
            return None
        try:
            return process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


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
