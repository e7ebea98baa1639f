"""How many tokens a model takes: what its config says is what its forward pass does."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from raytrl.roles.models.positions import positions_of

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("family", "config", "count", "is_table"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}, 16, True),
        ("bert", {**SMALL, "max_position_embeddings": 16}, 16, True),
        (
            "distilbert",
            {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 16},
            16,
            True,
        ),
        ("roberta", {**SMALL, "max_position_embeddings": 16, "pad_token_id": 1}, 14, True),
        ("roberta", {**SMALL, "max_position_embeddings": 16, "pad_token_id": 3}, 12, True),
        ("opt", {**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 16}, 16, True),
        ("llama", {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 16}, 16, False),
    ],
)
def test_what_the_config_says_is_what_the_model_takes(
    family: str, config: dict[str, Any], count: int, is_table: bool
) -> None:
    made = AutoConfig.for_model(family, vocab_size=32, num_labels=1, **config)
    assert positions_of(made) == (count, is_table)
    model = AutoModelForSequenceClassification.from_config(made).eval()
    with torch.inference_mode():
        model(input_ids=torch.full((1, count), 5))
        if is_table:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, count + 1), 5))


def test_a_model_without_positions_has_no_limit() -> None:
    assert positions_of(AutoConfig.for_model("bloom")) is None
