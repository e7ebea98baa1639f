"""The Ray Train side of a PPO learner worker."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from raytrl.config.deepspeed import without_auto, zero_stage
from raytrl.config.load import flatten
from raytrl.config.ppo_run import PpoRun
from raytrl.data import load_data
from raytrl.launch.gauges import RoleGauges
from raytrl.launch.logs import LOG, set_version
from raytrl.launch.pool import Pool
from raytrl.launch.ray_actors import RayCalls
from raytrl.launch.roles import RewardPool, RolloutPool, requests_in_flight, scoring_limit_s
from raytrl.launch.sharing import Sharing
from raytrl.launch.worker import RayWorkerContext
from raytrl.ppo import loop
from raytrl.ppo.alarm import GapAlarm
from raytrl.ppo.protocols import Rollout
from raytrl.records import Attempt, Progress, sample_row
from raytrl.roles.job import PpoJob
from raytrl.roles.learner.backend import Backend
from raytrl.roles.learner.build import build_backend, build_networks
from raytrl.roles.learner.collectives import gather_over_workers, worker_rank
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.learner.networks import Networks
from raytrl.roles.models.base import torch_dtype
from raytrl.roles.models.card import write_model_card
from raytrl.roles.models.tokenizer import load_tokenizer
from raytrl.roles.prompts import PromptTable, SharedPrompts
from raytrl.roles.trackers import Trackers
from raytrl.rundir import RunDirectory


def train_ppo(
    job: PpoJob, context: RayWorkerContext, rollout_actors: list[Any], reward_actors: list[Any], tensorboard: str
) -> dict[str, float]:
    """Runs one learner worker from the last committed checkpoint to the finished model; returns the last metrics."""
    run = job.run
    say = _Phases(context)
    say("loading models")
    learner, backend = _learner(run)
    tokenizer = load_tokenizer(run.tokenizer_path, None, run.model.trust_remote_code)
    with context.restored() as folder:
        if folder is not None:
            learner.load(Path(folder))
            set_version(learner.step)
            LOG.info("goes on from the checkpoint of step %d", learner.step)
        context.barrier()  # a downloaded checkpoint is deleted when the first rank leaves
    say("waiting for rollout and reward actors")
    attempt = Attempt(run.name, broadcast_from_rank_zero(time.time_ns()))
    who = f"learner worker {context.rank}"
    generator = RolloutPool(
        Pool(
            RayCalls(rollout_actors, RoleGauges(run.name, "rollout")),
            "rollout actors",
            who,
            run.rollout.timeout_s,
            window=requests_in_flight(run.rollout, run.ppo.responses_per_prompt),
        ),
        run.rollout,
        samples=run.ppo.responses_per_prompt,
        attempt=attempt,
        share=Sharing(context, backend.device, broadcasts=run.rollout.weight_transfer == "broadcast"),
    )
    scorer = RewardPool(
        Pool(
            RayCalls(reward_actors, RoleGauges(run.name, "reward")),
            "reward actors",
            who,
            scoring_limit_s(run.rollout, run.reward, run.ppo.responses_per_prompt),
        ),
        run.reward,
        attempt=attempt,
        start_timeout_s=run.rollout.start_timeout_s,
        gather=gather_over_workers,
    )
    reporter = StepReporter(run, context, tensorboard, learner, backend.networks.policy, lambda: generator.num_up)
    loop.run(_schedule(run), _prompts(run, tokenizer, context), generator, scorer, learner, reporter)
    reporter.close()
    say("saving model")
    _save(job, _whole_networks(run, backend), tokenizer, learner.step, reporter.last, context)
    context.barrier()  # no rank leaves before the model is in place
    return {key: value for key, value in reporter.last.items() if value - value == 0.0}


def _learner(run: PpoRun) -> tuple[PpoLearner, Backend]:
    deepspeed = run.learner.deepspeed
    backend = build_backend(
        _networks(run),
        run.ppo,
        deepspeed=None if deepspeed is None else without_auto(deepspeed),
        device=str(ray.train.torch.get_device()),
    )
    learner = PpoLearner(
        backend,
        run.ppo,
        temperature=run.rollout.sampling.temperature,
        seed=run.seed,
        reference_is_start=run.reference.path is None,
    )
    return learner, backend


def _networks(run: PpoRun) -> Networks:
    return build_networks(
        str(run.model.path),
        lora=run.lora,
        value_init=run.value_model.init,
        reference_path=run.reference.path,
        dtype=torch_dtype(run.model.dtype, run.learner.uses_gpu),
        trust_remote_code=run.model.trust_remote_code,
        seed=run.seed,
        gradient_checkpointing=run.ppo.gradient_checkpointing,
    )


def _whole_networks(run: PpoRun, backend: Backend) -> Networks:
    """The networks with all their weights in this process. Collective: under ZeRO-3 each worker holds a part."""
    if zero_stage(run.learner.deepspeed) != 3:
        return backend.networks
    tensors = backend.trainable_tensors()
    if worker_rank() != 0:
        return backend.networks
    networks = _networks(run)
    with torch.no_grad():
        for name, parameter in networks.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])
    return networks


def _schedule(run: PpoRun) -> loop.Schedule:
    return loop.Schedule(
        steps=run.ppo.steps,
        checkpoint_every=run.checkpoint.every,
        eval_every=run.eval.every if run.eval else 0,
        eval_greedy=run.eval.greedy if run.eval else True,
        max_lag=run.ppo.max_lag,
    )


def _prompts(run: PpoRun, tokenizer: Any, context: RayWorkerContext) -> SharedPrompts:
    def table(key: str) -> PromptTable | None:
        source = getattr(run.data, key)
        where = f"data.{key}"
        return None if source is None else PromptTable(load_data(source, where), tokenizer, run.rollout, where)

    train = table("train")
    assert train is not None
    return SharedPrompts(
        train,
        table("eval"),
        per_step=run.ppo.prompts_per_step,
        eval_rows=run.eval.rows if run.eval else 0,
        chunk_prompts=run.rollout.chunk_prompts,
        seed=run.seed,
        rank=context.rank,
        world_size=context.world_size,
    )


class _Phases:
    def __init__(self, context: RayWorkerContext) -> None:
        self._context = context

    def __call__(self, text: str) -> None:
        if self._context.rank == 0:
            self._context.progress(Progress("phase", text=text))


class StepReporter:
    """`ppo.protocols.Reporter`: rank 0 tells the driver and the tracker; all ranks commit checkpoints."""

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
        self._alarm = GapAlarm()
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
            if self._run.ppo.max_lag == 0:  # else the gap is also how far the policy has moved meanwhile
                notice = self._alarm.check(step, metrics["rollout/logprob_gap_mean"])
                if notice is not None:
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
            LOG.info("step %d/%d in %.3f s", step, self._run.ppo.steps, metrics["time/step_s"])
        if save is not None:
            self._checkpoint(step, save)

    def close(self) -> None:
        """The last step is done."""
        if self._trackers is not None:
            self._trackers.close()

    def _samples(self, rollout: Rollout, evaluation: Rollout | None, step: int) -> tuple[Mapping[str, Any], ...]:
        """Rows of samples.jsonl, spread over the global batch whoever holds them. Collective."""
        run, count = self._run, self._run.rollout.samples
        chosen = _spread(run.ppo.batch_size, count)
        keys = {divmod(place, run.ppo.responses_per_prompt) for place in chosen}
        mine = _sample_rows(rollout, keys, step, "train")
        if evaluation is not None:
            num_rows = sum(gather_over_workers([len(evaluation.prompts)]))
            mine += _sample_rows(evaluation, {(row, 0) for row in _spread(num_rows, count)}, step, "eval")
        return tuple(
            sorted(gather_over_workers(mine), key=lambda row: (row["data"] == "eval", row["row"], row["sample"]))
        )

    def _checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        folder = os.path.join(self._context.scratch, f"checkpoint-{step}")
        save(Path(folder))
        self._context.barrier()  # every rank's files are on disk
        self._context.commit(step, folder if self._context.local_rank == 0 else None)
        if self._context.rank == 0:
            self._context.progress(Progress("checkpoint", step, self._run.ppo.steps))


def _spread(size: int, count: int) -> list[int]:
    """At most `count` places out of `size`, evenly spread."""
    return [i * size // count for i in range(count)] if count < size else list(range(size))


def _sample_rows(rollout: Rollout, keys: set[tuple[int, int]], step: int, data: str) -> list[dict[str, Any]]:
    """The (row, sample) of `keys` that this worker's share holds, as rows of samples.jsonl."""
    prompts = {prompt.row: prompt for prompt in rollout.prompts}
    scores = {(score.row, score.sample): score for score in rollout.scores}
    return [
        sample_row(prompts[response.row], response, scores[response.row, response.sample], step=step, data=data)
        for response in rollout.responses
        if (response.row, response.sample) in keys
    ]


def _save(
    job: PpoJob,
    networks: Networks,
    tokenizer: Any,
    steps: int,
    metrics: Mapping[str, float],
    context: RayWorkerContext,
) -> None:
    """Stores model/ (with LoRA the adapter, and merged/ in it) and value_model/."""
    run_dir = RunDirectory(job.run.output_dir, job.run.name)
    if context.rank != 0:
        return
    for name, save in (("value_model", networks.save_value), ("model", networks.save_policy)):  # model/ comes last
        folder = Path(context.scratch) / name
        folder.mkdir(parents=True)
        save(folder)
        for place in (folder, folder / "merged"):
            if place.is_dir():
                tokenizer.save_pretrained(place)
        write_model_card(str(folder), job.run, job.command, job.versions, steps, _shown(metrics))
        run_dir.store(str(folder), name)


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.startswith("time/")}
