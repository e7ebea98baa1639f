"""Models and rows, as far as `raytrl plan` looks at them: where that takes seconds and downloads nothing."""

import os
import pkgutil
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from raytrl.config.runs.base import Run
from raytrl.data_places import folder_of
from raytrl.errors import ConfigError, DataError
from raytrl.plan.checks.common import Facts
from raytrl.plan.checks.weights import check_weights

_MOST = 100_000  # rows


def facts_of(run: Run) -> tuple[Facts, list[str]]:
    """What is known of models and local datasets, and what is missing or cannot be used."""
    found, columns, problems = dict[str, Any](), dict[str, str](), list[str]()
    for key, source in run.data_sources().items():
        is_local = os.path.exists(source.path) or (
            bool(source.named_files or source.data_dir) and folder_of(source.path, source.data_dir) is not None
        )
        if not is_local and _is_hub_id(source.path):
            continue  # to count its rows is to download them
        from raytrl.data import choose_columns, load_data  # datasets: 1.3 s

        try:
            dataset = load_data(source, key)
            columns[key] = choose_columns(dataset, run, key).in_words()
            found[key] = dataset
        except DataError as error:
            problems.append(str(error))
    counted = Facts({key: len(dataset) for key, dataset in found.items()}, columns=columns)
    if not _are_here(run):
        return counted, problems
    embeddings: dict[str, int] = {}
    try:
        embeddings = check_weights(run)
    except ConfigError as error:
        problems.append(str(error))
    if problems or (run.data_sources() and not found):
        return counted, problems
    if (count := sum(counted.rows.values())) > _MOST:
        return counted | Facts(notices=[f"{count:,} rows are tried at the start, not here"]), problems
    try:
        return pkgutil.resolve_name(run.row_checks)(run, found, embeddings), problems
    except ConfigError as error:
        return counted, [str(error)]


def _is_hub_id(path: str) -> bool:
    try:
        try_to_load_from_cache(path, "README.md", repo_type="dataset")
    except HFValidationError:
        return False
    return True


def _are_here(run: Run) -> bool:
    """Whether all tokenizers and configs that rows are tried with are on this machine."""
    paths = [use.path for use in run.models() if use.path is not None]
    return bool(paths or run.tokenizers()) and all(map(os.path.exists, [*paths, *run.tokenizers().values()]))
