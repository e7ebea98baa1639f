"""The log file of a process: whatever is logged, each of its lines says whose it is."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from raytrl.launch.session import logs
from raytrl.rundir import RunDirectory


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    before = list(logging.getLogger().handlers)
    logs.start_log(RunDirectory(str(tmp_path), "run"), "learner", 3)
    yield tmp_path / "run/logs/learner-3.log"
    for handler in set(logging.getLogger().handlers) - set(before):
        logging.getLogger().removeHandler(handler)
        handler.close()
    monkeypatch.setattr(logs, "_identity", None)


def test_every_line_names_role_rank_and_version(log: Path) -> None:
    """Of a table, as transformers logs of what it loaded, and of a traceback, too; empty lines are left out."""
    logs.set_version(7)
    logging.getLogger("a.library").warning("LOAD REPORT\nKey   | Status  |\n\nscore | MISSING |\n")
    try:
        raise ValueError("no\nnumber")
    except ValueError:
        logging.getLogger("a.library").exception("it failed")
    lines = log.read_text().splitlines()
    assert [line.split(" v", 1)[1].split(" ", 1)[1] for line in lines[1:6]] == [
        "LOAD REPORT",
        "Key   | Status  |",
        "score | MISSING |",
        "it failed",
        "Traceback (most recent call last):",
    ]
    assert lines[-1].endswith("number")
    assert re.match(r"\d{4}-\S+ \S+ INFO learner 3 v- starts on node 10.0.0.1", lines[0])
    for line in lines[1:]:
        assert re.match(r"\d{4}-\S+ \S+ (WARNING|ERROR) learner 3 v7 \S|\d{4}-\S+ \S+ ERROR learner 3 v7   ", line), (
            line
        )
