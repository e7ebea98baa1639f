"""Which versions decide a run's numbers: raytrl's, Python's, and those of libraries. None is imported to answer."""

import importlib.metadata
import platform
from collections.abc import Iterable

from raytrl import __version__

_LIBRARIES = ("ray", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed")


def versions() -> dict[str, str]:
    """Name → version; a library that is not installed is left out."""
    # A source tree need not be installed.
    return {"python": platform.python_version(), "raytrl": __version__, **installed(_LIBRARIES)}


def installed(libraries: Iterable[str]) -> dict[str, str]:
    """Name → version of those that are."""
    found = {}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
