"""SFT, reward modelling and DPO: one TRL trainer in a training process, the same code for every kind."""

import importlib
import os
import time
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from raytrl.config.foreign.deepspeed import for_trainer
from raytrl.config.foreign.native import native_fields
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.sections.data import DataSource
from raytrl.config.sections.model import TokenizerSpec
from raytrl.data import choose_columns, load_data
from raytrl.errors import DataError, NonFiniteError
from raytrl.records.progress import Progress, ProgressKind
from raytrl.roles.context import WorkerContext
from raytrl.roles.device import peak_memory_gib
from raytrl.roles.job import Job
from raytrl.roles.models.adapters import merge_adapter
from raytrl.roles.models.base import labels_of, make_base, needs_base, torch_dtype
from raytrl.roles.models.card import write_model_card
from raytrl.roles.models.finite import not_finite
from raytrl.roles.models.loading import look_at
from raytrl.roles.models.sharded import prepare_deepspeed
from raytrl.roles.models.tokenizer import load_tokenizer
from raytrl.rundir import RunDirectory

_KEPT_BEFORE = (
    "the checkpoint before it is kept; expected: a lower training.learning_rate, or rows without extreme values"
)


class TrainerReporter(TrainerCallback):  # type: ignore[misc]  # transformers' class is untyped
    """Sends each logged step to the driver, and hands each checkpoint to the context as soon as all ranks wrote it."""

    def __init__(self, context: WorkerContext, preparing: ExitStack) -> None:
        """`preparing`: is closed when the first step begins."""
        self._context, self._preparing = context, preparing
        self._since = 0.0
        self._since_step = 0
        self.last_loss = float("nan")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        losses = [row["loss"] for row in state.log_history if "loss" in row]
        self.last_loss = losses[-1] if losses else self.last_loss
        workers = {"workers": float(self._context.world_size)}
        last_step = max(state.max_steps, state.global_step)
        self._context.progress(Progress("start", state.global_step, last_step, metrics=workers))
        self._restart_clock(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._preparing.close()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._context.beat()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._context.beat()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._context.beat()

    def _restart_clock(self, state: TrainerState) -> None:
        self._since, self._since_step = time.perf_counter(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        metrics = {key: float(value) for key, value in logs.items() if isinstance(value, int | float)}
        if "loss" in metrics:
            if not all(map(_is_finite, (metrics["loss"], metrics.get("grad_norm", 0.0)))):
                raise NonFiniteError(
                    f"step {state.global_step}: the loss or its gradient is not finite; found: loss {metrics['loss']}, "
                    f"grad_norm {metrics.get('grad_norm')}; {_KEPT_BEFORE}"
                )
            steps = max(1, state.global_step - self._since_step)
            metrics["time/step_s"] = (time.perf_counter() - self._since) / steps
            metrics["memory/peak_gib"] = peak_memory_gib()
            self.last_loss = metrics["loss"]
            self._restart_clock(state)
            self._send("step", state, metrics)
        elif any(key.startswith("eval_") for key in metrics):
            self._send("eval", state, {key: value for key, value in metrics.items() if not key.endswith("_per_second")})
            self._restart_clock(state)

    def _send(self, kind: ProgressKind, state: TrainerState, metrics: dict[str, float]) -> None:
        if self._context.rank == 0:
            self._context.progress(Progress(kind, state.global_step, state.max_steps, metrics=metrics))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **has: Any) -> None:
        # A loss is looked at where it is logged, which may be much later than a checkpoint.
        if broken := not_finite(has["model"], has["optimizer"]):
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise NonFiniteError(f"step {state.global_step}: not finite: {', '.join(broken[:3])}{more}; {_KEPT_BEFORE}")
        self._context.barrier()  # every rank's files of this step are on disk
        folder = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
        self._context.commit(state.global_step, folder if self._context.local_rank == 0 else None)
        self._send("checkpoint", state, {})
        self._restart_clock(state)


def _is_finite(value: float) -> bool:
    return value - value == 0.0


def train(job: Job[SupervisedRun], context: WorkerContext) -> dict[str, float]:
    """Runs one rank from the last committed checkpoint to the finished model.

    Returns:
        The metrics of the last log line and of the final evaluation (the same on every rank).
    """
    run = job.run
    run_dir = RunDirectory(run.output_dir, run.name)
    on_gpu = run.learner.uses_gpu
    _phase(context, "loading libraries")
    with ExitStack() as stack:
        preparing = stack.enter_context(ExitStack())
        preparing.enter_context(context.beating())  # rows are tokenised in one call
        trl = importlib.import_module("trl")
        config_class, trainer_class = getattr(trl, run.native_class.name), getattr(trl, str(run.trl_trainer))
        if run.learner.deepspeed is not None:
            prepare_deepspeed(on_gpu)
        _phase(context, "loading model and data")
        tokenizer = _tokenizer(job, run_dir, stack)
        base = _base(job, run_dir, tokenizer, context, stack)
        if not os.path.isdir(base):  # of the hub: it was not here before the start, and TRL asks nothing
            own = {"revision": run.model.revision, "trust_remote_code": run.model.trust_remote_code}
            look_at(base, run.head, "model.path", new_head=run.head == "score", **own, **labels_of(run))
        # After the base model is made: under ZeRO-3 the arguments switch on partitioned construction for all models.
        arguments = config_class(**training_arguments(run, context, on_gpu))
        arguments.model_init_kwargs = _model_init(run, base, on_gpu)
        reporter = TrainerReporter(context, preparing)
        rows = {"data.train": _chosen(run, run.data.train, "data.train")}
        if run.data.eval is not None:
            rows["data.eval"] = _chosen(run, run.data.eval, "data.eval")
        trainer = trainer_class(
            model=base,
            args=arguments,
            train_dataset=rows["data.train"],
            eval_dataset=rows.get("data.eval"),
            processing_class=tokenizer,
            peft_config=_lora(run),
            callbacks=[reporter],
        )
        _drop_printing(trainer)
        if not run.training.get("packing"):  # which makes other rows of them
            for key, given in rows.items():
                kept = trainer.train_dataset if key == "data.train" else trainer.eval_dataset
                _tell_left_out(key, len(given), len(kept), arguments.max_length, context)
        _check_batches(run, trainer)
        _phase(context, "starting")
        checkpoint = stack.enter_context(context.restored())
        if checkpoint is not None:
            _train_no_further_than_asked(trainer, checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        if not trainer.state.global_step:
            raise DataError("data.train: the trainer took no step, whatever the reason: there is no model to keep")
        metrics = {"loss": reporter.last_loss}
        if run.data.eval is not None:
            metrics |= {k: float(v) for k, v in trainer.evaluate().items() if not k.endswith("_per_second")}
        with context.beating():
            _save(job, run_dir, trainer, base, metrics, context)
        context.barrier()  # no rank leaves before the model is in place
    return {key: value for key, value in metrics.items() if _is_finite(value)}


def _check_batches(run: SupervisedRun, trainer: Any) -> None:
    """What packing and `max_length` have left fills a batch.

    Raises:
        DataError: it does not, and the trainer would take no step, or evaluate nothing.
    """
    left = {"data.train": trainer.train_dataset, "data.eval": trainer.eval_dataset}
    if problems := run.without_batch({key: len(rows) for key, rows in left.items() if rows is not None}):
        raise DataError("\n".join(problems))


def _chosen(run: SupervisedRun, source: DataSource, where: str) -> Any:
    """The rows with the columns that are trained on alone: TRL would go by any other that it knows."""
    dataset = load_data(source, where)
    return dataset.select_columns(list(choose_columns(dataset, run, where).columns))


def _train_no_further_than_asked(trainer: Any, checkpoint: str) -> None:
    """A checkpoint of the last step of `max_steps` is loaded, and no more: transformers would take one step beyond it."""
    state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    if 0 < trainer.args.max_steps <= state.global_step:
        trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0


def _tell_left_out(key: str, given: int, kept: int, max_length: int | None, context: WorkerContext) -> None:
    """TRL leaves out what `max_length` is too short for, and does not say so.

    Raises:
        DataError: nothing is left.
    """
    why = f"longer than training.max_length {max_length} allows"
    if not kept:
        raise DataError(f"{key}: all {given} rows are {why}; expected: a larger training.max_length, or shorter rows")
    if kept < given and context.rank == 0:
        context.progress(Progress("notice", text=f"{key}: {given - kept} of {given} rows are left out: {why}"))


def _phase(context: WorkerContext, text: str) -> None:
    if context.rank == 0:
        context.progress(Progress("phase", text=text))


def training_arguments(run: SupervisedRun, context: WorkerContext, on_gpu: bool) -> dict[str, Any]:
    """Keyword arguments of TRL's config class: the run file's `training`, and what raytrl owns."""
    computes_half = on_gpu or run.model.dtype == "bfloat16"
    values: dict[str, Any] = {"logging_steps": 1, "bf16": computes_half and not run.training.get("fp16", False)}
    values["logging_nan_inf_filter"] = False  # transformers' default writes 0.0 in place of NaN
    if not on_gpu:
        values |= {"use_cpu": True, "dataloader_pin_memory": False}
    # Two names of one switch: TRL's default sets the old one, which newer transformers answer with a warning.
    names = [n for n in ("activation_checkpointing", "gradient_checkpointing") if n in native_fields(run.native_class)]
    values |= {key: value for key, value in run.training.items() if key != "model_init_kwargs"}
    values |= dict.fromkeys(names, run.recompute)
    values |= {
        "output_dir": context.scratch,
        "gradient_accumulation_steps": run.accumulation(context.world_size),
        "seed": run.seed,
        "run_name": run.name,
        "report_to": run.report_to,
        "save_strategy": "steps",
        "save_steps": run.checkpoint.every,
        "disable_tqdm": True,
        "trust_remote_code": run.model.trust_remote_code,
    }
    if run.learner.deepspeed is not None:
        values["deepspeed"] = for_trainer(run.learner.deepspeed)
    return values


def _tokenizer(job: Job[SupervisedRun], run_dir: RunDirectory, stack: ExitStack) -> PreTrainedTokenizerBase:
    model = job.run.model
    if isinstance(model.tokenizer, TokenizerSpec):  # the driver trained it
        place = stack.enter_context(run_dir.local_copy("tokenizer"))
    else:
        place = model.tokenizer or str(model.path)
    tokenizer = load_tokenizer(place, model.revision, model.trust_remote_code)
    if model.pad_token is not None:
        tokenizer.add_special_tokens({"pad_token": model.pad_token})
    return tokenizer


def _base(
    job: Job[SupervisedRun], run_dir: RunDirectory, tokenizer: Any, context: WorkerContext, stack: ExitStack
) -> str:
    run = job.run
    if not needs_base(run):
        return str(run.model.path)
    if context.rank == 0 and not run_dir.exists("base/tokenizer_config.json"):
        folder = os.path.join(context.scratch, "base")
        make_base(run, tokenizer, folder)
        run_dir.store(folder, "base")
    context.barrier()
    return stack.enter_context(run_dir.local_copy("base"))


def _model_init(run: SupervisedRun, base: str, on_gpu: bool) -> dict[str, Any]:
    """What TRL loads the model with: the dtype that its weights are held in."""
    dtype = torch_dtype(run.model.dtype, on_gpu)
    if run.holds_float32:
        dtype = torch.float32  # at a learning rate of 1e-5 a bfloat16 weight would round every update away
    values: dict[str, Any] = {"dtype": dtype} | dict(run.training.get("model_init_kwargs") or {})
    if run.model.revision is not None and base == run.model.path:
        values["revision"] = run.model.revision
    return values


def _lora(run: SupervisedRun) -> Any:
    if run.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="SEQ_CLS" if run.head == "score" else "CAUSAL_LM", **run.lora)


def _drop_printing(trainer: Any) -> None:
    """Logs reach the terminal through the driver's progress display, once."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _save(
    job: Job[SupervisedRun],
    run_dir: RunDirectory,
    trainer: Any,
    base: str,
    metrics: dict[str, float],
    context: WorkerContext,
) -> None:
    """Stores model/ (and merged/ beside an adapter). All ranks call it: ZeRO-3 gathers the weights from all."""
    _phase(context, "saving model")
    folder = os.path.join(context.scratch, "model")
    trainer.save_model(folder)
    context.barrier()
    if context.rank != 0:
        return
    tokenizer = trainer.processing_class
    if job.run.lora is not None:
        merge_adapter(job.run, base, folder, tokenizer, os.path.join(folder, "merged"))
    _drop_leftovers(folder)
    write_model_card(folder, job.run, job.command, job.versions, trainer.state.global_step, metrics)
    run_dir.store(folder, "model")


def _drop_leftovers(folder: str) -> None:
    for name in ("training_args.bin", "optimizer.pt"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            os.remove(path)
