"""Where tools and environments run: `python -P -m raytrl.roles.environment.process FD`.

The first process, the nursery, imports the user's files and from then on does nothing but fork, so each conversation has a
process of its own, which starts in milliseconds and shares what was loaded. Nothing that a conversation does can reach
another: neither what an environment forgets to reset, nor a hang, a crash, or a module's own variables.

Over FD the nursery is told what to load, answers, and is then asked to fork, with one end of a pipe, and to end what it
forked. A conversation's process answers over that pipe, in JSON: what it runs is not ours. No torch here, but what the
user's files import.
"""

import asyncio
import ctypes
import inspect
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

from raytrl.errors import ConfigError
from raytrl.functions import NoListError, call_function, import_function, mentions, plain, raised
from raytrl.records.tools import ScoreRequest, Start

_PR_SET_PDEATHSIG = 1
_NOT_TOOLS = ("reset", "get_reward")


class Files:
    """The user's tools, environments and reward functions, imported."""

    def __init__(
        self, tools: Sequence[str], environments: Mapping[str | None, str], functions: Mapping[str, str]
    ) -> None:
        """By their places in files, `file.py:name`; `functions` by the names of their reward sources."""
        self.tools = [_loaded(f"rollout.tools.{i}", place) for i, place in enumerate(tools)]
        self.environments = {
            name: _loaded(f"rollout.environment{'' if name is None else f'.{name}'}", place)
            for name, place in environments.items()
        }
        asking = {name: place for name, place in functions.items() if mentions(place, "environments")}
        loaded = {name: _loaded(f"the function of reward source {name!r}", place) for name, place in asking.items()}
        self.functions = {name: f for name, f in loaded.items() if "environments" in inspect.signature(f).parameters}

    def describe(self) -> dict[str, Any]:
        """The tools of each kind of conversation, with their schemas.

        Raises:
            ConfigError: a tool or environment that cannot be used, and what to do.
        """
        plain = [_schema(tool, f"rollout.tools.{i}") for i, tool in enumerate(self.tools)]
        kinds = []
        for name, factory in self.environments.items() or [(None, None)]:
            where = f"rollout.environment{'' if name is None else f'.{name}'}"
            tools, instance = list(plain), None if factory is None else _made(factory, where)
            if instance is not None:
                tools += [_schema(method, f"{where}: {type(instance).__name__}") for method in methods_of(instance)]
            names = [tool["function"]["name"] for tool in tools]
            if twice := sorted({each for each in names if names.count(each) > 1}):
                raise ConfigError(f"{where}: two tools share a name; found: {twice}; expected: unique names")
            kinds.append(
                {
                    "name": name,
                    "tools": tools,
                    "environment": None if instance is None else type(instance).__name__,
                    "has_reward": hasattr(type(instance), "get_reward"),
                }
            )
        return {"kinds": kinds, "functions": sorted(self.functions)}


def methods_of(environment: Any) -> list[Callable[..., Any]]:
    """What a model may call of it, as TRL finds it: all functions of the class, inherited ones too, but private ones."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    return [getattr(environment, name) for name in names if not name.startswith("_") and name not in _NOT_TOOLS]


class Conversation:
    """One conversation's tools and environment, in a process of their own."""

    def __init__(self, files: Files, limit: int) -> None:
        """`limit`: characters of what a tool says that are kept."""
        self._files, self._limit = files, limit
        self._loop = asyncio.new_event_loop()  # one for all calls: a tool may keep a client bound to it
        self._environment: Any = None
        self._tools = {tool.__name__: tool for tool in files.tools}

    def start(self, start: Start) -> Any:
        """What `reset` says, None where there is no environment or it says nothing."""
        seed_all(start.row_seed)  # before it is made, too: responses to one prompt must begin in the same state
        if not self._files.environments:
            return None
        self._environment = _made(self._files.environments[start.environment], "the environment")
        self._tools |= {method.__name__: method for method in methods_of(self._environment)}
        reset, given = self._environment.reset, dict(start.columns)
        if "seed" in inspect.signature(reset).parameters:
            given.setdefault("seed", start.row_seed)
        said = self._finished(reset(**given))
        seed_all(start.seed)
        return None if said is None else self._cut(said if isinstance(said, list) else str(said))

    def call(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[int, Any, bool]]:
        """(number of the call, content, failed), as they are done: sync ones one after the other, async ones side by side."""
        later: dict[int, Any] = {}
        for number, (name, arguments) in enumerate(calls):
            tool = self._tools.get(name)
            if tool is not None and inspect.iscoroutinefunction(tool):
                later[number] = (tool, arguments)
            elif tool is None:
                yield number, _error(f"Tool {name} not found."), True
            else:
                yield (number, *self._outcome(partial(tool, **arguments)))
        if later:
            yield from self._loop.run_until_complete(self._gathered(later))

    def score(self, request: ScoreRequest) -> dict[str, Any]:
        """A value, or {"problem": why there is none}, of `get_reward` and of each function that asks for environments."""
        found = {}
        own = getattr(self._environment, "get_reward", None)
        if own is not None:
            found[type(self._environment).__name__] = self._value(lambda: [plain(self._finished(own()))])
        columns = {name: [value] for name, value in request.columns.items()}
        keywords = {
            **columns,
            "prompts": [list(request.prompt)],
            "completions": [list(request.completion)],
            "completion_ids": [list(request.completion_ids)],
            "environments": [self._environment],
            "trainer_state": request.step,
        }
        for name, function in self._files.functions.items():
            found[name] = self._value(partial(call_function, function, keywords, self._loop))
        return found

    def _value(self, ask: Callable[[], list[Any]]) -> Any:
        try:
            values = ask()
        except NoListError as error:
            return {"problem": str(error)}
        except Exception as error:
            return {"problem": raised(error)}
        if len(values) != 1:
            return {"problem": f"returned {len(values)} scores for 1 response"}
        return values[0]

    async def _gathered(self, later: Mapping[int, Any]) -> list[tuple[int, Any, bool]]:
        results = await asyncio.gather(
            *(tool(**arguments) for tool, arguments in _bound(later.values())), return_exceptions=True
        )
        found = []
        for number, result in zip(later, results, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, Exception):
                raise result
            failed = isinstance(result, Exception)
            found.append((number, _error(str(result)) if failed else self._content(result), failed))
        return found

    def _outcome(self, make: Callable[[], Any]) -> tuple[Any, bool]:
        try:
            return self._content(self._finished(make())), False
        except Exception as error:
            return _error(str(error)), True

    def _content(self, result: Any) -> Any:
        return self._cut(result if isinstance(result, list) else str(result))

    def _cut(self, content: Any) -> Any:
        """Of more text than is ever used only so much leaves this process."""
        if isinstance(content, str):
            return content[: self._limit]
        blocks = [block for block in content if not (isinstance(block, dict) and block.get("type") == "text")]
        if blocks:
            return {"problem": f"gave content that is not text; found: {blocks[0]!r:.100}; expected: a string"}
        return [{"type": "text", "text": str(block.get("text"))[: self._limit]} for block in content]

    def _finished(self, result: Any) -> Any:
        if not inspect.isawaitable(result):
            return result

        async def finish() -> Any:
            return await result

        return self._loop.run_until_complete(finish())


async def _failing(error: Exception) -> Any:
    raise error


def _bound(calls: Any) -> Iterator[tuple[Callable[..., Any], Mapping[str, Any]]]:
    """Arguments that do not fit fail their own call, as they do where it is awaited."""
    for tool, arguments in calls:
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError as error:
            yield (lambda error=error: _failing(error)), {}
        else:
            yield tool, arguments


def seed_all(seed: int) -> None:
    """Whatever an environment draws from: the process began as a copy of the others."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


def _error(text: str) -> str:
    return str({"error": text})  # TRL's words


def _loaded(where: str, place: str) -> Callable[..., Any]:
    try:
        return import_function(place)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except Exception as error:
        raise ConfigError(f"{where}: cannot load {place}: {raised(error)}") from None


def _made(factory: Callable[..., Any], where: str) -> Any:
    instance = factory()
    if not inspect.isfunction(getattr(type(instance), "reset", None)):
        raise ConfigError(
            f"{where}: {type(instance).__name__} has no method reset(**row), which begins a conversation; write one"
        )
    return instance


def _schema(tool: Callable[..., Any], where: str) -> dict[str, Any]:
    from transformers.utils import get_json_schema  # torch

    try:
        schema: dict[str, Any] = get_json_schema(tool)
    except Exception as error:
        name = getattr(tool, "__name__", repr(tool))
        remedy = (
            "expected: a type hint for each argument, and a Google docstring that describes it and each argument under "
            "Args:"
        )
        if inspect.ismethod(tool):
            remedy += f"; a method that no model should call begins with an underscore: _{name}"
        raise ConfigError(f"{where}: {name}: is no tool: {' '.join(str(error).split())}; {remedy}") from None
    return schema


def main() -> None:
    """The nursery: loads, then forks until its parent is gone."""
    control: Connection[Any, Any] = Connection(int(sys.argv[1]))
    children: dict[int, str] = {}  # process → its folder
    try:
        names, sys.path[:], scratch, limit = control.recv()
        try:
            files = Files(*names)
        except ConfigError as error:
            control.send((False, str(error)))
            return
        control.send((True, ""))
        while True:
            order, number = control.recv()
            if order == "start":
                handle = recv_handle(control)
                folder = os.path.join(scratch, str(number))
                os.mkdir(folder)
                child = os.fork()
                if child == 0:
                    control.close()
                    _live(Connection(handle), files, limit, folder)
                os.close(handle)
                children[child] = folder
                control.send(child)
            else:
                control.send(_end(number, children.pop(number)))
    except (EOFError, ConnectionError):
        return
    finally:
        for child, folder in children.items():
            _end(child, folder)


def _end(child: int, folder: str) -> int:
    """Ends the process and all that it started; its exit status, negative where a signal ended it."""
    for kill in (os.killpg, os.kill):  # it may not have got as far as to have a group
        try:
            kill(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    _, status = os.waitpid(child, 0)  # its own, where it had ended by itself
    shutil.rmtree(folder, ignore_errors=True)
    return os.waitstatus_to_exitcode(status)


def _live(connection: "Connection[Any, Any]", files: Files, limit: int, folder: str) -> None:
    """What a conversation's process does; never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        if sys.platform == "linux":  # whoever hangs sees no pipe close: it ends with the nursery, however that ends
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.chdir(folder)
        conversation = Conversation(files, limit)
        while True:
            what, argument = connection.recv()
            for answer in _answers(conversation, what, argument):
                connection.send_bytes(json.dumps(answer).encode())
    except (EOFError, ConnectionError):
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)  # what a user's module registered for the end belongs to the nursery


def _answers(conversation: Conversation, what: str, argument: Any) -> Iterator[Any]:
    if what == "call":
        yield from conversation.call(argument)
        return
    try:
        if what == "describe":
            yield {"value": conversation._files.describe()}
        elif what == "start":
            yield {"value": conversation.start(argument)}
        else:
            yield {"value": conversation.score(argument)}
    except ConfigError as error:
        yield {"error": str(error)}
    except Exception as error:
        yield {"error": raised(error)}


if __name__ == "__main__":
    main()
