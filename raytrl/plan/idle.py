"""Settings of a valid run file that would change nothing, or that leave processes idle."""

from collections.abc import Iterator

from raytrl.config.foreign.deepspeed import zero_stage
from raytrl.config.runs.base import Run, TrainingRun
from raytrl.config.runs.evaluation import EvalRun
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.runs.supervised import SupervisedRun


def idle_settings(run: Run, steps: int | None) -> list[str]:
    """One line each; what can never make sense is refused when the file is read.

    Args:
        steps: of the whole run, where they are known.
    """
    lines: list[str] = []
    if isinstance(run, TrainingRun):
        lines += _training(run, steps)
    if isinstance(run, SupervisedRun):
        lines += _supervised(run)
    if isinstance(run, PpoRun):
        lines += _ppo(run)
    if isinstance(run, PpoRun | EvalRun):
        rows = run.ppo.prompts_per_step if isinstance(run, PpoRun) else run.rows
        chunks = None if rows is None else -(-rows // run.rollout.chunk_prompts)
        if chunks is not None and run.rollout.actors > chunks:
            lines.append(
                f"rollout.actors: {run.rollout.actors - chunks} of {run.rollout.actors} would always be idle: the prompts "
                f"come in {chunks} chunks of rollout.chunk_prompts {run.rollout.chunk_prompts}"
            )
        if chunks is not None and run.reward.actors > chunks:
            lines.append(
                f"reward.actors: {run.reward.actors - chunks} of {run.reward.actors} would always be idle: responses "
                f"come in {chunks} chunks"
            )
    return lines


def _training(run: TrainingRun, steps: int | None) -> Iterator[str]:
    every = run.checkpoint.every
    if steps is not None and every >= steps:
        yield (
            f"checkpoint.every: {every}, and the run has {steps} steps: a run that is cut off would start from the "
            f"beginning"
        )
    if zero_stage(run.learner.deepspeed) and run.learner.max_workers == 1:
        zero = (run.learner.deepspeed or {}).get("zero_optimization") or {}
        if not zero.get("offload_optimizer") and not zero.get("offload_param"):
            yield "learner.deepspeed: ZeRO shards over workers, and there is one: it saves nothing"


def _supervised(run: SupervisedRun) -> Iterator[str]:
    training = run.training
    if training.get("max_steps", 0) > 0 and "num_train_epochs" in training:
        yield f"training.num_train_epochs: does nothing beside training.max_steps {training['max_steps']}"
    if training.get("eval_strategy", "no") == "no":
        for key in ("eval_steps", "eval_delay"):
            if key in training:
                yield f"training.{key}: does nothing with training.eval_strategy: no"
    if run.data.eval is None:
        for key in ("per_device_eval_batch_size", "eval_accumulation_steps", "eval_on_start", "bf16_full_eval"):
            if training.get(key):
                yield f"training.{key}: does nothing without data.eval"
    if training.get("lr_scheduler_type") == "constant" and training.get("warmup_steps"):
        yield "training.warmup_steps: does nothing with lr_scheduler_type: constant (constant_with_warmup uses it)"


def _ppo(run: PpoRun) -> Iterator[str]:
    ppo = run.ppo
    if run.eval is not None and run.eval.every > ppo.steps:
        yield f"eval.every: {run.eval.every}, and the run has {ppo.steps} steps: it would never evaluate"
    if run.reference.path is not None and ppo.kl.coef == 0:
        yield "reference.path: changes only the metric objective/kl, as ppo.kl.coef is 0"
    if ppo.value_coef == 0:
        yield "ppo.value_coef: is 0: the value function would never learn"
    if ppo.epochs * ppo.minibatches == 1 and ppo.max_lag == 0:
        yield "ppo.clip_range: clips nothing: with one optimizer step a batch the ratio is always 1"
