"""Loading a network, or only a look at one: its weights are the ones that were meant, or it is refused."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from raytrl.config.runs.base import Head
from raytrl.errors import ConfigError

_HEADS = ("score.", "classifier.")  # transformers' names of a classifier's head where a family has no prefix


def auto_class(head: Head) -> Any:
    """The transformers class of a network with this head."""
    return AutoModelForSequenceClassification if head == "score" else AutoModelForCausalLM


def load_model(path: str, head: Head, where: str, *, new_head: bool = False, **options: Any) -> Any:
    """`from_pretrained`, whose weights all come from `path`.

    Args:
        where: the key of the run file, for messages.
        new_head: a head that `path` lacks is made new, as when a classifier starts from a language model.
        options: of `from_pretrained`.

    Raises:
        ConfigError: weights are missing, have another shape or belong to another network.
    """
    logging.disable_progress_bar()  # the driver's display has its own
    model, loading = auto_class(head).from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    check_loaded(model, loading, head, f"{where}: {path!r}", new_head)
    return model


def look_at(path: str, head: Head, where: str, *, new_head: bool = False, **options: Any) -> int | None:
    """`load_model` on torch's meta device, where nothing is held; returns its rows of embeddings.

    None: it cannot be looked at so (quantised weights need their device); whoever loads it checks it then.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, **{k: v for k, v in options.items() if k != "num_labels"})
    if getattr(config, "quantization_config", None) is not None:
        return None
    model = load_model(path, head, where, new_head=new_head, device_map={"": torch.device("meta")}, **options)
    return int(model.get_input_embeddings().num_embeddings)


def check_loaded(model: Any, loading: Mapping[str, Any], head: Head, where: str, new_head: bool) -> None:
    """Refuses a network some of whose weights are random, or are not those of the file.

    Raises:
        ConfigError: with the names of the first of them.
    """
    inside = f"{model.base_model_prefix}." if model.base_model_prefix else None

    def in_head(name: str) -> bool:
        return not name.startswith(inside) if inside else name.startswith(_HEADS)

    absent = [name for name in _names(loading["missing_keys"]) if not (new_head and in_head(name))]
    other = _names(loading["mismatched_keys"])
    # A head of another kind is left out where a new one is made; a classifier's says that this is no language model.
    beyond = [
        n for n in _names(loading["unexpected_keys"]) if not in_head(n) or (head == "causal" and n.startswith(_HEADS))
    ]
    for names, why in (
        (absent, "has no weights for {}, which would be random"),
        (other, "has weights of another shape than its config.json says for {}, which would be random"),
        (beyond, "has weights that this network has no place for: {}"),
    ):
        if names:
            kind = "language model" if head == "causal" else "sequence classifier"
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ConfigError(
                f"{where}: not a whole {kind} of class {type(model).__name__}; found: a folder that {why.format(shown)}; "
                f"expected: the weights of a {kind}, by transformers' own names"
            )


def _names(keys: Iterable[Any]) -> list[str]:
    return sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in keys)
