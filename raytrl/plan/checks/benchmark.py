"""What is checked before benchmarks start."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raytrl.config.runs.benchmark import BenchmarkRun
from raytrl.errors import ConfigError, NotHadError
from raytrl.plan.checks.common import Facts, Rows, check_run, tokenizer_at
from raytrl.plan.checks.rows import in_no_hurry
from raytrl.plan.checks.weights import check_vocabulary
from raytrl.plan.inputs import Inputs, digests
from raytrl.roles.benchmark.files import files_of
from raytrl.roles.benchmark.tasks import Tasks, check_installed, load_tasks, offline, own_files
from raytrl.roles.models.positions import positions_at


@dataclass(frozen=True)
class Ready:
    """What a driver needs for the benchmarks."""

    tasks: Tasks
    tokenizers: Mapping[str, Any]  # by key of the model
    chat: Mapping[str, bool]  # whether its chat template is applied
    dtype: str


def check_benchmark(run: BenchmarkRun, before_last: Callable[[], None] = in_no_hurry) -> tuple[Ready, Facts]:
    """Checks models, tasks and tokenizers; the tasks are loaded with their data.

    Args:
        before_last: called when what fails most has passed.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    check_installed()
    for file in own_files(run.benchmark):  # before torch is imported to look at the models
        files_of(file)
    with offline(run.benchmark.offline):
        try:
            embeddings = check_run(run)
        except NotHadError as error:
            if not run.benchmark.offline:
                raise
            raise ConfigError(f"{error}; benchmark.offline is true, false downloads models, too") from None
        tasks = load_tasks(run.benchmark)
        before_last()
        return _ready(run, tasks, embeddings)


def try_tasks(run: BenchmarkRun, rows: Rows, embeddings: Mapping[str, int]) -> Facts:
    """As `check_benchmark` for `raytrl plan`, which downloads nothing.

    Raises:
        ConfigError: a task, or a model's tokenizer, cannot be used.
    """
    check_installed()
    with offline(True):
        try:
            tasks = load_tasks(run.benchmark)
        except ConfigError as error:
            if run.benchmark.offline:
                raise
            return Facts(notices=(f"not known here, so not checked: {error}",))
        return _ready(run, tasks, embeddings)[1]


def made_from(run: BenchmarkRun) -> Inputs:
    """Fingerprints of the user's own task files, the Python that they call and their data."""
    try:
        files = own_files(run.benchmark)
    except ConfigError:  # the checks say so
        return {}
    found = digests([path for file in files for path in files_of(file)])
    return {"benchmark.tasks": found} if found else {}


def _ready(run: BenchmarkRun, tasks: Tasks, embeddings: Mapping[str, int]) -> tuple[Ready, Facts]:
    from raytrl.roles.models.base import dtype_name  # torch, which the tokenizers import anyway

    section = run.benchmark
    tokenizers, chat, notices = dict[str, Any](), dict[str, bool](), list[str]()
    for key, (path, place) in run.evaluated.items():
        tokenizers[key] = tokenizer_at(place, None, run.model.trust_remote_code)
        check_vocabulary(tokenizers[key], embeddings.get("model.path" if key == "model" else key), key)
        if section.max_length is not None:
            positions = positions_at(path, None, run.model.trust_remote_code, key)
            if positions is not None and section.max_length > positions.most:
                raise ConfigError(
                    f"benchmark.max_length: {key} takes fewer tokens; found: {section.max_length}; expected: at most "
                    f"{positions.most}"
                )
        has_template = bool(tokenizers[key].chat_template)
        if section.chat is True and not has_template:
            raise ConfigError(
                f"benchmark.chat: the tokenizer has no chat template; found: true, and {place!r}; expected: auto or false"
            )
        chat[key] = has_template if section.chat == "auto" else section.chat
    if len(set(chat.values())) > 1:
        notices.append(
            f"benchmark.chat: one model is asked through its chat template and the other is not ({_chat_words(chat)}): they are "
            f"asked differently; benchmark.chat: false asks both alike"
        )
    dtype = dtype_name(run.model.dtype, run.uses_gpu)
    return Ready(tasks, tokenizers, chat, dtype), Facts(notices=notices, found=_words(run, tasks, chat, dtype))


def _words(run: BenchmarkRun, tasks: Tasks, chat: Mapping[str, bool], dtype: str) -> list[tuple[str, str]]:
    names, count = tasks.names, tasks.documents(run.benchmark.limit)
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    words = [("tasks", f"{len(names)}, with {count:,} documents: {shown}"), ("chat template", _chat_words(chat))]
    words.append(("computes in", dtype))
    if python := list(dict.fromkeys(path for file in tasks.files for path in file.python)):
        words.append(
            ("runs Python", f"{', '.join(python)}: !function of task files, in the driver, with this user's rights")
        )
    return words


def _chat_words(chat: Mapping[str, bool]) -> str:
    said = {key: "applied" if is_applied else "not applied" for key, is_applied in chat.items()}
    return (
        next(iter(said.values())) if len(set(said.values())) == 1 else ", ".join(f"{k}: {v}" for k, v in said.items())
    )
