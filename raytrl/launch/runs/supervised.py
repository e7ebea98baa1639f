"""What is particular to launching SFT, reward modelling and DPO."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raytrl.config.runs.supervised import SupervisedRun
from raytrl.plan.checks.supervised import preflight
from raytrl.plan.words import describe
from raytrl.roles.job import SupervisedJob
from raytrl.rundir import RunDirectory


class SupervisedKind:
    """`run.Kind` of a TRL trainer: workers alone."""

    reward_shared = False

    def __init__(self, run: SupervisedRun) -> None:
        self._run = run
        self._has_tokenizer = False

    def check(self, run_dir: RunDirectory) -> str:
        rows, self._has_tokenizer = preflight(self._run, run_dir)
        return describe(self._run, rows)

    @contextmanager
    def running(self, command: str, versions: dict[str, str]) -> Iterator[tuple[Any, dict[str, Any]]]:
        from raytrl.launch.runs.worker import supervised_worker

        yield supervised_worker, {"job": SupervisedJob(self._run, command, versions, self._has_tokenizer)}
