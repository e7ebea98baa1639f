"""How many tokens a model takes, by its config alone. Imports no torch."""

from typing import Any, NamedTuple

from raytrl.errors import ConfigError

# Their position ids start behind the padding id, as in RoBERTa (`create_position_ids_from_input_ids`).
_BEHIND_PADDING = (
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)


class Positions(NamedTuple):
    """The longest sequence of a model."""

    most: int
    is_table: bool  # positions are rows of a table: beyond it is an IndexError; else only further than it was trained


def positions_of(config: Any) -> Positions | None:
    """What a model's config says; None where it does not, or where positions have no end.

    Args:
        config: transformers' config object, of a model or of its text part.
    """
    text = config.get_text_config()
    count = getattr(text, "max_position_embeddings", None)
    if not isinstance(count, int) or count <= 0:
        return None
    if text.model_type in _BEHIND_PADDING and getattr(text, "position_embedding_type", None) != "rotary":
        padding = 1 if text.model_type == "mpnet" else getattr(text, "pad_token_id", None)
        return Positions(count - 1 - (padding if isinstance(padding, int) else 0), True)
    is_relative = getattr(text, "position_biased_input", None) is False  # DeBERTa-v3
    is_rotated = bool(getattr(text, "rope_parameters", None)) or is_relative
    return Positions(count, not is_rotated)


def positions_at(path: str, revision: str | None, trust_remote_code: bool, key: str) -> Positions | None:
    """The same for a folder or hub id.

    Raises:
        ConfigError: its config.json cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{key}: {path!r}: config.json cannot be read: {str(error).splitlines()[0]}") from None
    return positions_of(config)
