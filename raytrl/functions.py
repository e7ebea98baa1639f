"""Finds a user's function from its place in a run file, `file.py:name` or `package.module:name`, and calls it as TRL does."""

import asyncio
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from raytrl.errors import ConfigError


def load_function(place: str, where: str) -> Callable[..., Any]:
    """Imports the module and returns the function.

    Args:
        place: `file.py:name` (relative to the working directory) or `package.module:name`.
        where: the key that names it, for error messages.

    Raises:
        ConfigError: no such file, module or function, or the module raises while it is imported.
    """
    try:
        return import_function(place)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(
            f"{where}: {place.rpartition(':')[0]} cannot be imported: {describe_raised(error)}"
        ) from error


def import_function(place: str) -> Callable[..., Any]:
    """The callable that `file.py:name` or `package.module:name` names.

    Raises:
        ConfigError: no such file or function.
        Exception: whatever the module raises while it is imported.
    """
    module_name, _, name = place.rpartition(":")
    if module_name.endswith(".py"):
        path = Path(module_name)
        if not path.is_file():
            raise ConfigError(
                f"no such file; found: {module_name!r} (working directory {Path.cwd()}); expected: a Python file"
            )
        _look_in(path.resolve().parent)  # so that it can import its neighbours
        own_name = f"user_file_{path.stem}"  # a file called random.py must not stand in for the module random
        spec = importlib.util.spec_from_file_location(own_name, path.resolve())
        assert spec is not None  # a .py file always has a spec
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[own_name] = module  # dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[own_name]  # a module that raised is not a module
            raise
    else:
        _look_in(Path.cwd())
        module = importlib.import_module(module_name)
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        found = "" if module_name.endswith(".py") else f" ({getattr(module, '__file__', None) or 'built in'})"
        raise ConfigError(f"no function {name!r} in {module_name}{found}; found: {function!r:.80}")
    return function


def _look_in(folder: Path) -> None:
    """Last, behind everything installed: a user's datasets.py must not stand in for a library's module."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def describe_raised(error: BaseException) -> str:
    """`KeyError: 'text' (rewards.py:12)`: what a user's code raised, and its innermost line outside of libraries."""
    here = os.path.dirname(os.path.abspath(__file__))
    paths = sysconfig.get_paths()
    libraries = (here, paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"], "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(libraries)]
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


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
    return [plain(value) for value in result]


def plain(value: Any) -> Any:
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


def raised(error: BaseException) -> str:
    """The error and the line that raised it, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}: {error}{place}"


def mentions(place: str, word: str) -> bool:
    """Whether the source of its module has the word; looks, and imports nothing but the packages around the module."""
    module_name = place.rpartition(":")[0]
    if module_name.endswith(".py"):
        path = Path(module_name)
    else:
        _look_in(Path.cwd())
        spec = importlib.util.find_spec(module_name)
        path = Path(spec.origin if spec is not None and spec.origin is not None else module_name)
    try:
        return word in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
