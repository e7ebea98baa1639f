"""What is particular to launching SFT, reward modelling and DPO."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raytrl.config.runs import SupervisedRun
from raytrl.launch.placement import Group, Need
from raytrl.launch.preflight import describe, preflight
from raytrl.roles.job import SupervisedJob
from raytrl.rundir import RunDirectory


class SupervisedKind:
    """`train.Kind` of a TRL trainer: workers alone."""

    def __init__(self, run: SupervisedRun) -> None:
        self._run = run
        self._has_tokenizer = False

    @property
    def need(self) -> Need:
        learner = self._run.learner
        return Need((Group.of("learner.workers", learner.min_workers, learner),))

    def check(self, run_dir: RunDirectory) -> str:
        rows, self._has_tokenizer = preflight(self._run, run_dir)
        return describe(self._run, rows)

    @contextmanager
    def running(self, command: str, versions: dict[str, str]) -> Iterator[tuple[Any, dict[str, Any]]]:
        from raytrl.launch.worker import supervised_worker

        yield supervised_worker, {"job": SupervisedJob(self._run, command, versions, self._has_tokenizer)}
