"""What run files about finished models have in common: a model, and a second one beside it."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from raytrl.config.sections.base import Section
from raytrl.config.sections.model import ModelSection, TokenizerSpec


class ComparedModel(Section):
    """The long form of a second model."""

    path: str
    """Hugging Face id or local folder, with a tokenizer of its own."""


def _path(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if set(value) != {"path"}:
        raise ValueError(f"found: {value}; expected: a Hugging Face id or folder, or {{path: one}}")
    return value["path"]


ModelPath = Annotated[str, BeforeValidator(_path, json_schema_input_type=str | ComparedModel)]


def unfinished(model: ModelSection) -> list[str]:
    """What of the model section does not go with a model that is done, one line each."""
    problems = []
    if model.path is None:
        problems.append("model.path: missing; only a finished model can be evaluated: a Hugging Face id or folder")
    if isinstance(model.tokenizer, TokenizerSpec):
        problems.append("model.tokenizer: a tokenizer cannot be trained here; found: vocab_size; expected: a path")
    for key in ("revision", "pad_token"):
        if (value := getattr(model, key)) is not None:
            problems.append(f"model.{key}: does nothing for eval; found: {value!r}; leave it out")
    return problems
