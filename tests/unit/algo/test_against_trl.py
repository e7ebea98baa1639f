"""Agreement with an independent implementation: what TRL 1.12's PPOTrainer computed, see make_trl_golden.py.

Two conventions differ on purpose and are put in TRL's way here: TRL gives the score one position after the end token
where there is room, with that position's value kept (so its masks are one longer), and whitens by the unbiased variance.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raytrl.algo.advantages import gae
from raytrl.algo.kl import kl_estimate
from raytrl.algo.logprobs import token_logprobs
from raytrl.algo.losses import policy_loss, value_loss
from raytrl.algo.masked import Moments, masked_sum, moment_sums, whiten
from raytrl.algo.rewards import token_rewards

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("trl_golden.json").read_text())
SETTINGS = GOLDEN["settings"]


def tensors(part: str) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in GOLDEN[part].items()}


def masks(lengths_B: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Response tokens; and TRL's for rewards and values, one longer where there is room."""
    columns_R = torch.arange(width)
    return columns_R < lengths_B.unsqueeze(-1), columns_R <= lengths_B.unsqueeze(-1)


def close(mine: Tensor | float, theirs: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(mine), theirs, atol=1e-5, rtol=0)


def test_kl_rewards_advantages_and_returns() -> None:
    batch = tensors("batch")
    mask_BR, longer_BR = masks(batch["sequence_lengths"] + 1, batch["values"].shape[1])
    kl_BR = torch.where(mask_BR, kl_estimate(batch["logprobs"], batch["ref_logprobs"]), torch.tensor(0.0))
    close(kl_BR, batch["kl"])
    assert float(kl_BR.sum(-1).mean()) == pytest.approx(GOLDEN["metrics"]["objective/kl"], abs=1e-5)
    rewards_BR = token_rewards(batch["scores"], kl_BR, longer_BR, SETTINGS["kl_coef"])
    close(rewards_BR, batch["rewards"])
    advantages_BR, returns_BR = gae(
        rewards_BR, batch["values"], longer_BR, gamma=SETTINGS["gamma"], lam=SETTINGS["lam"]
    )
    close(advantages_BR, batch["advantages"])
    close(returns_BR, batch["returns"])


def test_whitening() -> None:
    batch = tensors("batch")
    mask_BR, _ = masks(batch["sequence_lengths"] + 1, batch["values"].shape[1])
    moments = Moments.of(moment_sums(batch["advantages"], mask_BR))
    unbiased = replace(moments, variance=moments.variance * moments.count / (moments.count - 1))
    white_BR = whiten(batch["advantages"], mask_BR, unbiased)
    close(white_BR, torch.where(mask_BR, batch["whitened"], torch.tensor(0.0)))


def test_logprobs_at_temperature() -> None:
    part = tensors("minibatch")
    mask_BR, _ = masks(part["lengths"], part["vpred"].shape[1])
    # TRL divides by the temperature in place before it is caught: its logits are at temperature 1.
    logprobs_BR = token_logprobs(part["logits"], part["mb_responses"], 1.0)
    close(logprobs_BR[mask_BR], part["new_logprobs"][mask_BR])
    cooled_BR = token_logprobs(part["logits"] * SETTINGS["temperature"], part["mb_responses"], SETTINGS["temperature"])
    close(cooled_BR[mask_BR], part["new_logprobs"][mask_BR])


def test_losses_and_clip_fractions() -> None:
    part = tensors("minibatch")
    mask_BR, longer_BR = masks(part["lengths"], part["vpred"].shape[1])
    policy = policy_loss(
        part["new_logprobs"],
        part["mb_logprobs"],
        part["mb_advantage"],
        mask_BR,
        clip_range=SETTINGS["cliprange"],
        divisor=float(mask_BR.sum()),
    )
    value = value_loss(
        part["vpred"],
        part["mb_values"],
        part["mb_return"],
        longer_BR,
        clip_range=SETTINGS["cliprange_value"],
        divisor=float(longer_BR.sum()),
    )
    close(policy.loss, part["pg_loss"])
    close(value.loss, part["vf_loss"])
    close(policy.loss + SETTINGS["vf_coef"] * value.loss, part["loss"])
    close(policy.clipped_sum / mask_BR.sum(), part["pg_clipfrac"])
    close(value.clipped_sum / longer_BR.sum(), part["vf_clipfrac"])
    close(policy.approxkl_sum / mask_BR.numel(), part["approxkl"])  # TRL's mean takes the padding in
    assert float(part["pg_clipfrac"]) > 0 and float(part["vf_clipfrac"]) > 0


def test_the_case_is_one_that_could_fail() -> None:
    batch = tensors("batch")
    lengths_B = batch["sequence_lengths"] + 1
    assert len(set(lengths_B.tolist())) > 1 and 0 < int(batch["ended"].sum()) < len(lengths_B)
    mask_BR, _ = masks(lengths_B, batch["values"].shape[1])
    assert float(masked_sum(kl_estimate(batch["logprobs"], batch["ref_logprobs"]).abs(), mask_BR)) > 1
