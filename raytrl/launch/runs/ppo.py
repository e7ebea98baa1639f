"""What is particular to launching PPO: checks, and the actors that the driver owns."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raytrl.config.runs.ppo import PpoRun
from raytrl.config.runs.rollout import RolloutRun
from raytrl.launch.runs.conversations import let_converse, tools_of
from raytrl.launch.runs.training import TrainingKind
from raytrl.plan.checks.common import Facts
from raytrl.plan.checks.ppo import check_ppo
from raytrl.roles.job import Job
from raytrl.rundir import RunDirectory
from raytrl.versions import versions

if TYPE_CHECKING:
    from raytrl.roles.reward.sources import RewardSources
    from raytrl.roles.rollout.engine import RolloutEngine


class PpoKind(TrainingKind[PpoRun]):
    """`run.Kind` of PPO: rollout and reward actors belong to the driver, learners to Ray Train."""

    def check(self, run_dir: RunDirectory, before_last: Callable[[], None]) -> Facts:
        return Facts() if self.lent else check_ppo(self.run, self.tell_rows, before_last)

    @contextmanager
    def running(self, command: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        from raytrl.launch.actors.start import started_actors

        run, group, shared = self.run, None, None
        if self.lent is not None:
            group, shared = self.lent.group, self.lent.reward_actors
        engine = functools.partial(make_engine, run)
        sources = functools.partial(make_sources, run) if shared is None else None
        with started_actors(run, engine, sources, group) as (rollout, own):
            job = Job(run, command, versions())
            yield ppo_worker, {"job": job, "rollout": rollout, "reward": own if shared is None else list(shared)}


# Ray sends these by name: the driver never imports torch and the models' libraries, the processes that need them do.


def make_engine(run: PpoRun) -> "RolloutEngine":
    """The engine of one rollout actor; its weights are the learners', in their dtype."""
    from raytrl.roles.models.base import torch_dtype
    from raytrl.roles.rollout.engines import engine_class

    tools = tools_of(run)
    engine = engine_class(run.rollout.engine).from_pretrained(
        str(run.model.path),
        run.tokenizer_path,
        run.rollout,
        seed=run.seed,
        lora=run.lora,
        dtype=torch_dtype(run.model.dtype, run.learner.uses_gpu),
        device="cuda" if run.rollout.uses_gpu else "cpu",
        trust_remote_code=run.model.trust_remote_code,
        num_versions=run.engine_versions,
    )
    let_converse(engine, run, run.tokenizer_path, tools)
    return engine


def make_sources(run: RolloutRun) -> "RewardSources":
    """The sources of one reward actor. It sees parts of a batch, so how many may be dropped is judged by the learner."""
    from raytrl.roles.reward.sources import RewardSources

    section = run.reward
    if section.on_error == "drop":
        section = section.model_copy(update={"max_dropped_fraction": 1.0})
    return RewardSources(section, "cuda" if run.reward.uses_gpu else "cpu")


def ppo_worker(config: dict[str, Any]) -> dict[str, float]:
    """The train function that Ray Train runs in each learner worker."""
    from raytrl.launch.runs.worker import RayWorkerContext, as_worker

    def work(context: RayWorkerContext) -> dict[str, float]:
        with context.beating():
            from raytrl.launch.runs.ppo_worker import train_ppo

        return train_ppo(config["job"], context, config["rollout"], config["reward"], config["tensorboard"])

    return as_worker(config, work)
