"""What runs in a trial's process: an ordinary run on the sweep's Ray, whose steps also go to Ray Tune."""

import math
import os
import traceback
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, assert_never

from raytrl.config.load import LoadedRun
from raytrl.config.runs.sweep import TuneRun
from raytrl.errors import RaytrlError, RunError, TrialStoppedError
from raytrl.launch.session.session import prepare_environment
from raytrl.launch.sweep.book import LimitWatch
from raytrl.records.progress import Progress
from raytrl.rundir import RunDirectory, now


def run_trial(config: dict[str, Any], sweep: TuneRun, command: str, reward_actors: Sequence[Any] | None) -> None:
    """The function that Ray Tune calls for each trial, in a process that ends with the trial.

    The actors and workers that a trial starts belong to this process, so they go when Tune stops it.

    Args:
        config: `loaded`: the trial's run.
        sweep: the sweep's run file.
        command: what started the sweep.
        reward_actors: handles of those that all trials share, where they share them.
    """
    prepare_environment()
    import ray
    from ray import tune

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # a run on a Ray that exists, as in a job
    from ray.util import get_current_placement_group

    from raytrl.launch.runs.run import Lent, kind_of, run_to_end

    loaded: LoadedRun = config["loaded"]
    run = loaded.run
    run_dir = RunDirectory(run.output_dir, run.name)
    reports = TrialReports(sweep, run_dir)
    try:
        kind = kind_of(loaded, Lent(get_current_placement_group(), reward_actors))
        run_to_end(kind, command, False, reports.show)
        end = {"end": "done", "cause": ""}
    except TrialStoppedError as error:
        run_dir.update_manifest(state="stopped", error=str(error), finished=now())
        end = {"end": "over limit", "cause": str(error)}
    except RaytrlError as error:
        end = {"end": "failed", "cause": str(error)}
    except Exception as error:  # a fault of this program: the sweep shows it and goes on with the other trials
        text = (run_dir.read("failures.log") or "") + f"{now()} {traceback.format_exc()}\n"
        run_dir.write("failures.log", text)
        end = {"end": "failed", "cause": f"{type(error).__name__}: {error}; traceback: {run_dir}/failures.log"}
    tune.report({**reports.last, **end})


def trial_resources(config: dict[str, Any], shares_reward: bool) -> Any:
    """What Ray Tune waits for before it starts a trial, and gives back after it: places for the trial's actors.

    A placement group that the trial made itself would outlive it: Ray ends one with its job, not with the actor that
    made it. The trial's process takes next to nothing, and Ray Train places the learners.
    """
    from ray.tune import PlacementGroupFactory

    from raytrl.launch.actors.start import bundles

    run = config["loaded"].run
    resources: list[dict[str, float]] = [{"memory": 1}]
    labels: list[dict[str, str]] = [{}]
    strategy = "PACK"
    for each in run.processes():
        if each.role == "rollout":
            strategy = each.section.placement.upper()
        if each.role == "rollout" or (each.role == "reward" and not shares_reward):
            asked, wanted = bundles(each.section)
            resources += asked
            labels += wanted
    return PlacementGroupFactory(resources, strategy, bundle_label_selector=labels if any(labels) else None)


class TrialReports:
    """Passes a trial's steps to Ray Tune, and ends it when it stays over a limit."""

    def __init__(self, sweep: TuneRun, run_dir: RunDirectory) -> None:
        self._sweep, self._run_dir = sweep, run_dir
        self._limits = LimitWatch(sweep.limit, sweep.limit_patience)
        self._step = -1  # the last one that was passed on
        self.last: dict[str, Any] = {}  # the last step, which a scheduler must not stop: all that is left is to save

    def show(self, event: Progress) -> None:
        """Takes each piece of a run's progress.

        Raises:
            TrialStoppedError: a limited metric stays over its limit.
            RunError: the run does not log a metric that the sweep needs.
        """
        match event.kind:
            case "start":
                self._catch_up(event)
            case "step":
                self._check_known(event.metrics)
                self._take(event.step, event.total_steps, event.metrics)
            case "eval":
                self._take(event.step, event.total_steps, event.metrics)
            case "plan" | "phase" | "notice" | "checkpoint" | "beat" | "failure" | "earlier":
                pass  # no metrics; how a trial ends says `run_trial`
            case _:
                assert_never(event.kind)

    def _catch_up(self, event: Progress) -> None:
        """Takes the steps of a start that was cut off: schedulers see a trial as a whole."""
        if event.step <= self._step + 1:
            return
        for row in self._run_dir.metrics():
            if row["step"] <= event.step:
                self._take(row["step"], event.total_steps, row)

    def _take(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        if cause := self._limits.take(step, metrics):
            raise TrialStoppedError(cause)
        if self._sweep.metric not in metrics or step <= self._step:
            return
        self._step = step
        row: dict[str, float] = {"step": step}
        if math.isfinite(metrics[self._sweep.metric]):  # a scheduler's comparisons with NaN would all be false
            row[self._sweep.metric] = metrics[self._sweep.metric]
        if step >= total_steps:
            self.last = row
            return
        if self._sweep.metric in row:
            from ray import tune

            tune.report(row)

    def _check_known(self, metrics: Mapping[str, float]) -> None:
        for key, names in (("metric", [self._sweep.metric]), ("limit", list(self._sweep.limit))):
            for name in names:
                if name not in metrics and not name.startswith("eval"):
                    near = get_close_matches(name, metrics, n=3, cutoff=0.4) or sorted(metrics)
                    raise RunError(f"{key}: the run does not log {name!r}; it logs, for example: {', '.join(near[:6])}")
