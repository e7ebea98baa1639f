"""Whether the weights of a run's models are the ones that were meant: names and shapes alone, on torch's meta device."""

import os

from raytrl.config.runs.base import ModelUse, Run
from raytrl.errors import ConfigError


def check_weights(run: Run) -> dict[str, int]:
    """Looks at every model that is a local folder; returns rows of embeddings by key of the run file.

    Raises:
        ConfigError: weights are missing, have another shape or belong to another network.
    """
    from raytrl.roles.models.loading import has_weights, look_at  # torch: 2 s

    rows: dict[str, int] = {}
    for use in run.models():
        place = _place(use)
        if place is None or not has_weights(place):
            continue
        try:
            found = look_at(
                place,
                use.head,
                use.key,
                new_head=use.new_head,
                trust_remote_code=use.trust_remote_code,
                **({"num_labels": 1} if use.new_head else {}),
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{use.key}: {place!r}: cannot be loaded: {str(error).splitlines()[0]}") from None
        if found is not None:
            rows[use.key] = found
    return rows


def _place(use: ModelUse) -> str | None:
    """The folder; beside a reward model's adapter the merged model."""
    if use.path is None:
        return None
    if use.key.startswith("reward.") and os.path.isfile(os.path.join(use.path, "adapter_config.json")):
        beside = (os.path.join(use.path, "merged"), os.path.join(os.path.dirname(use.path.rstrip("/")), "merged"))
        return next((place for place in beside if os.path.isdir(place)), None)
    return use.path


def check_vocabulary(tokenizer: object, rows: int | None, key: str) -> str:
    """The words about embeddings that belong to no token; empty where there are none.

    Raises:
        ConfigError: the tokenizer has ids that the model has no embeddings for.
    """
    if rows is None:
        return ""
    size = max(tokenizer.get_vocab().values()) + 1  # type: ignore[attr-defined]
    if size > rows:
        raise ConfigError(
            f"{key}: the tokenizer has ids that the model has no embeddings for; found: a vocabulary of {size} ids and "
            f"{rows} embeddings; expected: the model's own tokenizer, or embeddings resized to it"
        )
    return f"; {rows - size} of {rows} embeddings are no token, yet may be sampled" if size < rows else ""
