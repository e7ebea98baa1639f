"""Log-probs without logits: the numbers and gradients of logits, for the heads that models have."""

import resource
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packing import SMALL, batch
from torch import nn
from toy import LORA, gpt2, llama
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

from raytrl.config.runs.ppo import PpoRun
from raytrl.config.sections import ppo as ppo_section
from raytrl.plan.memory import microbatch_of
from raytrl.plan.shapes import read_shapes
from raytrl.roles.learner.build import assemble, build_networks, value_from_policy
from raytrl.roles.learner.head import LogProbHead, head_of, of_logits
from raytrl.roles.learner.networks import Networks, _plain


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0))


def scaled() -> nn.Module:
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3))


def biased() -> nn.Module:
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SMALL))
    nn.init.normal_(model.lm_head.bias)
    return model


def outcome(networks: Networks) -> dict[str, torch.Tensor]:
    """Log-probs, entropies, and the gradients of log-probs that count differently."""
    logprobs_N, entropies_N = networks("policy", batch(), 0.7)
    assert entropies_N is not None and not entropies_N.requires_grad
    (logprobs_N * torch.linspace(-1, 1, len(logprobs_N))).sum().backward()
    gradients = {name: p.grad for name, p in networks.policy.named_parameters() if p.grad is not None}
    return {"logprobs": logprobs_N.detach(), "entropies": entropies_N} | gradients


FAMILIES: list[Callable[[], nn.Module]] = [gpt2, llama, tied, scaled, biased]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_a_part_of_the_vocabulary_at_a_time_gives_what_all_of_it_gives(
    family: Callable[[], nn.Module], lora: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for chunk in (None, 8, 3):
        torch.manual_seed(1)
        networks = assemble(family(), None if lora else value_from_policy(llama()), lora=lora)
        for name, value in networks.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(value, std=0.2)
        if chunk is not None:
            monkeypatch.setitem(ppo_section.HEAD_CHUNK, "cpu", chunk)
            networks.prepare()
        assert (head_of(_plain(networks.policy)) is None) == (chunk is None)
        found.append(outcome(networks))
    expected, whole, parts = found
    assert len(expected) > 4
    assert expected.keys() == whole.keys() == parts.keys()
    for other, limit in ((expected, 2e-5), (parts, 2e-6)):  # the first was not packed either
        for name, value in whole.items():
            apart = float((other[name] - value).abs().max())
            assert apart <= limit * max(1.0, float(value.abs().max())), (name, apart)


@pytest.mark.parametrize("family", [gpt2, llama])
def test_in_bfloat16_parts_give_what_logits_give(
    family: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for chunk in (8, 3):
        monkeypatch.setitem(ppo_section.HEAD_CHUNK, "cpu", chunk)
        networks = assemble(family(), dtype=torch.bfloat16)
        networks.prepare()
        found.append(outcome(networks))
    for name, value in found[0].items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[1][name], value, atol=2e-2 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_head_that_computes_otherwise_is_found_out() -> None:
    """As of a family that does to its logits what no setting tells."""
    model = llama()
    forward = model.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = other  # type: ignore[method-assign]
    networks = assemble(model, reference=llama(), value=None)
    networks.prepare()
    assert head_of(networks.policy) is None
    assert networks.reference is not None and head_of(networks.reference) is not None
    rows = batch()
    logits_NV = (
        llama()
        .eval()(input_ids=rows.input_ids_BT, attention_mask=rows.attention_mask_BT, position_ids=rows.position_ids_BT)
        .logits[:, rows.prompt_width - 1 : -1][rows.response_mask_BR]
    )
    expected_N, _ = of_logits(1.5 * logits_NV, rows.tokens_N, 1.0)
    torch.testing.assert_close(networks("policy", rows)[0], expected_N, atol=1e-5, rtol=0)


def test_an_adapted_head_keeps_its_adapter() -> None:
    networks = assemble(llama(), lora={**LORA, "target_modules": ["lm_head", "q_proj"]})
    networks.prepare()
    assert head_of(_plain(networks.policy)) is None
    logprobs_N, _ = networks("policy", batch())
    logprobs_N.sum().backward()
    assert any("lm_head" in name and p.grad is not None for name, p in networks.named_parameters())


def test_the_logits_are_never_held() -> None:
    """512 tokens of 50,000 ids: their logits alone are 98 MiB, with what a backward pass needs of them four times that."""
    head = LogProbHead(nn.Linear(32, 50_000, bias=False), 1.0, None)
    hidden, tokens = torch.randn(512, 32, requires_grad=True), torch.randint(50_000, (512,))
    first, _ = head(deepcopy(hidden.detach()).requires_grad_(), tokens)
    first.sum().backward()  # what is imported and kept is no part of it
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    head(hidden, tokens)[0].sum().backward()
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert more < 60, f"{more:.0f} MiB"
    logits = head(hidden)
    of_logits(logits, tokens, 1.0)[0].sum().backward()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 > 200  # so the limit above can fail


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}], ids=["full", "lora"])
@pytest.mark.parametrize("family", [gpt2, llama])
def test_the_learner_chooses_the_microbatch_that_the_plan_shows(
    tmp_path: Path, family: Any, lora: dict[str, Any] | None, recomputed: bool
) -> None:
    family().save_pretrained(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1"}\n')
    values = {
        "kind": "ppo",
        "name": "run",
        "output_dir": str(tmp_path),
        "model": {"path": str(tmp_path)},
        "data": {"train": str(tmp_path / "prompts.jsonl")},
        "reward": {"sources": [{"name": "rule", "function": "m.py:f"}]},
        "ppo": {"batch_size": 8192, "gradient_checkpointing": recomputed},
        "lora": lora,
    }
    run = PpoRun.model_validate(values)
    networks = build_networks(str(tmp_path), lora=lora, gradient_checkpointing=recomputed)
    networks.prepare()
    shapes, problems = read_shapes(run)
    assert problems == []
    for there in (2**20, 2**30):  # as much as is kept for a micro-batch: a few of these tokens, and more than there are
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(ppo_section.MICROBATCH_BYTES, "cpu", there)
            chosen = run.ppo.microbatch_tokens(networks.token_bytes(), False)
            assert max(chosen, run.longest_row) == microbatch_of(run, shapes)
            assert chosen == 16384 if there == 2**30 else 10 < chosen < 1000
