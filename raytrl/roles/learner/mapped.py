"""Weight files that a process maps: as long as it runs, nobody may write into them."""

import os
from collections.abc import Iterable
from pathlib import Path

from raytrl.errors import RunError


class MappedFiles:
    """The weight files of frozen models, as they were when the models were loaded.

    transformers maps them, so a weight that nobody has written to is read from its file when it is used. A file that is
    replaced or deleted stays with the process as it was; one that is written over changes the weights under it.
    """

    def __init__(self, folders: Iterable[str]) -> None:
        """
        Args:
            folders: hub ids among them are left out: the files of the hub's cache are never written to again.
        """
        files = [file for folder in folders if os.path.isdir(folder) for file in Path(folder).glob("*.safetensors")]
        self._found = {file: _state(file) for file in files}

    def check(self) -> None:
        """
        Raises:
            RunError: a file was written to since.
        """
        for file, state in self._found.items():
            now = _state(file)
            if now is not None and state is not None and now[0] == state[0] and now != state:
                raise RunError(
                    f"learner: {file} was written over while this run computes with it as its frozen model, so its numbers "
                    f"are not to be trusted; start again from the last checkpoint with the file as it was, and write "
                    f"other models to folders of their own"
                )


def _state(file: Path) -> tuple[int, int, int] | None:
    """Which file it is, its size, and when it was written; None where it is gone."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
