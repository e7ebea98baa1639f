"""What is checked, and made ready, before SFT, reward modelling or DPO starts."""

import tempfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.sections.model import TokenizerSpec
from raytrl.errors import ConfigError
from raytrl.plan.checks.common import Facts, Rows, check_rows, check_run, check_trackers, load_all, tokenizer_at
from raytrl.plan.checks.rows import Tell, go_through, in_no_hurry, in_silence
from raytrl.plan.checks.weights import check_vocabulary
from raytrl.rundir import RunDirectory

if TYPE_CHECKING:
    from raytrl.data import Taken


def prepare_supervised(
    run: SupervisedRun,
    run_dir: RunDirectory,
    *,
    tries_rows: bool = True,
    tell: Tell = in_silence,
    before_last: Callable[[], None] = in_no_hurry,
) -> Facts:
    """Checks data, tokenizer and model, and trains the tokenizer where one is asked for.

    Args:
        run_dir: where a trained tokenizer is read from, or put.
        tries_rows: False where a sweep has tried them for all its runs.
        tell: hears how far it is with many rows.
        before_last: called before what takes longest and fails least: models are read, rows are tried.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    from raytrl.data import texts_of  # datasets: 1.3 s

    check_trackers(run)
    embeddings = check_run(run)
    rows = load_all(run)
    taken = _checked(run, rows)
    counts = {key: len(dataset) for key, dataset in rows.items()}
    check_rows(run, counts)
    before_last()
    from raytrl.roles.models.tokenizer import load_tokenizer, train_tokenizer

    spec = run.model.tokenizer
    if isinstance(spec, TokenizerSpec):
        if run_dir.exists("tokenizer/tokenizer_config.json"):
            with run_dir.local_copy("tokenizer") as folder:
                tokenizer = load_tokenizer(folder, None, False)
        else:
            tokenizer = train_tokenizer(texts_of(rows["data.train"], taken["data.train"].layout), spec)
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(f"{folder}/tokenizer")
                run_dir.store(f"{folder}/tokenizer", "tokenizer")
    else:
        tokenizer = _own_tokenizer(run)
    _check_tokenizer(run, tokenizer, rows, taken, embeddings)
    return try_rows(run, tokenizer, rows, taken, tell) if tries_rows else Facts(counts)


def _checked(run: SupervisedRun, rows: Rows) -> dict[str, "Taken"]:
    """Which columns of each dataset are trained on; their values have been looked at."""
    from raytrl.data import check_columns, choose_columns

    for key, dataset in rows.items():
        check_columns(dataset, run, key)
    return {key: choose_columns(dataset, run, key) for key, dataset in rows.items()}


def _check_tokenizer(
    run: SupervisedRun, tokenizer: Any, rows: Rows, taken: Mapping[str, "Taken"], embeddings: Mapping[str, int]
) -> None:
    """It fits the model's embeddings and the first row.

    Raises:
        ConfigError: it does not.
    """
    from raytrl.data import conversation_of
    from raytrl.roles.models.tokenizer import check_tokenizer

    if run.model.pad_token is None:  # else the embeddings are made as many as the tokenizer needs
        check_vocabulary(tokenizer, embeddings.get("model.path"), "model.tokenizer")
    if (train := rows.get("data.train")) is not None:
        check_tokenizer(tokenizer, run, conversation_of(train, taken["data.train"].layout))


def _own_tokenizer(run: SupervisedRun) -> Any:
    model = run.model
    return tokenizer_at(str(model.tokenizer or model.path), model.revision, model.trust_remote_code)


def try_data(run: SupervisedRun, rows: Rows, embeddings: Mapping[str, int]) -> Facts:
    """Tries the rows of datasets as far as nothing has to be made for it.

    Args:
        embeddings: rows of each model that was looked at, by key.

    Raises:
        ConfigError: a row, or the tokenizer, cannot be used.
    """
    taken = _checked(run, rows)
    tokenizer = _own_tokenizer(run)
    _check_tokenizer(run, tokenizer, rows, taken, embeddings)
    return try_rows(run, tokenizer, rows, taken)


def try_rows(
    run: SupervisedRun, tokenizer: Any, rows: Rows, taken: Mapping[str, "Taken"], tell: Tell = in_silence
) -> Facts:
    """Tries every row: its chat template, its length.

    Args:
        tokenizer: the run's own; it is changed.
        taken: which columns of each dataset are trained on.

    Raises:
        DataError: a row that cannot be trained on.
    """
    from raytrl.plan.checks.told import refuse, row_notices, row_words
    from raytrl.roles.models.tokenizer import as_trained

    counts = {key: len(dataset) for key, dataset in rows.items()}
    used = {key: each.in_words() for key, each in taken.items()}
    trained = as_trained(tokenizer, run)
    if trained is None:
        untried = "rows are not tried before the start: training.chat_template_path is on the hub"
        return Facts(counts, notices=(untried,), columns=used)
    words, notices = {}, list[str]()
    for key, dataset in rows.items():
        check = _check(run, trained, key, taken[key].layout, len(dataset))
        found = go_through(dataset, taken[key].columns, check, alone=run.model.trust_remote_code, tell=tell)
        refuse(found, check)
        words[key] = row_words(found, check)
        notices += row_notices(found, check, "max_length" not in run.training)
    return Facts(counts, words, notices, used)


def _check(run: SupervisedRun, tokenizer: Any, where: str, columns: tuple[str, ...], count: int) -> Any:
    from raytrl.plan.checks.training_rows import TrainingRows

    packed = run.training.get("packing")
    if where == "data.eval" and run.training.get("eval_packing") is not None:
        packed = run.training["eval_packing"]
    only = run.training.get("completion_only_loss")
    return TrainingRows(
        where=where,
        kind=run.kind,
        columns=columns,
        tokenizer=tokenizer,
        max_length=run.native("max_length"),
        keeps_end=run.training.get("truncation_mode") == "keep_end",
        packing=str(run.native("packing_strategy")) if packed else None,
        completion_only="completion" in columns and only is not False,
        multiple=run.training.get("pad_to_multiple_of"),
        positions=_positions(run),
        every=1 if count <= 20_000 else 10,
    )


def _positions(run: SupervisedRun) -> Any:
    from raytrl.roles.models.positions import positions_at, positions_of

    model = run.model
    if model.path is not None:
        return positions_at(model.path, model.revision, model.trust_remote_code, "model.path")
    from transformers import AutoConfig

    values = dict(model.config or {})
    try:
        return positions_of(AutoConfig.for_model(values.pop("model_type"), **values))
    except Exception as error:  # the config's own checks raise classes of their own
        raise ConfigError(f"model.config: cannot be built: {str(error).splitlines()[0]}") from None
