"""`raytrl plan`: what a run file would run where, whether it fits, and how large a step is. Starts nothing."""

import os
import statistics
from collections.abc import Sequence

from raytrl.config.deepspeed import zero_stage
from raytrl.config.engines import engine_words
from raytrl.config.eval_run import EvalRun
from raytrl.config.load import LoadedRun
from raytrl.config.ppo_run import PpoRun
from raytrl.config.runs import DataSource, Run, SupervisedRun, TrainingRun
from raytrl.errors import ConfigError, DataError
from raytrl.launch.capacity import CERTAINTY, Load, Room, check_memory
from raytrl.launch.evaluate import eval_need
from raytrl.launch.idle import idle_settings
from raytrl.launch.placement import ADDED, Cluster, Need, Node, amounts, described_nodes
from raytrl.launch.session import THIS_MACHINE, cluster_of, prepare_environment
from raytrl.launch.train import kind_of
from raytrl.records import Plan, PlannedRole
from raytrl.roles.memory import GIB, Estimate, estimates, microbatch_tokens
from raytrl.roles.model_shape import ModelShape
from raytrl.roles.shapes import read_shapes
from raytrl.rundir import RunDirectory


def plan(loaded: LoadedRun, cluster: Sequence[str], models: str) -> Plan:
    """Works out the plan of a run.

    Args:
        cluster: descriptions of nodes (`placement.described_nodes`); empty: the cluster that the run would join is
            asked, or this machine is looked at.
        models: a folder that holds `<path>/config.json` of models that are not on this machine.

    Raises:
        ConfigError: it cannot run there; the message has the numbers and the nearest change that would fit.
    """
    run = loaded.run
    prepare_environment()
    need = need_of(run)
    room = Room.on(_cluster(run, cluster), need)
    shapes, problems = read_shapes(run, models)
    rows, missing = _rows(run)
    problems += missing
    if problems and room.where == THIS_MACHINE:
        raise ConfigError("\n".join(problems))
    notes = [f"not known here, so not checked: {problem}" for problem in problems]
    found, tight = check_memory(run, room, shapes)
    steps = total_steps(run, rows)
    if isinstance(run, TrainingRun) and run.learner.min_workers < run.learner.max_workers:
        least, most = run.learner.min_workers, run.learner.max_workers
        notes.append(f"learner.workers: {least} is the least that is needed; up to {most} where there is room")
    notes += [*tight, *room.awaited(run), *(f"does nothing: {line}" for line in idle_settings(run, steps))]
    return Plan(
        where=f"{room.where}: {_sum_of([node for node in room.nodes if not node.name.startswith(ADDED)])}",
        roles=tuple(_roles(room, estimates(run, shapes))),
        words=tuple(_words(run, shapes, rows, steps)),
        shared=tuple(_shared(found)),
        notes=tuple(notes),
    )


def _cluster(run: Run, described: Sequence[str]) -> Cluster:
    if described:
        return Cluster(described_nodes(described), "the described cluster")
    with cluster_of(run) as found:  # asked once: what follows needs no cluster
        return found


def need_of(run: Run) -> Need:
    """What all processes of a run take."""
    if isinstance(run, TrainingRun):
        return kind_of(run).need
    if isinstance(run, EvalRun):
        return eval_need(run)
    base = getattr(run, "base", "")
    raise ConfigError(
        f"kind: a {run.kind} run is planned by what it runs; found: {run.kind!r}; expected: raytrl plan {base}"
    )


def _sum_of(nodes: Sequence[Node]) -> str:
    kinds: dict[str, int] = {}
    for node in nodes:
        parts = [amounts({n: a for n, a in node.resources.items() if a and n in ("CPU", "GPU")})]
        parts += [f"{node.gpu_gib:.0f} GiB a GPU"] if node.gpu_gib and node.resources.get("GPU") else []
        parts += [f"{node.ram_gib:.0f} GiB RAM"] if node.ram_gib else []
        kinds[", ".join(parts)] = kinds.get(", ".join(parts), 0) + 1
    return "; ".join(f"{count} x {text}" for text, count in kinds.items())


def _roles(room: Room, found: dict[str, Estimate]) -> list[PlannedRole]:
    by_name, roles = {node.name: node for node in room.nodes}, []
    for group in room.need.groups:
        estimate, places = found.get(group.key), room.placement.places.get(group.key, {})
        gpus = group.resources.get("GPU", 0.0)
        there = [by_name[name].gpu_gib if gpus else by_name[name].ram_gib for name in places]
        known = [size for size in there if size is not None]
        share = (estimate.share if estimate is not None and gpus else 0.0) or 1.0
        roles.append(
            PlannedRole(
                key=group.key,
                count=group.count,
                each=amounts(group.resources),
                nodes=places,
                memory_gib={} if estimate is None else {n: size / GIB for n, size in estimate.parts.items()},
                device="GPU" if gpus else "RAM",
                room_gib=min(known) * share if known and len(known) == len(there) else None,
                host_gib=0.0 if estimate is None else estimate.host / GIB,
            )
        )
    return roles


def _shared(found: Sequence[Load]) -> list[tuple[str, float, float | None]]:
    """What all processes of a node take together: of its RAM, and of GPUs that they share."""
    together = [load for load in found if not load.what.startswith("each of ")]
    return [(load.what.removeprefix("all processes on the "), load.taken, load.there) for load in together]


def _rows(run: Run) -> tuple[dict[str, int], list[str]]:
    """Rows of each local dataset by its key, and what is missing; nothing is downloaded to count it."""
    data = getattr(run, "data", None)
    rows, problems = dict[str, int](), list[str]()
    for name in ("train", "eval"):
        source: DataSource | None = getattr(data, name, None)
        if source is None:
            continue
        if source.data_files is None and source.data_dir is None and not os.path.isdir(source.path):
            continue  # a hub id: to count its rows is to download them
        from raytrl.data import load_data  # datasets: 1.3 s

        try:
            rows[f"data.{name}"] = len(load_data(source, f"data.{name}"))
        except DataError as error:
            problems.append(str(error))
    return rows, problems


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


def _words(run: Run, shapes: dict[str, ModelShape], rows: dict[str, int], steps: int | None) -> list[tuple[str, str]]:
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
        on_gpu = run.rollout.engine == "vllm" and run.rollout.resources.get("GPU")
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


RULE = (
    f"Memory is estimated for rows as long as the file allows, and is refused only where {1 / CERTAINTY:.0%} of the "
    f"estimate would not fit."
)
