"""What differs where models compute in bfloat16, as they do on a GPU; processors without it are emulated by torch."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from toy import (
    LORA,
    LocalGenerator,
    LocalScorer,
    Log,
    Prompts,
    config,
    gpt2,
    llama,
    make_engine,
    make_learner,
)

from raytrl.loop.loop import Schedule, run
from raytrl.roles.learner.networks import Networks, compute_like_trained
from raytrl.roles.rollout.lora_merge import LoraMerge
from raytrl.roles.weights.buckets import PolicyCopy, checksum

BF16 = torch.bfloat16
FAMILIES: dict[str, Callable[[], nn.Module]] = {"gpt2": gpt2, "llama": llama}


def trained(model: nn.Module, steps: int = 1, **more: Any) -> tuple[Networks, Log]:
    dtype, lora = more.get("dtype", torch.float32), more.get("lora", False)
    engine = make_engine(deepcopy(model), lora=lora, dtype=dtype)
    changes = {"steps": steps, "learning_rate": more.pop("learning_rate", 1e-3)}
    learner, log = make_learner(deepcopy(model), config(**changes), **more), Log()
    run(Schedule(steps), Prompts(16), LocalGenerator([engine], 1), LocalScorer(), learner, log)
    return learner._backend.networks, log


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_starts_where_its_reference_is_and_engines_take_its_weights(family: str, lora: bool) -> None:
    networks, log = trained(FAMILIES[family](), 2, lora=lora, dtype=BF16)
    assert log.metrics[0]["objective/kl"] == 0.0
    assert log.metrics[1]["objective/kl"] != 0.0
    assert all(p.dtype == torch.float32 for p in networks.parameters() if p.requires_grad)
    assert networks.sent_dtype == (torch.float32 if lora else BF16)


def test_a_frozen_model_computes_like_a_trained_one_only_when_it_is_told_to() -> None:
    trained_like, plain, told = gpt2().to(BF16).float(), gpt2().to(BF16), gpt2().to(BF16)
    compute_like_trained(told, BF16)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        expected, other, same = (model.eval()(input_ids=ids).logits for model in (trained_like, plain, told))
    assert torch.equal(same, expected)
    assert not torch.equal(other, expected)  # else nothing had to be told
    assert told.transformer.h[0].mlp.c_fc.weight.dtype == BF16  # matrices stay as small as they were


def test_adapters_are_merged_into_bfloat16_with_one_rounding(tmp_path: Path) -> None:
    model = llama().to(BF16)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    networks, _ = trained(model, 3, lora=True, dtype=BF16, learning_rate=1e-2)
    merge = LoraMerge(str(tmp_path), LORA, BF16)
    sent = {
        name: p.detach() for name, p in networks.policy.named_parameters() if ".default." in name and "lora_" in name
    }
    merge.begin()
    merge.take(sent)
    merge.finish()
    merged = dict(merge.changed())
    layers = {n: m for n, m in networks.policy.get_base_model().named_modules() if isinstance(m, LoraLayer)}  # type: ignore[operator]
    assert layers
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight.data
        exact = (weight.float() + layer.get_delta_weight("default").float()).to(BF16)
        assert torch.equal(merged[f"{name}.weight"], exact)
        assert merged[f"{name}.weight"].dtype == BF16


def moved(before: nn.Module, after: nn.Module) -> float:
    pairs = [(p, dict(after.named_parameters())[name]) for name, p in before.named_parameters()]
    return sum(int((a.detach().float() != b.detach().float()).sum()) for a, b in pairs) / sum(
        p.numel() for p, _ in pairs
    )


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-6])
def test_as_many_weights_move_as_in_float32(learning_rate: float) -> None:
    model = gpt2().to(BF16).float()  # the same numbers in both
    shares = [
        moved(model, trained(model, dtype=dtype, learning_rate=learning_rate)[0].policy)
        for dtype in (torch.float32, BF16)
    ]
    assert shares[1] == pytest.approx(shares[0], abs=0.05), shares


def test_values_are_not_rounded() -> None:
    networks, _ = trained(gpt2(), 1, dtype=BF16)
    head = networks.value.score  # type: ignore[union-attr]
    nn.init.normal_(head.weight, std=30.0)  # type: ignore[union-attr, arg-type]
    from raytrl.roles.learner.sequences import Sequences

    batch = Sequences.filler(torch.device("cpu"))
    values_N = networks("value", batch)
    assert values_N.dtype == torch.float32
    assert not torch.equal(values_N, values_N.to(BF16).float())


def test_weights_that_an_engine_keeps_in_float32_are_proven_too() -> None:
    """As transformers does with `_keep_in_fp32_modules`; what is rounded on its way is found out."""
    sent = {name: value.detach().to(BF16) for name, value in gpt2().named_parameters()}
    engine = gpt2().to(BF16)
    engine.transformer.ln_f.float()
    nn.init.zeros_(engine.transformer.ln_f.weight)
    copied = PolicyCopy(engine)
    copied.begin()
    assert copied.take(sent) == checksum(sent)
    copied.finish(0)
    assert engine.transformer.ln_f.weight.dtype == torch.float32
    assert torch.equal(engine.transformer.ln_f.weight, sent["transformer.ln_f.weight"].float())
    finer = {name: value.detach() for name, value in gpt2(1).named_parameters()}
    copied.drop(0)
    copied.begin()
    assert copied.take(finer) != checksum(finer)
