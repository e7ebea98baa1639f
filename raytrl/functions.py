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
    module_name, _, name = place.rpartition(":")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name)
            if not path.is_file():
                raise ConfigError(f"{where}: no such file; found: {module_name!r}; expected: a Python file")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None  # a .py file always has a spec
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            is_first = sys.modules.setdefault(path.stem, module) is module  # dataclasses look their module up there
            try:
                spec.loader.exec_module(module)
            except BaseException:
                if is_first:
                    del sys.modules[path.stem]  # a module that raised is not a module
                raise
        else:
            if os.getcwd() not in sys.path:  # the `raytrl` script, unlike `python -m`, does not look there by itself
                sys.path.insert(0, os.getcwd())
            module = importlib.import_module(module_name)
    except ConfigError:
        raise
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(f"{where}: {module_name} cannot be imported: {describe_raised(error)}") from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None or not callable(function):
        raise ConfigError(f"{where}: no function {name!r} in {module_name}")
    return function


def describe_raised(error: BaseException) -> str:
    """`KeyError: 'text' (rewards.py:12)`: what a user's code raised, and its innermost line outside of libraries."""
    here = os.path.dirname(os.path.abspath(__file__))
    paths = sysconfig.get_paths()
    libraries = (here, paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"], "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(libraries)]
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
