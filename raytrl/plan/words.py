"""A run in words: what would run, how large a step is, how many steps there are."""

import statistics

from raytrl.config.foreign.deepspeed import zero_stage
from raytrl.config.runs.base import Run, TrainingRun
from raytrl.config.runs.evaluation import EvalRun
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.sections.engines import engine_words
from raytrl.plan.cluster import amounts
from raytrl.plan.config_shapes import ModelShape
from raytrl.plan.memory import microbatch_tokens
from raytrl.plan.where import joins_cluster
from raytrl.rundir import RunDirectory


def describe(run: SupervisedRun, rows: dict[str, int]) -> str:
    """The table of what will run where, and how large a step is, in words."""
    stage = zero_stage(run.learner.deepspeed)
    workers = run.learner.workers
    how = "one process" if workers == 1 and stage is None else "DDP" if stage is None else f"DeepSpeed ZeRO-{stage}"
    batch, accumulate = run.rows_a_pass, run.accumulated
    where = run.cluster.address or ("the Ray job's cluster" if joins_cluster(run) else "a local Ray on this machine")
    least, most = run.learner.min_workers, run.learner.max_workers
    lines = [
        f"model    {run.model.path or 'a new ' + str((run.model.config or {}).get('model_type'))}"
        f"{', LoRA r=' + str(run.lora.get('r', 8)) if run.lora is not None else ', full fine-tuning'}",
        f"data     {rows['train']:,} rows" + (f", {rows['eval']:,} to evaluate on" if "eval" in rows else ""),
        f"workers  {workers if least == most else f'{least} to {most}'} x {amounts(run.learner.resources)}, {how}, on {where}",
        f"batch    {batch * accumulate * most} rows a step = {batch} a worker"
        f"{f' x {accumulate} accumulated' if accumulate > 1 else ''} x {most} workers"
        f"{'' if least == most else '; fewer accumulate more'}",
    ]
    return "\n".join(lines)


def describe_ppo(run: PpoRun, data: dict[str, str]) -> str:
    """The table of what will run where, and how large a step is, in words."""
    learner, stage = run.learner, zero_stage(run.learner.deepspeed)
    workers = learner.max_workers
    how = f"DeepSpeed ZeRO-{stage}" if stage else "one process" if workers == 1 else "data parallel"
    where = run.cluster.address or ("the Ray job's cluster" if joins_cluster(run) else "a local Ray on this machine")
    sources = [f"{source.weight:g} x {source.name}" for source in run.reward.sources]
    ppo, tuning = run.ppo, "full fine-tuning" if run.lora is None else f"LoRA r={run.lora.get('r', 8)}"
    kl = f"KL coefficient {ppo.kl.coef:g}" + (f", target {ppo.kl.target:g}" if ppo.kl.target else "")
    lines = [
        f"model    {run.model.path}, {tuning}",
        f"data     {data['data.train']}" + (f"; evaluation: {data['data.eval']}" if "data.eval" in data else ""),
        f"reward   {' + '.join(sources)}",
        f"learner  {workers} x {amounts(learner.resources)}, {how}, on {where}",
        f"rollout  {run.rollout.actors} x {amounts(run.rollout.resources)}, {engine_words(run.asked)}",
        f"scoring  {run.reward.actors} x {amounts(run.reward.resources)}",
        f"step     {ppo.batch_size} responses, {ppo.epochs} epochs of {ppo.minibatches} minibatches; {ppo.steps} steps; {kl}",
    ]
    return "\n".join(lines)


def total_steps(run: Run, rows: dict[str, int]) -> int | None:
    """Optimizer steps (supervised) or PPO steps of the whole run; None where the data are not here to be counted."""
    if isinstance(run, PpoRun):
        return run.ppo.steps
    if not isinstance(run, SupervisedRun):
        return None
    if int(run.training.get("max_steps", -1)) > 0:
        return int(run.training["max_steps"])
    per_epoch = _steps_per_epoch(run, rows)
    return None if per_epoch is None else -(-int(per_epoch * 100 * _epochs(run)) // 100)


def _epochs(run: SupervisedRun) -> float:
    return float(run.native("num_train_epochs"))


def _steps_per_epoch(run: SupervisedRun, rows: dict[str, int]) -> int | None:
    """As transformers' Trainer counts them; packing makes fewer and longer rows, how many is known only afterwards."""
    count = rows.get("data.train")
    if count is None or run.training.get("packing"):
        return None
    batch = run.rows_a_pass * run.learner.max_workers
    batches = count // batch if run.training.get("dataloader_drop_last") else -(-count // batch)
    return max(1, -(-batches // run.accumulated))


def words_of(run: Run, shapes: dict[str, ModelShape], rows: dict[str, int], steps: int | None) -> list[tuple[str, str]]:
    words = []
    for key, shape in shapes.items():
        name = "model" if key == "model.path" else key
        words.append((name, f"{shape.architecture}, {_millions(shape.parameters)} parameters, {shape.layers} layers"))
    if isinstance(run, TrainingRun):
        stage, tuned = zero_stage(run.learner.deepspeed), "full fine-tuning" if run.lora is None else "LoRA"
        how = f"DeepSpeed ZeRO-{stage}" if stage else "data parallel" if run.learner.max_workers > 1 else "one process"
        words.append(("training", f"{tuned}, {how}"))
    if isinstance(run, PpoRun | EvalRun):
        cache = " (key-value cache: what is left of its share of the GPU)"
        on_gpu = run.rollout.engine == "vllm" and run.rollout.uses_gpu
        words.append(("rollout", engine_words(run.asked) + (cache if on_gpu else "")))
    if isinstance(run, PpoRun):
        by = "NCCL" if run.learner.uses_gpu else "gloo"
        ways = {"object_store": "through the object store", "broadcast": f"by broadcast ({by}) to all engines"}
        words.append(("weights", f"{ways[run.rollout.weight_transfer]}, at each step"))
    if isinstance(run, SupervisedRun):
        words += _supervised_words(run, rows, steps)
    elif isinstance(run, PpoRun):
        words += _ppo_words(run, shapes, rows)
    elif isinstance(run, EvalRun):
        there = rows.get("data.eval")
        count = min(n for n in (run.rows, there) if n is not None) if run.rows or there else "all"
        words.append(("prompts", f"{count}, in chunks of {run.rollout.chunk_prompts}"))
    if isinstance(run, TrainingRun):
        words += _former(run, steps)
    return words


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _supervised_words(run: SupervisedRun, rows: dict[str, int], steps: int | None) -> list[tuple[str, str]]:
    batch, accumulate, workers = run.rows_a_pass, run.accumulated, run.learner.max_workers
    step = batch * accumulate * workers
    accumulated = f" x {accumulate} accumulated" if accumulate > 1 else ""
    words = [
        ("step", f"{step} rows = {batch} a forward pass{accumulated} x {_workers(workers)}"),
        ("backward", "activations are recomputed" if run.recompute else "activations are kept"),
    ]
    count, per_epoch = rows.get("data.train"), _steps_per_epoch(run, rows)
    if int(run.training.get("max_steps", -1)) > 0:
        share = f", {steps * step / count:.2g} epochs of {count:,} rows" if steps and count else ""
        words.append(("steps", f"{steps:,} optimizer steps{share}"))
    elif per_epoch is not None and count is not None:
        words.append(
            ("steps", f"{steps:,} optimizer steps = {per_epoch:,} an epoch ({count:,} rows) x {_epochs(run):g}")
        )
    else:
        why = "rows are packed" if run.training.get("packing") else "the rows are not here to be counted"
        words.append(("epochs", f"{_epochs(run):g}; how many steps is not known: {why}"))
    return words


def _ppo_words(run: PpoRun, shapes: dict[str, ModelShape], rows: dict[str, int]) -> list[tuple[str, str]]:
    ppo, prompts = run.ppo, run.ppo.prompts_per_step
    per_prompt = f"{ppo.responses_per_prompt} to each of {prompts} prompts"
    updates = ppo.epochs * ppo.minibatches
    words = [
        ("step", f"{ppo.batch_size} responses, {per_prompt}, over {_counted(run.learner.max_workers)}"),
        (
            "update",
            f"{updates} optimizer steps = {ppo.epochs} epochs x {ppo.minibatches} minibatches of "
            f"{ppo.batch_size // ppo.minibatches} responses",
        ),
    ]
    if "model.path" in shapes:
        row = run.rollout.max_prompt_length + run.rollout.sampling.max_new_tokens
        tokens = microbatch_tokens(run, shapes["model.path"])
        words.append(
            (
                "microbatch",
                f"{tokens:,} tokens a forward pass: {_rows_of(tokens // row)} of at most {row} tokens, or more that are shorter",
            )
        )
    count = rows.get("data.train")
    share = f" = {ppo.steps * prompts / count:.2g} epochs of {count:,} prompts" if count else ""
    words.append(
        ("steps", f"{ppo.steps:,}; {ppo.steps * ppo.batch_size:,} responses, {ppo.steps * prompts:,} prompts{share}")
    )
    return words


def _rows_of(count: int) -> str:
    return "one row" if count == 1 else f"{count} rows"


def _counted(workers: int) -> str:
    return "one learner worker" if workers == 1 else f"{workers} learner workers"


def _workers(count: int) -> str:
    return "one worker" if count == 1 else f"{count} workers"


def _former(run: TrainingRun, steps: int | None) -> list[tuple[str, str]]:
    """Seconds a step, from what the run directory holds of an earlier start."""
    rows = RunDirectory(run.output_dir, run.name).rows("metrics.jsonl")
    seconds = [float(row["time/step_s"]) for row in rows if "time/step_s" in row]
    if not seconds:
        return []
    typical = statistics.median(seconds[-50:])
    whole = f"; {steps:,} steps: {_duration(typical * steps)}" if steps else ""
    return [("time", f"{typical:.2f} s a step, the median of the last {len(seconds[-50:])} of an earlier start{whole}")]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def describe_eval(run: EvalRun, run_dir: RunDirectory, prompts: str) -> str:
    sources = [f"{source.weight:g} x {source.name}" for source in run.reward.sources]
    rows = "all rows" if run.rows is None else f"the first {run.rows} rows"
    how = "greedy" if run.greedy else f"sampled at temperature {run.rollout.sampling.temperature:g}"
    lines = [
        *(f"{key:<9}{path}" for key, (path, _) in run.models.items()),
        f"data     {rows} of {prompts}; {how}",
        f"reward   {' + '.join(sources)}",
        f"rollout  {run.rollout.actors} x {amounts(run.rollout.resources)}, {engine_words(run.asked)}",
        f"scoring  {run.reward.actors} x {amounts(run.reward.resources)}",
        f"output   {run_dir}",
    ]
    if run.reference.path is not None:
        lines.insert(-1, f"KL to    {run.reference.path}")
    return "\n".join(lines)
