"""Packed forward passes: the same numbers as padded ones, and only for models that can."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from raytrl.algo.logprobs import token_logprobs
from raytrl.roles.learner.build import assemble, build_backend
from raytrl.roles.learner.save import save_policy
from raytrl.roles.learner.sequences import Sequences
from raytrl.roles.learner.unpadded import Layout, is_packed, make_packed
from tests.unit.ppo.toy import LORA, VOCABULARY, config, gpt2, llama

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def qwen3() -> nn.Module:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SMALL))


def batch() -> Sequences:
    prompts = [[1, 2, 3], [4], [5, 6, 1, 2, 3], [0, 0]]
    return Sequences.of(prompts, [[3, 0], [1, 2, 3, 4, 5, 6], [7], [0, 7, 0]], torch.device("cpu"))


def outcome(
    model: nn.Module, lora: dict[str, Any] | None, packed: bool, checkpointing: bool
) -> dict[str, torch.Tensor]:
    """What the three networks compute, and the gradients of their sum."""
    torch.manual_seed(1)
    networks = assemble(deepcopy(model), lora=lora, gradient_checkpointing=checkpointing)
    for name, value in networks.named_parameters():
        if "lora_B" in name or name.startswith(("value_head", "value.score")):
            nn.init.normal_(value, std=0.2)
    if packed:
        networks.prepare()
        assert networks.packed
    rows, found = batch(), {"value": networks("value", batch())}
    for network in ("policy", "reference"):
        found[network], _ = networks(network, rows, 0.7)  # type: ignore[arg-type]
    assert all(len(x) == 12 for x in found.values())
    (found["policy"].square().mean() + found["value"].square().mean()).backward()
    return found | {name: p.grad for name, p in networks.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("family", [gpt2, llama, qwen3])
def test_packed_rows_give_the_numbers_of_padded_ones(
    family: Any, lora: dict[str, Any] | None, checkpointing: bool
) -> None:
    model = family()
    padded, packed = (outcome(model, lora, way, checkpointing) for way in (False, True))
    assert padded.keys() == packed.keys() and len(padded) > 5
    for name, expected in padded.items():
        torch.testing.assert_close(
            packed[name], expected, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_as_on_a_gpu_gives_the_numbers_of_attention_as_on_a_cpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1, 5])
    query, key, value = (torch.randn(1, heads, 9, 8, dtype=dtype) for heads in (4, 2, 2))
    layout = Layout.of(lengths)
    expected = layout.attend(query, key, value, enable_gqa=True)
    grouped = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        grouped.append(arguments["enable_gqa"])
        return scaled_dot_product_attention(q, k, v, **arguments)

    monkeypatch.setattr("raytrl.roles.learner.unpadded.scaled_dot_product_attention", attention)
    found = layout._attend_padded(query, key, value, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    # torch's fused kernels on GPUs take grouped heads in half precision only.
    assert grouped == [dtype == torch.bfloat16]


def test_windows_capped_logits_and_states_stay_padded() -> None:
    for model in (
        MistralForCausalLM(MistralConfig(**SMALL, sliding_window=3)),
        Gemma2ForCausalLM(Gemma2Config(**SMALL)),
        FalconH1ForCausalLM(FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)),
    ):
        before = model.config._attn_implementation
        assert not make_packed(model)
        assert not is_packed(model) and model.config._attn_implementation == before
    wide = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None))
    assert make_packed(wide)


def test_a_model_that_mixes_tokens_outside_of_attention_stays_padded() -> None:
    model = llama().eval()
    assert make_packed(deepcopy(model))
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out + 0.1 * out.cumsum(1))  # type: ignore[union-attr, operator, index]
    assert not make_packed(model) and not is_packed(model)


def test_a_packed_model_is_saved_as_an_ordinary_one(tmp_path: Path) -> None:
    networks = assemble(llama().eval())
    save_policy(build_backend(networks, config()), tmp_path)
    assert networks.packed
    assert "raytrl" not in (tmp_path / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    rows = batch()
    mask = {"attention_mask": rows.attention_mask_BT, "position_ids": rows.position_ids_BT}
    with torch.no_grad():
        logits_BTV = model(input_ids=rows.input_ids_BT, **mask).logits
        logits_NV = rows.at_tokens(logits_BTV[:, rows.prompt_width - 1 : -1])
        expected = token_logprobs(logits_NV, rows.tokens_N, 1.0)
        torch.testing.assert_close(networks("policy", rows)[0], expected, atol=1e-5, rtol=1e-4)
