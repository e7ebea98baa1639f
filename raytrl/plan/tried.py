"""Rows, as far as `raytrl plan` looks at them: counted, and tried where that takes seconds and downloads nothing."""

import os
from collections.abc import Mapping
from typing import Any

from raytrl.config.runs.base import Run
from raytrl.config.runs.evaluation import EvalRun
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.sections.data import DataSource
from raytrl.errors import ConfigError, DataError
from raytrl.plan.checks.common import Facts

_MOST = 100_000  # rows


def facts_of(run: Run) -> tuple[Facts, list[str]]:
    """What is known of each local dataset, and what is missing or cannot be used."""
    found, columns, problems = dict[str, Any](), dict[str, str](), list[str]()
    for name in ("train", "eval"):
        source: DataSource | None = getattr(getattr(run, "data", None), name, None)
        if source is None:
            continue
        if source.data_files is None and source.data_dir is None and not os.path.isdir(source.path):
            continue  # a hub id: to count its rows is to download them
        from raytrl.data import choose_columns, load_data  # datasets: 1.3 s

        where = f"data.{name}"
        try:
            dataset = load_data(source, where)
            columns[where] = choose_columns(dataset, run, where).in_words()
            found[where] = dataset
        except DataError as error:
            problems.append(str(error))
    counted = Facts({key: len(dataset) for key, dataset in found.items()}, columns=columns)
    if problems or not found or not _are_here(run):
        return counted, problems
    if (count := sum(counted.rows.values())) > _MOST:
        return counted | Facts(notices=[f"{count:,} rows are tried at the start, not here"]), problems
    try:
        return _tried(run, found), problems
    except ConfigError as error:
        return counted, [str(error)]


def _are_here(run: Run) -> bool:
    """Whether all tokenizers and configs that rows are tried with are folders of this machine."""
    paths: list[Any] = [use.path for use in run.models()]
    if isinstance(run, SupervisedRun):
        paths = [path for path in (*paths, run.model.tokenizer) if path is not None]
    elif isinstance(run, PpoRun | EvalRun):
        paths.append(run.tokenizer_path)
    return all(isinstance(path, str) and os.path.isdir(path) for path in paths)


def _tried(run: Run, found: Mapping[str, Any]) -> Facts:
    if isinstance(run, SupervisedRun):
        from raytrl.data import check_columns, conversation_of
        from raytrl.plan.checks.supervised import own_tokenizer, try_rows
        from raytrl.roles.models.tokenizer import check_tokenizer

        rows = {key: (dataset, check_columns(dataset, run, key)) for key, dataset in found.items()}
        tokenizer = own_tokenizer(run)
        if (train := rows.get("data.train")) is not None:
            check_tokenizer(tokenizer, run, conversation_of(*train))
        return try_rows(run, tokenizer, rows)
    if isinstance(run, EvalRun):
        from raytrl.plan.checks.evaluation import check_eval_prompts

        return check_eval_prompts(run)
    if isinstance(run, PpoRun):
        from raytrl.plan.checks.ppo import check_ppo_prompts

        return check_ppo_prompts(run)
    return Facts({key: len(dataset) for key, dataset in found.items()})
