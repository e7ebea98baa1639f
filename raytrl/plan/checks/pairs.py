"""What is checked before a reward model's pairs are scored."""

from collections.abc import Callable, Mapping
from typing import Any

from raytrl.config.runs.pairs import PairsRun
from raytrl.errors import ConfigError, DataError
from raytrl.plan.checks.common import Facts, Rows, check_run, load_all
from raytrl.plan.checks.rows import in_no_hurry

_DATA = "pairs.data"


def check_pairs(run: PairsRun, before_last: Callable[[], None] = in_no_hurry) -> tuple[Any, Facts]:
    """Checks models, tokenizers and pairs.

    Args:
        before_last: called before what fails least.

    Returns:
        The pairs, a datasets.Dataset of those columns that are read; and what was found.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    embeddings = check_run(run)
    rows = load_all(run)
    before_last()
    return chosen_rows(run, rows), try_data(run, rows, embeddings)


def chosen_rows(run: PairsRun, rows: Rows) -> Any:
    """The first `pairs.rows` pairs, with the columns that are read."""
    from raytrl.data import choose_columns

    dataset = rows[_DATA]
    taken = dataset.select_columns(list(choose_columns(dataset, run, _DATA).columns))
    return taken.select(range(min(run.pairs.rows or len(taken), len(taken))))


def try_data(run: PairsRun, rows: Rows, embeddings: Mapping[str, int]) -> Facts:
    """
    Args:
        embeddings: not needed: a reward model reads text.

    Raises:
        ConfigError: a row, or a model's tokenizer, cannot be used.
    """
    from raytrl.data import check_columns, choose_columns, conversation_of
    from raytrl.roles.models.tokenizer import load_tokenizer

    dataset, category = rows[_DATA], run.pairs.category
    if category is not None and category not in dataset.column_names:
        raise DataError(
            f"pairs.category: no such column; found: {', '.join(dataset.column_names)} in {_DATA}; expected: one of them "
            f"instead of {category!r}"
        )
    layout = check_columns(dataset, run, _DATA)
    used = chosen_rows(run, rows)
    if category is not None and not all(isinstance(name, str | int | bool) for name in used[category]):
        raise DataError(f"pairs.category: found: {type(used[0][category]).__name__} in {category!r}; expected: text")
    if conversation_of(dataset, layout) is not None:
        for key, path in run.evaluated.items():
            if not load_tokenizer(path, None, run.model.trust_remote_code).chat_template:
                raise ConfigError(
                    f"{'model.path' if key == 'model' else key}: its tokenizer has no chat template; found: {_DATA} with lists "
                    f"of messages; expected: texts, or a reward model with a chat template"
                )
    same = sum(chosen == rejected for chosen, rejected in zip(used["chosen"], used["rejected"], strict=True))
    notices = [f"{_DATA}: {same:,} pairs have the same text on both sides: ties, which count half"] if same else []
    kinds = f", in {len(set(used[category]))} categories" if category is not None else ""
    words = f"{len(used):,} pairs{kinds}"
    columns = choose_columns(dataset, run, _DATA).in_words()
    return Facts({_DATA: len(dataset)}, {_DATA: words}, notices, {_DATA: columns})
