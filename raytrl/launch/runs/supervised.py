"""What is particular to launching SFT, reward modelling and DPO."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raytrl.config.runs.supervised import SupervisedRun
from raytrl.launch.runs.training import TrainingKind
from raytrl.plan.checks.common import Facts
from raytrl.plan.checks.supervised import prepare_supervised
from raytrl.roles.job import Job
from raytrl.rundir import RunDirectory
from raytrl.versions import versions


class SupervisedKind(TrainingKind[SupervisedRun]):
    """`run.Kind` of a TRL trainer: workers alone."""

    def check(self, run_dir: RunDirectory, before_last: Callable[[], None]) -> Facts:
        return prepare_supervised(
            self.run, run_dir, tries_rows=self.lent is None, tell=self.tell_rows, before_last=before_last
        )

    @contextmanager
    def running(self, command: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        from raytrl.launch.runs.worker import supervised_worker

        yield supervised_worker, {"job": Job(self.run, command, versions())}
