"""Where on this machine `datasets.load_dataset` reads: one answer for checks and for fingerprints."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path


def folder_of(path: str, data_dir: str | None) -> str | None:
    """Where relative files are looked for, "" for the working directory; None: on the hub."""
    from datasets import packaged_modules  # 1.3 s

    if path in packaged_modules._PACKAGED_DATASETS_MODULES:  # no public name in 5.2
        return os.path.expanduser(data_dir or "")
    if os.path.isdir(path):
        return os.path.join(path, data_dir) if data_dir else path
    return None


def place_of(file: str, path: str, data_dir: str | None) -> str | None:
    """The path or pattern on this machine that one of `data_files` means; None: it is on the hub, or a URL."""
    folder = folder_of(path, data_dir)
    if "://" in file or (folder is None and not os.path.isabs(file)):
        return None
    return os.path.join(folder or "", file)


def matches(pattern: str) -> list[str]:
    """The files that a path or pattern means; a file is a file, whatever its name would mean as a pattern."""
    if os.path.isfile(pattern):
        return [pattern]
    return sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))


def local_files(path: str, data_dir: str | None, data_files: Sequence[str]) -> list[str]:
    """All files on this machine that are read: those that are named, or else those of the folder."""
    if data_files:
        places = [place for file in data_files if (place := place_of(file, path, data_dir)) is not None]
        return [file for place in places for file in matches(place)]
    if not (folder := folder_of(path, data_dir)):
        return []
    found = sorted(file.relative_to(folder) for file in Path(folder).rglob("*") if file.is_file())
    return [os.path.join(folder, file) for file in found if _is_data(file)]


def _is_data(file: Path) -> bool:
    """Not hidden, and not what `datasets` leaves in a saved dataset whose rows it has gone through."""
    return not any(part.startswith(".") for part in file.parts) and not file.name.startswith(("cache-", "tmp"))
