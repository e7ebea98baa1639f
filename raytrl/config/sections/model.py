"""`model`: the network, and its tokenizer."""

from typing import Any, Literal

from pydantic import Field, model_validator

from raytrl.config.foreign.native import words_for_bools
from raytrl.config.sections.base import Section


class TokenizerSpec(Section):
    """A byte-level BPE tokenizer, trained on the run's own training text before it starts."""

    vocab_size: int = Field(gt=260)
    """Entries, the 256 bytes and the special tokens included."""
    eos_token: str = "<|end|>"
    """The token that ends a text."""
    pad_token: str = "<|pad|>"
    """The token that fills up shorter rows of a batch."""
    special_tokens: list[str] = Field(default=[])
    """More tokens that are never split, such as chat markers."""

    @model_validator(mode="after")
    def _distinct(self) -> "TokenizerSpec":
        if self.eos_token == self.pad_token:
            raise ValueError(
                f"pad_token: padding would hide the end of a text; found: {self.pad_token!r}, as eos_token; expected: "
                f"another token"
            )
        return self


class ModelSection(Section):
    """The network to train: a Hugging Face folder or id, or one made from a config with random weights."""

    path: str | None = None
    """Hugging Face id or local folder. null: the model is made from config."""
    config: dict[str, Any] | None = None
    """model_type and other fields of its transformers config: a model with random weights. null: path is loaded."""
    tokenizer: str | TokenizerSpec | None = None
    """Hugging Face id or local folder, or {vocab_size: …}: one that is trained on data.train first. null: that of path."""
    revision: str | None = None
    """Branch, tag or commit of the model and tokenizer on the hub. null: the main branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the network computes in. auto: bfloat16 on a GPU, float32 on a CPU. What is trained is held in float32, or has a
    float32 copy (DeepSpeed)."""
    pad_token: str | None = None
    """A token to pad with, added where the tokenizer lacks it. null: the tokenizer's own."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model or tokenizer may run."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSection":
        if (self.path is None) == (self.config is None):
            found = "neither path nor config" if self.path is None else "both path and config"
            raise ValueError(f"found: {found}; expected: one of path (a model that exists) and config (one to make)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError(
                "config.model_type: missing; expected: an architecture of transformers such as llama, gpt2"
            )
        if problems := words_for_bools("config.", self.config or {}):
            raise ValueError("\n".join(problems))
        if self.config is not None and self.tokenizer is None:
            raise ValueError("tokenizer: missing; a model made from a config needs one: a folder, or {vocab_size: …}")
        if self.path is not None and isinstance(self.tokenizer, TokenizerSpec):
            raise ValueError("tokenizer: a trained tokenizer would not fit the embeddings of the model in path")
        return self
