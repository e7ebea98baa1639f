"""The process in which a reward function runs: `python -m raytrl.roles.reward.function_process FD PARENT_PID`.

Over the pipe FD it first receives the function's name and answers (True, []) once it is loaded; then, for each
dictionary of keywords, it answers (True, values) or (False, description of the error). It ends when the pipe closes or
the parent is gone. No torch here: the start must be quick.
"""

import asyncio
import importlib
import importlib.util
import inspect
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main() -> None:
    """Serve calls until the pipe closes."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    loop = asyncio.new_event_loop()  # one loop for all calls: an async function may keep a client bound to it
    try:
        try:
            function = import_function(connection.recv())
        except Exception as error:
            connection.send((False, _raised(error)))
            return
        connection.send((True, []))
        while True:
            keywords = connection.recv()
            try:
                values = call_function(function, keywords, loop)
            except NoListError as error:
                connection.send((False, str(error)))
            except Exception as error:
                connection.send((False, _raised(error)))
            else:
                connection.send((True, values))
    except (EOFError, BrokenPipeError):
        return


class NoListError(Exception):
    """The function returned something that holds no values."""


def import_function(name: str) -> Callable[..., Any]:
    """The callable that `file.py:name` or `package.module:name` names. Raises whatever its import raises."""
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"no such file: found nothing at {place} in {Path.cwd()}")
        sys.path.insert(0, str(path.parent))  # so that it can import its neighbours
        own_name = f"reward_file_{path.stem}"  # a file called random.py must not stand in for the module random
        spec = importlib.util.spec_from_file_location(own_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[own_name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise AttributeError(f"{place} has no function {attribute!r}; found: {function!r}")
    return function  # type: ignore[no-any-return]  # callable: checked above


def call_function(function: Callable[..., Any], keywords: dict[str, Any], loop: asyncio.AbstractEventLoop) -> list[Any]:
    """Call it as TRL does; returns plain Python values, a text that shows what is neither a number nor None."""
    given = {
        **keywords,
        "trainer_state": SimpleNamespace(global_step=keywords["trainer_state"]),
        "log_extra": _ignore,
        "log_metric": _ignore,
    }
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        given = {parameter.name: given[parameter.name] for parameter in parameters if parameter.name in given}
    result = function(**given)
    if inspect.isawaitable(result):

        async def finish() -> Any:
            return await result

        result = loop.run_until_complete(finish())
    if isinstance(result, str | dict) or not hasattr(result, "__iter__"):
        raise NoListError(
            f"returned {result!r:.200} (a {type(result).__name__}), not a list with one number a response"
        )
    return [_plain(value) for value in result]


def _plain(value: Any) -> Any:
    """A numpy or torch scalar as a Python number: the parent need not import what the function uses."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        number = value.item()
    except Exception:
        number = None
    return number if isinstance(number, bool | int | float) else f"{value!r:.200}"


def _ignore(*_: Any, **__: Any) -> None:
    """TRL's `log_extra` and `log_metric`: accepted so that functions work unchanged."""


def _raised(error: Exception) -> str:
    """The error and the line that raised it, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}: {error}{place}"


def _end_with(parent: int) -> None:
    """A killed parent must not leave a hanging function behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main()
