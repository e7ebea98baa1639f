"""What is checked before anything is started, and what is then going to run where."""

import importlib.util
import os
import tempfile

from raytrl.config.deepspeed import zero_stage
from raytrl.config.runs import SupervisedRun, TokenizerSpec, TrainingRun
from raytrl.errors import ConfigError
from raytrl.launch.placement import amounts
from raytrl.launch.session import joins_cluster
from raytrl.roles.device import check_cpu
from raytrl.rundir import RunDirectory


def preflight(run: SupervisedRun, run_dir: RunDirectory) -> tuple[dict[str, int], bool]:
    """Checks data, tokenizer and model before anything is started, and trains the tokenizer where one is asked for.

    Returns:
        Rows by split, and whether a trained tokenizer lies in the run directory.
    """
    from raytrl.data import check_columns, conversation_of, load_data, texts_of  # datasets: 1.3 s

    check_trackers(run)
    if run.model.path is not None:
        check_model_path(run.model.path, "model.path", run.model.revision)
    train_rows = load_data(run.data.train, "data.train")
    columns = check_columns(train_rows, run, "data.train")
    rows = {"train": len(train_rows)}
    if run.data.eval is not None:
        eval_rows = load_data(run.data.eval, "data.eval")
        check_columns(eval_rows, run, "data.eval")
        rows["eval"] = len(eval_rows)
    from raytrl.roles.tokenizer import check_tokenizer, load_tokenizer, train_tokenizer

    spec = run.model.tokenizer
    if isinstance(spec, TokenizerSpec):
        if run_dir.exists("tokenizer/tokenizer_config.json"):
            with run_dir.local_copy("tokenizer") as folder:
                tokenizer = load_tokenizer(folder, None, False)
        else:
            tokenizer = train_tokenizer(texts_of(train_rows, columns), spec)
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(f"{folder}/tokenizer")
                run_dir.store(f"{folder}/tokenizer", "tokenizer")
    else:
        try:
            tokenizer = load_tokenizer(spec or str(run.model.path), run.model.revision, run.model.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.tokenizer: cannot be loaded: {str(error).splitlines()[0]}") from None
    check_tokenizer(tokenizer, run, conversation_of(train_rows, columns))
    if not run.learner.uses_gpu and not joins_cluster(run):
        check_cpu(run)
    return rows, isinstance(spec, TokenizerSpec)


def check_trackers(run: TrainingRun) -> None:
    """Every tracker of `report_to` is installed; ConfigError names the one that is not."""
    for tracker in run.report_to:
        if tracker == "tensorboard" or tracker == "all":
            continue
        package = {"azure_ml": "azureml", "flyte": "flytekit"}.get(tracker, tracker)
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"report_to: {tracker!r} is not installed; expected: `pip install {package}`, or leave it out"
            )


def check_model_path(path: str, key: str, revision: str | None = None, adapters: bool = False) -> None:
    """A local folder with a model in it, or a hub id that is cached or can be reached.

    Args:
        adapters: whether a folder with an adapter alone will do.

    Raises:
        ConfigError: naming the key.
    """
    if os.path.isdir(path):
        is_adapter = os.path.isfile(os.path.join(path, "adapter_config.json"))
        if not os.path.isfile(os.path.join(path, "config.json")) and not (adapters and is_adapter):
            found = "an adapter; use the model in its folder merged/" if is_adapter else "a folder without config.json"
            raise ConfigError(f"{key}: found: {path!r}, {found}; expected: a Hugging Face model folder")
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(path, "config.json", revision=revision), timeout=3)
    except HFValidationError:
        raise ConfigError(f"{key}: no such folder; found: {path!r} (nor can it be a hub id)") from None
    except Exception as error:  # offline, gated, missing: each has its own class in each version of the client
        raise ConfigError(
            f"{key}: {path!r} cannot be had: no such folder, not in the local cache, and the hub says: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None


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
