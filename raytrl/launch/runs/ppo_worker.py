"""The Ray Train side of a PPO learner worker."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train.torch

from raytrl.config.foreign.deepspeed import without_auto
from raytrl.config.runs.ppo import PpoRun
from raytrl.data import load_data
from raytrl.launch.actors.generator import generator_on
from raytrl.launch.actors.scorer import scorer_on
from raytrl.launch.actors.send_weights import WeightSender
from raytrl.launch.runs.ppo_reporter import PpoReporter, without_times
from raytrl.launch.runs.worker import RayWorkerContext
from raytrl.launch.session.logs import LOG, set_version
from raytrl.loop import loop
from raytrl.records.progress import Progress
from raytrl.records.samples import Attempt
from raytrl.roles.job import Job
from raytrl.roles.learner.backend import Backend
from raytrl.roles.learner.build import build_backend, build_networks
from raytrl.roles.learner.collectives import gather_over_workers
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.learner.networks import Networks
from raytrl.roles.learner.save import save_policy, save_value
from raytrl.roles.models.base import torch_dtype
from raytrl.roles.models.card import write_model_card
from raytrl.roles.models.tokenizer import load_tokenizer
from raytrl.roles.prompts import PromptTable, SharedPrompts
from raytrl.rundir import RunDirectory


def train_ppo(
    job: Job[PpoRun], context: RayWorkerContext, rollout_actors: list[Any], reward_actors: list[Any], tensorboard: str
) -> dict[str, float]:
    """Runs one learner worker from the last committed checkpoint to the finished model; returns the last metrics."""
    run = job.run
    say = _Phases(context)
    say("loading models")
    with context.beating():
        learner, backend = _learner(run, context)
        tokenizer = load_tokenizer(run.tokenizer_path, None, run.model.trust_remote_code)
    with context.beating(), context.restored() as folder:
        if folder is not None:
            learner.load(Path(folder))
            set_version(learner.step)
            LOG.info("goes on from the checkpoint of step %d", learner.step)
        context.barrier()  # a downloaded checkpoint is deleted when the first rank leaves
    say("waiting for rollout and reward actors")
    number = context.new_attempt() if context.rank == 0 else 0
    attempt = Attempt(run.name, context.from_rank_zero(number))
    who = f"learner worker {context.rank}"
    by_broadcast = run.rollout.weight_transfer == "broadcast"
    sender = WeightSender(context, backend.device, broadcasts=by_broadcast, shelf=context.board)
    generator = generator_on(
        rollout_actors,
        run,
        who=who,
        attempt=attempt,
        send_weights=sender,
        team=context if context.world_size > 1 else None,
        beat=context.beat,
        lanes=run.lanes,
        groups=run.lane_groups,
        ahead=run.ppo.max_lag > 0,
    )
    scorer = scorer_on(reward_actors, run, who=who, attempt=attempt, gather=gather_over_workers, beat=context.beat)
    if run.rollout.shares_gpu:
        scorer.start()  # the engines load when they are asked, and measure then what their GPU has left
    reporter = PpoReporter(run, context, tensorboard, learner, backend.networks.policy, lambda: generator.num_up)
    loop.run(_schedule(run), _prompts(run, tokenizer, context), generator, scorer, learner, reporter)
    reporter.close()
    say("saving model")
    with context.beating():
        _save_models(job, backend, tokenizer, learner.step, reporter.last, context)
    context.barrier()  # no rank leaves before the model is in place
    return {key: value for key, value in reporter.last.items() if value - value == 0.0}


def _learner(run: PpoRun, context: RayWorkerContext) -> tuple[PpoLearner, Backend]:
    deepspeed = run.learner.deepspeed
    deepspeed = None if deepspeed is None else without_auto(deepspeed)
    networks = _networks(run, deepspeed)
    backend = build_backend(networks, run.ppo, deepspeed=deepspeed, device=str(ray.train.torch.get_device()))
    learner = PpoLearner(
        backend,
        run.ppo,
        temperature=run.rollout.sampling.temperature,
        seed=run.seed,
        max_new_tokens=run.rollout.sampling.max_new_tokens,
        reference=None if not run.has_reference else "start" if run.reference.path is None else "named",
        beat=context.beat,
    )
    return learner, backend


def _networks(run: PpoRun, deepspeed: Mapping[str, Any] | None) -> Networks:
    return build_networks(
        str(run.model.path),
        lora=run.lora,
        value_init=run.value_model.init,
        reference_path=run.reference.path,
        critic=run.has_critic,
        reference=run.has_reference,
        shared=run.value_model.shared,
        dtype=torch_dtype(run.model.dtype, run.learner.uses_gpu),
        trust_remote_code=run.model.trust_remote_code,
        seed=run.seed,
        gradient_checkpointing=run.ppo.gradient_checkpointing,
        deepspeed=deepspeed,
        on_gpu=run.learner.uses_gpu,
    )


def _schedule(run: PpoRun) -> loop.Schedule:
    return loop.Schedule(
        steps=run.ppo.steps,
        checkpoint_every=run.checkpoint.every,
        eval_every=run.eval.every if run.eval else 0,
        eval_greedy=run.eval.greedy if run.eval else True,
        max_lag=run.ppo.max_lag,
        lanes=run.lanes,
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


def _save_models(
    job: Job[PpoRun],
    backend: Backend,
    tokenizer: Any,
    steps: int,
    metrics: Mapping[str, float],
    context: RayWorkerContext,
) -> None:
    """Stores value_model/, where there is one, and model/ (with LoRA the adapter, and merged/ in it). Collective; the first
    worker writes."""
    run = job.run
    run_dir = RunDirectory(run.output_dir, run.name)
    names = ("value_model", "model") if run.has_critic else ("model",)  # model/ comes last
    folders = {name: Path(context.scratch) / name for name in names}
    if context.rank == 0:
        for folder in folders.values():
            folder.mkdir(parents=True)
    if run.has_critic:
        save_value(backend, folders["value_model"])
    save_policy(backend, folders["model"], trust_remote_code=run.model.trust_remote_code)
    if context.rank != 0:
        return
    for name, folder in folders.items():
        for place in (folder, folder / "merged"):
            if place.is_dir():
                tokenizer.save_pretrained(place)
        write_model_card(str(folder), run, job.command, job.versions, steps, without_times(metrics))
        run_dir.store(str(folder), name)
