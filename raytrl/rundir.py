"""A run directory: config.yaml, manifest.json, metrics.jsonl, checkpoints/, model/ on a local path or a URI."""

import errno
import json
import math
import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import filelock
import xxhash
from pyarrow import fs

from raytrl.errors import ConfigError


class RunDirectory:
    """Files of one run, by names relative to it, wherever it is stored."""

    def __init__(self, output_dir: str, name: str) -> None:
        self.filesystem: fs.FileSystem = fs.LocalFileSystem()
        self.is_local = "://" not in output_dir or output_dir.startswith("file://")
        if self.is_local:
            if "://" in output_dir:
                _, output_dir = _from_uri(output_dir)
            self.uri = self.path = os.path.abspath(os.path.join(os.path.expanduser(output_dir), name))
        else:
            base, query, options = output_dir.partition("?")
            self.uri = f"{base.rstrip('/')}/{name}{query}{options}"
            self.filesystem, self.path = _from_uri(self.uri)

    @classmethod
    def named(cls, where: str) -> "RunDirectory":
        """The run at a path or URI, as a user gives it."""
        path, query, options = where.partition("?") if "://" in where else (where, "", "")
        parent, _, name = path.rstrip("/").rpartition("/")
        return cls(f"{parent or ('/' if path.startswith('/') else '.')}{query}{options}", name)

    def __str__(self) -> str:
        if not self.is_local:
            return self.uri.partition("?")[0]
        inside = self.path.startswith(os.getcwd() + os.sep)  # a job's working directory is a copy somewhere in /tmp
        return os.path.relpath(self.path) if inside else self.path

    @property
    def own_name(self) -> str:
        """What it is called on a node's own disk, where runs of one name in several places meet."""
        return f"raytrl-{posixpath.basename(self.path)}-{xxhash.xxh3_64_hexdigest(self.uri.encode())[:8]}"

    def at(self, name: str) -> str:
        """The path of a file within the run's filesystem."""
        return f"{self.path}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.filesystem.get_file_info(self.at(name)).type != fs.FileType.NotFound)

    def folders(self, name: str) -> list[str]:
        """Names of the folders directly below a folder; empty where it does not exist."""
        selector = fs.FileSelector(self.at(name), allow_not_found=True)
        return [
            info.base_name for info in self.filesystem.get_file_info(selector) if info.type == fs.FileType.Directory
        ]

    def read(self, name: str) -> str | None:
        if not self.exists(name):
            return None
        with self.filesystem.open_input_stream(self.at(name)) as stream:
            return bytes(stream.readall()).decode()

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The objects of a file of JSON lines; a last line that is half written, or being written, is left out."""
        *whole, last = (self.read(name) or "").split("\n")  # not splitlines: a string may hold other line separators
        found = [json.loads(line) for line in whole if line]
        try:
            return [*found, json.loads(last)] if last else found
        except json.JSONDecodeError:
            return found

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl; NaN stands for what was not finite."""
        return [{key: math.nan if v is None else v for key, v in row.items()} for row in self.rows("metrics.jsonl")]

    def write(self, name: str, text: str) -> None:
        """Writes a small file so that a reader sees the old text or the new, never half of it."""
        target = self.at(name)
        if self.is_local:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            partial = f"{target}.partial"
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave a name with nothing in it
            os.replace(partial, target)
        else:  # an object store shows an object only once it is whole
            with self.filesystem.open_output_stream(target) as stream:
                stream.write(text.encode())

    def delete(self, name: str) -> None:
        info = self.filesystem.get_file_info(self.at(name))
        if info.type == fs.FileType.Directory:
            self.filesystem.delete_dir(info.path)
        elif info.type == fs.FileType.File:
            self.filesystem.delete_file(info.path)

    def store(self, folder: str, name: str) -> None:
        """Puts a finished local folder in place, replacing what was there."""
        self.delete(name)
        if self.is_local:
            os.makedirs(os.path.dirname(self.at(name)), exist_ok=True)
            shutil.move(folder, self.at(name))
        else:
            self.mirror(folder, name)

    def mirror(self, folder: str, name: str) -> None:
        """Puts the files of a local folder beside those that are there, in place of those of the same name."""
        self.filesystem.create_dir(self.at(name), recursive=True)
        fs.copy_files(folder, self.at(name), destination_filesystem=self.filesystem, use_threads=False)

    @contextmanager
    def local_copy(self, name: str) -> Iterator[str]:
        """A local path of a stored folder: the folder itself where it is local, else a download."""
        if self.is_local:
            yield self.at(name)
            return
        with tempfile.TemporaryDirectory(prefix="raytrl-") as folder:
            fs.copy_files(self.at(name), folder, source_filesystem=self.filesystem)
            yield folder

    def clear(self) -> None:
        """Removes all that a run wrote.

        Raises:
            ConfigError: the folder holds files, but no run's manifest: they are somebody else's.
        """
        found = [
            info.base_name
            for info in self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
            if info.base_name != ".lock"
        ]
        if found and "manifest.json" not in found:
            raise ConfigError(
                f"{self}: this folder is not a run directory; found: {', '.join(sorted(found)[:5])}, no manifest.json; "
                f"expected: an empty or new folder; choose another name"
            )
        for name in found:
            self.delete(name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second driver out; the lock ends with the process, however that ends. URIs have no locks.

        Raises:
            ConfigError: another process is running this run, or nothing can be written there.
        """
        if not self.is_local:
            yield
            return
        lock = filelock.FileLock(self.at(".lock"), timeout=0)
        try:
            os.makedirs(self.path, exist_ok=True)
            lock.acquire()
        except filelock.Timeout:
            raise ConfigError(
                f"{self}: another process is running this run; wait for it, or choose another name"
            ) from None
        except OSError as error:  # no folder, no permission, a full disk
            raise ConfigError(
                f"output_dir: cannot be written to; found: {self}: {error.strerror or error}; expected: a folder, there or "
                f"to be made, in which this user may write"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def manifest(self) -> dict[str, Any]:
        text = self.read("manifest.json")
        return json.loads(text) if text else {}

    def update_manifest(self, **values: Any) -> None:
        self.write("manifest.json", json.dumps(finite(self.manifest() | values), indent=2) + "\n")


def _from_uri(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"output_dir: cannot be opened; found: {uri.partition('?')[0]!r}; "
            f"expected: a path, or a URI such as s3://bucket/path: {str(error).splitlines()[0]}"
        ) from None
    return filesystem, str(path)


def is_disk_full(error: BaseException) -> bool:
    """Whether something could not be written for lack of room; safetensors and others say it in words alone."""
    said = str(error).lower()
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(words in said for words in _NO_ROOM)


_NO_ROOM = ("no space left on device", "disk quota exceeded")
_HALF_WRITTEN = 1 << 62


class StepLog:
    """A file of JSON objects that each name their step; what a redone step logs replaces what it logged before."""

    def __init__(self, run_dir: RunDirectory, name: str) -> None:
        self._run_dir, self._name = run_dir, name
        lines = (run_dir.read(name) or "").split("\n")
        self._lines = [line for line in lines if _step_of(line) < _HALF_WRITTEN]

    @property
    def last_step(self) -> int:
        """The last step that is on record; 0 before the first."""
        return _step_of(self._lines[-1]) if self._lines else 0

    def rewind(self, step: int) -> None:
        """Forgets what was logged after a step: the run goes on from there."""
        self._lines = [line for line in self._lines if _step_of(line) <= step]
        self.flush()

    def extend(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines."""
        lines = [json.dumps(finite(row), ensure_ascii=False) for row in rows]
        self._lines += lines
        if lines and self._run_dir.is_local:
            with open(self._run_dir.at(self._name), "a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))

    def flush(self) -> None:
        """Writes the whole file; object stores cannot append, so there this is called at checkpoints and at the end."""
        if self._lines or self._run_dir.exists(self._name):
            self._run_dir.write(self._name, "".join(f"{line}\n" for line in self._lines))


class MetricsLog(StepLog):
    """metrics.jsonl: one line a step."""

    def __init__(self, run_dir: RunDirectory) -> None:
        super().__init__(run_dir, "metrics.jsonl")

    def append(self, metrics: dict[str, Any]) -> None:
        """Adds a step's line; what else is known of the same step (an evaluation after it) joins that line."""
        if self._lines and _step_of(self._lines[-1]) == metrics["step"]:
            self._lines[-1] = json.dumps(finite(json.loads(self._lines[-1]) | metrics))
            self.flush()
        else:
            self.extend([metrics])


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a killed driver may be half written: drop it
        return _HALF_WRITTEN


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def now() -> str:
    """This moment as ISO 8601, with the zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
