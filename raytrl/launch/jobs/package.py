"""The working directory of a job: what is sent to the cluster, how large it is, and what would be missing there."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from raytrl.config.load import LoadedRun
from raytrl.errors import ConfigError

MIB = 2**20


_SHOWN = 5


@dataclass(frozen=True)
class Package:
    """Files by their path below the folder, with their bytes."""

    folder: str
    files: dict[str, int]

    @property
    def size(self) -> int:
        return sum(self.files.values())

    def __str__(self) -> str:
        return f"{self.folder}: {len(self.files):,} files, {self.size / MIB:.1f} MiB"


def package_of(folder: str) -> Package:
    """What Ray would pack of a folder: its own walk, so without what .gitignore, .rayignore and its defaults exclude.

    Raises:
        ConfigError: larger than Ray takes; names the largest files.
    """
    # Ray has no public way to ask what it would pack.
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes

    root, files = Path(folder).absolute(), dict[str, int]()

    def note(path: Path) -> None:
        if path.is_file():
            files[str(path.relative_to(root))] = path.stat().st_size

    quiet = logging.getLogger("raytrl.packing")
    _dir_travel(root, [_get_excludes(root, get_runtime_env_default_excludes())], note, True, quiet)
    package = Package(str(root), files)
    if package.size >= GCS_STORAGE_MAX_SIZE:
        largest = sorted(files, key=lambda name: -files[name])[:_SHOWN]
        names = ", ".join(f"{name} ({files[name] / MIB:.0f} MiB)" for name in largest)
        raise ConfigError(
            f"the working directory is too large to be sent with a job; found: {package}; Ray takes less than "
            f"{GCS_STORAGE_MAX_SIZE / MIB:.0f} MiB; largest: {names}; expected: data and models on storage that all nodes "
            f"see, or these named in .gitignore or .rayignore"
        )
    return package


def check_files(loaded: LoadedRun, package: Package) -> None:
    """Refuses a run whose files exist here, but would not be where the job looks for them.

    Raises:
        ConfigError: one line for each.
    """
    origins = {origin for origin in loaded.origins.values() if origin != "command line"}
    named = {(origin.rpartition(":")[0] or origin, "") for origin in origins} | {(loaded.file, "")}
    for key, value, _ in loaded.values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and key not in ("output_dir", "name", "kind"):
                path, function, _ = text.partition(".py:")
                named.add((f"{path}.py" if function else text, key))
    problems = [problem for name, key in sorted(named) if (problem := _problem(name, key, package)) is not None]
    if problems:
        raise ConfigError("\n".join(problems))


def _problem(name: str, key: str, package: Package) -> str | None:
    """Why a file or folder that exists here would be missing in the job; None where it would be there, or may be."""
    if not name or os.path.isabs(name) or "://" in name or not os.path.exists(os.path.join(package.folder, name)):
        return None  # on shared storage, on the hub, or no path at all
    where = f"{key}: " if key else ""
    inside = os.path.normpath(name)
    if inside.startswith(".."):
        return (
            f"{where}{name!r} is outside of the working directory {package.folder}, which is all that is sent; expected: a "
            f"path below it, or an absolute one on storage that all nodes see"
        )
    if inside == "." or inside in package.files or any(file.startswith(f"{inside}{os.sep}") for file in package.files):
        return None
    return (
        f"{where}{name!r} is not sent with the job: .gitignore or .rayignore leaves it out; expected: an absolute path on "
        f"storage that all nodes see"
    )
