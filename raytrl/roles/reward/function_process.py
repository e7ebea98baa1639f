"""The process in which a reward function runs: `python -P -m raytrl.roles.reward.function_process FD PARENT_PID`.

Over the pipe FD it first receives the function's name and where its parent looks for modules, and answers (True, []) once
the function is loaded; then, for each dictionary of keywords, it answers (True, values) or (False, description of the error).
It ends when the pipe closes or the parent is gone. No torch here: the start must be quick.
"""

import asyncio
import inspect
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from raytrl.errors import ConfigError
from raytrl.functions import import_function


def main() -> None:
    """Serve calls until the pipe closes."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    loop = asyncio.new_event_loop()  # one loop for all calls: an async function may keep a client bound to it
    try:
        try:
            name, sys.path[:] = connection.recv()
            function = import_function(name)
        except ConfigError as error:
            connection.send((False, str(error)))
            return
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
