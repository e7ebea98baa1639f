"""Finds a user's function from its place in a run file: `file.py:name` or `package.module:name`."""

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
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
