"""Tools and environments from the outside: a process for each conversation, every wait bounded.

A conversation whose process hangs, ends, or answers with what is no answer has failed, and no other has: it is told as
`ConversationError`. What a tool raises is an answer like any other.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any, TypeVar

import raytrl
from raytrl.config.credentials import SECRETS_VARIABLE, sounds_secret
from raytrl.config.sections.rollout import RolloutSection
from raytrl.errors import ConfigError, RunError
from raytrl.records.tools import (
    Call,
    Content,
    ConversationError,
    Kind,
    Result,
    ScoreRequest,
    Scores,
    Start,
    Toolbox,
    longest_text,
)

T = TypeVar("T")
_log = logging.getLogger(__name__)

START_LIMIT_S = 120.0  # importing the user's files, which may import torch from a cold disk
_FORK_LIMIT_S = 30.0
_LONGEST_ANSWER = 64 * 2**20  # bytes
_LOGGED_LINES = 1000


class Tools:
    """The user's tools and environments, and the processes that they run in."""

    def __init__(self, section: RolloutSection, functions: Mapping[str, str] | None = None) -> None:
        """
        Args:
            functions: reward functions, `file.py:name` by the names of their sources; those that ask for `environments`
                are called where these are.

        Raises:
            ConfigError: one cannot be loaded, or is no tool.
        """
        self._section = section
        self._names = (list(section.tools), section.environments, dict(functions or {}))
        self._numbers = count()
        self._lock = threading.Lock()
        self._nursery: _Nursery | None = None
        self._pool = ThreadPoolExecutor(section.tool_processes, thread_name_prefix="tools")
        self.toolbox = self._described()

    def start(self, start: Start) -> "Future[tuple[Room, Content | None]]":
        """A process for a new conversation, and what its environment says first.

        The future raises ConversationError.
        """
        return self._pool.submit(self._started, start)

    def close(self) -> None:
        """End all processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            if self._nursery is not None:
                self._nursery.close()
                self._nursery = None

    def in_pool(self, work: Callable[[], T]) -> "Future[T]":
        """Its result, in time: so many run at a time as `tool_processes` says."""
        return self._pool.submit(work)

    def _started(self, start: Start) -> "tuple[Room, Content | None]":
        room = Room(self, *self._born(), self._section.tool_timeout_s)
        try:
            said = room.ask("start", start)
        except ConversationError:
            room.close()
            raise
        return room, said

    def _described(self) -> Toolbox:
        room = Room(self, *self._born(), START_LIMIT_S)
        try:
            found = room.ask("describe", None, refused=ConfigError)
        except ConversationError as error:
            raise ConfigError(f"rollout.tools, rollout.environment: cannot be loaded: {error}") from None
        finally:
            room.close()
        kinds = {k["name"]: Kind(tuple(k["tools"]), k["environment"], k["has_reward"]) for k in found["kinds"]}
        return Toolbox(kinds, tuple(found["functions"]))

    def _born(self) -> "tuple[_Nursery, int, Connection[Any, Any]]":
        """A new process, of a nursery that lives."""
        for tries in (1, 2):
            with self._lock:
                if self._nursery is None:
                    limit = longest_text(self._section.max_result_tokens)
                    self._nursery = _Nursery(self._names, limit, self._section.tool_env)
                nursery = self._nursery
                ours, theirs = Pipe()
                try:
                    return nursery, nursery.fork(theirs, next(self._numbers)), ours
                except (EOFError, OSError) as error:
                    ours.close()
                    nursery.close()
                    self._nursery = None
                    if tries == 2:
                        raise RunError(
                            f"rollout.tools: no process could be started for a conversation: {type(error).__name__}: {error}"
                        ) from None
                finally:
                    theirs.close()
        raise AssertionError


class Room:
    """One conversation's process. Its methods wait; `call` and `score` have futures, which raise ConversationError."""

    def __init__(
        self, tools: Tools, nursery: "_Nursery", process: int, connection: "Connection[Any, Any]", limit_s: float
    ) -> None:
        self._tools, self._nursery, self._process = tools, nursery, process
        self._connection, self._limit_s = connection, limit_s
        self._status: int | None = None
        self._closed = False

    def call(self, calls: Sequence[Call]) -> "Future[list[Result]]":
        """The results, in the order of the calls."""
        return self._tools.in_pool(lambda: self._called(calls))

    def score(self, request: ScoreRequest) -> "Future[Scores]":
        """What `get_reward` and the functions that ask for environments find."""
        return self._tools.in_pool(lambda: self._scored(request))

    def close(self) -> None:
        """End the process. It may be called twice."""
        if not self._closed:
            self._closed = True
            self._connection.close()
            self._status = self._nursery.end(self._process)

    def ask(self, what: str, argument: Any, refused: type[Exception] = ConversationError) -> Any:
        """One answer; `refused` where it is an error."""
        self._send((what, argument))
        answer = self._receive(_DOING.get(what, what))
        if "error" in answer:
            raise refused(f"{_DOING.get(what, what)}: {answer['error']}" if what == "start" else answer["error"])
        return _checked(answer["value"], _DOING.get(what, what))

    def _called(self, calls: Sequence[Call]) -> list[Result]:
        self._send(("call", [(call.name, dict(call.arguments)) for call in calls]))
        found: dict[int, Result] = {}
        while len(found) < len(calls):
            waiting = next(call.name for number, call in enumerate(calls) if number not in found)
            number, content, failed = self._receive(waiting)
            found[number] = Result(_checked(content, calls[number].name), failed)
        return [found[number] for number in range(len(calls))]

    def _scored(self, request: ScoreRequest) -> Scores:
        found = self.ask("score", request)
        problems = {name: each["problem"] for name, each in found.items() if isinstance(each, dict)}
        return Scores({name: each for name, each in found.items() if name not in problems}, problems)

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise self._ended("the next call") from None

    def _receive(self, doing: str) -> Any:
        try:
            if not self._connection.poll(self._limit_s):
                self.close()
                raise ConversationError(
                    f"{doing}: gave no answer within {self._limit_s:g} s (rollout.tool_timeout_s), and was stopped",
                    timed_out=True,
                )
            return json.loads(self._connection.recv_bytes(_LONGEST_ANSWER))
        except (EOFError, OSError):
            raise self._ended(doing) from None

    def _ended(self, doing: str) -> ConversationError:
        self.close()
        how = "with the one that started it" if self._status is None else f"with exit status {self._status}"
        return ConversationError(f"{doing}: ended its process, {how}")


_DOING = {"start": "reset", "score": "get_reward"}


def _checked(content: Any, doing: str) -> Any:
    if isinstance(content, dict) and list(content) == ["problem"]:
        raise ConversationError(f"{doing}: {content['problem']}")
    return content


class _Nursery:
    """The process that all conversations' processes are copies of."""

    def __init__(self, names: Any, limit: int, given: Sequence[str]) -> None:
        ours, theirs = Pipe()
        self._control = ours
        self._lock = threading.Lock()
        self._scratch = tempfile.TemporaryDirectory(prefix="raytrl-tools-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(  # noqa: S603 (our own module)
            [sys.executable, "-P", "-u", "-m", "raytrl.roles.environment.process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment_of_tools(os.environ, given),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        theirs.close()
        threading.Thread(target=self._log_output, daemon=True, name="tools' output").start()
        ours.send((names, [path or os.getcwd() for path in sys.path], self._scratch.name, limit))
        try:
            loaded, problem = self._answer(START_LIMIT_S)
        except (EOFError, OSError):
            self.close()
            raise ConfigError(
                "rollout.tools, rollout.environment: their files end the process that imports them, or take more than "
                f"{START_LIMIT_S:g} s; found: exit status {self._process.returncode}"
            ) from None
        if not loaded:
            self.close()
            raise ConfigError(problem)

    def fork(self, theirs: "Connection[Any, Any]", number: int) -> int:
        """A new process at the other end of a pipe, of which this is `theirs`. Raises EOFError or OSError."""
        with self._lock:
            self._control.send(("start", number))
            send_handle(self._control, theirs.fileno(), self._process.pid)
            return int(self._answer(_FORK_LIMIT_S))

    def end(self, process: int) -> int | None:
        """Its exit status; None where the nursery is gone, and all of its with it."""
        with self._lock:
            try:
                self._control.send(("end", process))
                return int(self._answer(_FORK_LIMIT_S))
            except (EOFError, OSError):
                return None

    def close(self) -> None:
        """End it, and with it all that it has started."""
        self._control.close()
        try:
            self._process.wait(_FORK_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._scratch.cleanup()

    def _answer(self, limit_s: float) -> Any:
        if not self._control.poll(limit_s):
            raise EOFError
        return self._control.recv()

    def _log_output(self) -> None:
        """What tools print, as far as anybody would read it. All of it is taken: a full pipe would stop them."""
        assert self._process.stdout is not None
        kept = 0
        while data := self._process.stdout.readline(2000):
            kept += 1
            if kept <= _LOGGED_LINES:
                _log.info("tools: %s", data.decode(errors="replace").rstrip())
            elif kept == _LOGGED_LINES + 1:
                _log.warning("tools: more of what they print is not kept")


def environment_of_tools(variables: Mapping[str, str], given: Sequence[str]) -> dict[str, str]:
    """The environment that tools see: this one without what is secret, but for what they are given by name."""
    named = {text.partition("=")[0] for text in variables.get(SECRETS_VARIABLE, "").split(",")}
    kept = {
        name: value
        for name, value in variables.items()
        if name in given or not (name == SECRETS_VARIABLE or name in named or sounds_secret(name, value))
    }
    folders = filter(None, [variables.get("PYTHONPATH"), raytrl.FOLDER])
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}  # GPUs are the models'
    # The order of a set would else be another one in each actor.
    return {"PYTHONHASHSEED": "0", **kept, **hidden, "PYTHONPATH": os.pathsep.join(folders)}
