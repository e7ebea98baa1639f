"""What a PPO step tells the driver: metrics, samples, trackers."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from raytrl.config.load import flatten
from raytrl.config.runs.ppo import PpoRun
from raytrl.launch.runs.worker import RayWorkerContext
from raytrl.launch.session.logs import LOG, set_version
from raytrl.loop.alarm import GapAlarm, StaleAlarm
from raytrl.loop.protocols import Rollout
from raytrl.records.metrics import ESS, FAILED, GAP, REDONE, SAMPLING_KL, STEP_S
from raytrl.records.progress import Progress
from raytrl.records.samples import sample_row
from raytrl.roles.learner.collectives import gather_over_workers
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.trackers import Trackers


class PpoReporter:
    """`loop.protocols.Reporter`: rank 0 tells the driver and the tracker; all ranks commit checkpoints."""

    def __init__(
        self,
        run: PpoRun,
        context: RayWorkerContext,
        tensorboard: str,
        learner: PpoLearner,
        policy: Any,
        num_actors: Callable[[], int],
    ) -> None:
        self._run, self._context, self._num_actors = run, context, num_actors
        self.last: Mapping[str, float] = {}
        self._alarm, self._stale = GapAlarm(), StaleAlarm()
        self._writer: Any = None
        self._trackers: Trackers | None = None
        if context.rank == 0:
            step = learner.step
            context.progress(Progress("start", step, run.ppo.steps))
            others = [name for name in run.report_to if name != "tensorboard"]
            if others:
                values = dict(flatten(run.model_dump(mode="json")))
                self._trackers = Trackers(others, values, run.name, context.scratch, policy, run.ppo.steps)
            if "tensorboard" in run.report_to:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(tensorboard, purge_step=step + 1)

    def report(
        self,
        step: int,
        metrics: Mapping[str, float],
        rollout: Rollout,
        evaluation: Rollout | None,
        save: Callable[[Path], None] | None,
    ) -> None:
        metrics = {**metrics, "rollout/actors": float(self._num_actors())}
        self.last = metrics
        samples = self._samples(rollout, evaluation, step)
        if self._context.rank == 0:
            for notice in self._notices(step, metrics, rollout):
                self._context.progress(Progress("notice", step, text=notice))
            self._context.progress(Progress("step", step, self._run.ppo.steps, metrics=metrics, samples=samples))
            if self._writer is not None:
                for name, value in metrics.items():
                    self._writer.add_scalar(name, value, step)
                self._writer.flush()
            if self._trackers is not None:
                self._trackers.log(step, metrics)
        else:
            set_version(step)
            LOG.info("step %d/%d in %.3f s", step, self._run.ppo.steps, metrics[STEP_S])
        if save is not None:
            self._checkpoint(step, save)

    def _notices(self, step: int, metrics: Mapping[str, float], rollout: Rollout) -> Iterator[str]:
        lag = self._run.ppo.max_lag
        if not lag:  # else the gap is also how far the policy has moved meanwhile
            drift = self._alarm.check(step, metrics[GAP])
        else:
            drift = self._stale.check(step, metrics[ESS], metrics[SAMPLING_KL], lag)
        if drift is not None:
            yield drift
        if failed := int(metrics.get(FAILED, 0)):
            reasons = [r.episode.failure for r in rollout.responses if r.episode is not None and r.failed]
            what = "conversation" if failed == 1 else "conversations"
            yield (
                f"step {step}: {failed} {what} failed and did not count; {reasons[0] if reasons else 'why'} "
                f"(logs/rollout-*.log has all)"
            )
        if count := int(metrics.get(REDONE, 0)):
            yield (
                f"step {step}: {count} responses were made by newer weights than planned, as all were lost that had those; "
                f"from here on the run is not the one that it would have been"
            )

    def close(self) -> None:
        """The last step is done."""
        if self._trackers is not None:
            self._trackers.close()

    def _samples(self, rollout: Rollout, evaluation: Rollout | None, step: int) -> tuple[Mapping[str, Any], ...]:
        """Rows of samples.jsonl, spread over the global batch whoever holds them. Collective."""
        run, count = self._run, self._run.rollout.samples
        chosen = _spread(run.responses_a_step, count)
        keys = {divmod(place, run.ppo.responses_per_prompt) for place in chosen}
        mine = _chosen_rows(rollout, keys, step, "train")
        if evaluation is not None:
            num_rows = sum(gather_over_workers([len(evaluation.prompts)]))
            mine += _chosen_rows(evaluation, {(row, 0) for row in _spread(num_rows, count)}, step, "eval")
        return tuple(
            sorted(gather_over_workers(mine), key=lambda row: (row["data"] == "eval", row["row"], row["sample"]))
        )

    def _checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        folder = os.path.join(self._context.scratch, f"checkpoint-{step}")
        with self._context.beating():
            save(Path(folder))
        self._context.barrier()  # every rank's files are on disk
        self._context.commit(step, folder if self._context.local_rank == 0 else None)
        if self._context.rank == 0:
            self._context.progress(Progress("checkpoint", step, self._run.ppo.steps))


def _spread(size: int, count: int) -> list[int]:
    """At most `count` places out of `size`, evenly spread."""
    return [i * size // count for i in range(count)] if count < size else list(range(size))


def _chosen_rows(rollout: Rollout, keys: set[tuple[int, int]], step: int, data: str) -> list[dict[str, Any]]:
    """The (row, sample) of `keys` that this worker's share holds, as rows of samples.jsonl."""
    prompts = {prompt.row: prompt for prompt in rollout.prompts}
    scores = {(score.row, score.sample): score for score in rollout.scores}
    return [
        sample_row(prompts[response.row], response, scores[response.row, response.sample], step=step, data=data)
        for response in rollout.responses
        if (response.row, response.sample) in keys
    ]


def without_times(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that do not depend on the machine."""
    return {key: value for key, value in metrics.items() if not key.startswith("time/")}
