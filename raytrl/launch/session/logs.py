"""One log file for each process of a run: `logs/<role>-<rank>.log` in the run directory.

Each line names its role, rank and the version of the weights that the process holds or has made (steps done), so that
files of several processes can be sorted into one. A restarted process goes on in the same file.
"""

import logging
import os

import ray

from raytrl.rundir import RunDirectory

LOG = logging.getLogger("raytrl")
_HEAD = "%(asctime)s %(levelname)s %(role)s %(rank)d v%(version)s "


class _EachLine(logging.Formatter):
    """Names role, rank and version in every line of a record: a table of transformers or a traceback has many."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        record.asctime = self.formatTime(record)
        return "\n".join(_HEAD % vars(record) + line for line in text.splitlines() if line.strip())


class _Identity(logging.Filter):
    """Puts role, rank and version into a record; lets raytrl's own lines through from INFO, others from WARNING."""

    def __init__(self, role: str, rank: int) -> None:
        super().__init__()
        self.role, self.rank, self.version = role, rank, "-"

    def filter(self, record: logging.LogRecord) -> bool:
        record.role, record.rank, record.version = self.role, self.rank, self.version
        return record.levelno >= (logging.INFO if record.name == LOG.name else logging.WARNING)


_identity: _Identity | None = None  # of this process, which has one role


def log_path(run_dir: RunDirectory, role: str, rank: int) -> str:
    """Where a process logs: the run directory, or Ray's own log folder of the node where that is a URI.

    Object stores cannot append, and Ray's dashboard shows what is in its log folder.
    """
    if run_dir.is_local:
        return run_dir.at(f"logs/{role}-{rank}.log")
    logs: str = ray._private.worker.global_worker.node.get_logs_dir_path()  # no public name in 2.60
    return os.path.join(logs, f"{run_dir.own_name}-{role}-{rank}.log")


def start_log(run_dir: RunDirectory, role: str, rank: int) -> None:
    """Makes this process log to its file; its first line says where it runs."""
    global _identity
    path = log_path(run_dir, role, rank)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_EachLine())
    _identity = _Identity(role, rank)
    handler.addFilter(_identity)
    logging.getLogger().addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.info("starts on node %s, process %d", ray.util.get_node_ip_address(), os.getpid())


def set_version(version: int) -> None:
    """The version of the weights that this process holds from now on; without a log it does nothing."""
    if _identity is not None:
        _identity.version = str(version)
