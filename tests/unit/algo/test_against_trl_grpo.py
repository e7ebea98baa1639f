"""Agreement with an independent implementation: what TRL 1.16's own GRPO and RLOO code computes, see make_trl_grpo_golden.py.

Values, and the gradients with respect to each log-prob, in float64. Padding holds other numbers here than there: nothing
may depend on it. Not repeated: what raytrl does not offer (SAPO, VESPO, the off-policy mask, k3 without a ratio, RLOO's product
ratio in the loss), and a divisor of a whole generation batch.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raytrl.algo.groups import Groups, group_advantages
from raytrl.algo.importance import importance_weights
from raytrl.algo.losses import policy_loss
from raytrl.algo.masked import Moments, moment_sums
from raytrl.roles.learner.minibatch import Divisors

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("trl_grpo_golden.json").read_text())
INPUTS = GOLDEN["inputs"]
WIDTH, LONGEST = max(INPUTS["lengths"]), INPUTS["max_completion_length"]
LENGTHS_B = torch.tensor(INPUTS["lengths"])
MASK_BR = torch.arange(WIDTH) < LENGTHS_B.unsqueeze(-1)
ROWS_BR = torch.arange(len(LENGTHS_B)).unsqueeze(-1).expand(-1, WIDTH)


def padded(rows: list[list[float]], filler: float) -> Tensor:
    return torch.tensor([[*row, *[filler] * (WIDTH - len(row))] for row in rows], dtype=torch.float64)


OLD_BR = padded(INPUTS["old"], -7.0)
NEW_BR = torch.where(MASK_BR, OLD_BR + padded(INPUTS["log_ratio"], 0.0), torch.tensor(-2.0))
REF_BR = OLD_BR + padded(INPUTS["ref_minus_old"], 3.0)
SAMPLING_BR = OLD_BR - padded(INPUTS["old_minus_sampling"], -1.0)
TOOLS_BR = padded(INPUTS["tool_mask"], 1.0).bool()

# TRL's name of a case → loss_mean, and what `policy_loss` is told.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("responses", {}),
    "bnpo": ("tokens", {}),
    "dapo": ("tokens", {}),
    "dr_grpo": ("max_tokens", {}),
    "dapo, epsilon_high 0.28": ("tokens", {"clip_range_high": 0.28}),
    "dapo, delta 1.5": ("tokens", {"ratio_limit": 1.5}),
    "dapo, delta 1.3": ("tokens", {"ratio_limit": 1.3}),
    "dapo, no old log-probs": ("tokens", {"old": NEW_BR}),
    "cispo, epsilon_high 5": ("tokens", {"cispo": True, "ratio_limit": 5.0}),
    "cispo, epsilon_high 1.2": ("tokens", {"cispo": True, "ratio_limit": 1.2}),
    "grpo, sequence": ("responses", {"rows_BR": ROWS_BR}),
    "dapo, sequence": ("tokens", {"rows_BR": ROWS_BR}),
    "grpo, sequence, 3e-4 4e-4": ("responses", {"rows_BR": ROWS_BR, "clip_range": 3e-4, "clip_range_high": 4e-4}),
    "dapo, beta 0.1": ("tokens", {"kl_coef": 0.1}),
    "grpo, beta 0.1": ("responses", {"kl_coef": 0.1}),
    "grpo, beta 0.1, sequence": ("responses", {"kl_coef": 0.1, "rows_BR": ROWS_BR}),
    "dapo, tool mask": ("tokens", {"mask": MASK_BR & TOOLS_BR}),
    "grpo, tool mask": ("responses", {"mask": MASK_BR & TOOLS_BR}),
    "dapo, token_truncate, None, 2.0": ("tokens", {"importance": ("token", "truncate", None, 2.0)}),
    "dapo, token_mask, None, 2.0": ("tokens", {"importance": ("token", "mask", None, 2.0)}),
    "dapo, sequence_truncate, None, 2.0": ("tokens", {"importance": ("sequence", "truncate", None, 2.0)}),
    "dapo, sequence_mask, None, 2.0": ("tokens", {"importance": ("sequence", "mask", None, 2.0)}),
    "dapo, sequence_mask, None, 3.0": ("tokens", {"importance": ("sequence", "mask", None, 3.0)}),
    "dapo, token_truncate, 0.5, 2.0": ("tokens", {"importance": ("token", "truncate", 0.5, 2.0)}),
    "dapo, token_mask, 0.5, 2.0": ("tokens", {"importance": ("token", "mask", 0.5, 2.0)}),
    "dapo, token_truncate, None, 2.0, beta 0.1": (
        "tokens",
        {"importance": ("token", "truncate", None, 2.0), "kl_coef": 0.1},
    ),
}


def importance(level: Any, mode: Any, low: float | None, high: float | None) -> Tensor:
    return importance_weights(OLD_BR, SAMPLING_BR, MASK_BR, level=level, mode=mode, low=low, high=high)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_their_gradients(name: str) -> None:
    loss_mean, settings = CASES[name]
    settings = {"clip_range": 0.2, **settings}
    mask_BR = settings.pop("mask", MASK_BR)
    old_BR = settings.pop("old", OLD_BR)
    weights = settings.pop("importance", None)
    new_BR = NEW_BR.clone().requires_grad_(True)
    num_tokens = mask_BR.sum(-1)
    result = policy_loss(
        new_BR,
        old_BR,
        torch.tensor(INPUTS["advantages"], dtype=torch.float64).unsqueeze(-1).expand(-1, WIDTH),
        mask_BR,
        divisor=Divisors.of(loss_mean, float(num_tokens.sum()), len(LENGTHS_B), LONGEST).policy,
        shares_BR=(1.0 / num_tokens.double()).unsqueeze(-1).expand(-1, WIDTH) if loss_mean == "responses" else None,
        weights_BR=importance(*weights) if weights else None,
        ref_logprobs_BR=REF_BR if "kl_coef" in settings else None,
        **settings,
    )
    result.loss.backward()  # type: ignore[no-untyped-call]
    golden = GOLDEN["losses"][name]
    assert float(result.loss) == pytest.approx(golden["loss"], abs=1e-12)
    assert new_BR.grad is not None
    exact(torch.where(MASK_BR, new_BR.grad, 0.0), padded([row[:n] for row, n in zip_rows(golden["gradient"])], 0.0))


def zip_rows(rows: list[list[float]]) -> list[tuple[list[float], int]]:
    return list(zip(rows, INPUTS["lengths"], strict=True))


def exact(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine.double(), theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", GOLDEN["importance"])
def test_importance_weights(name: str) -> None:
    (level, mode), low, high = (part.split("_") if "_" in part else part for part in name.split(", "))
    mine_BR = importance(level, mode, None if low == "None" else float(low), float(high))
    for row, theirs in enumerate(GOLDEN["importance"][name]):
        wanted = theirs if level == "token" else theirs * INPUTS["lengths"][row]
        exact(mine_BR[row, : len(wanted)], torch.tensor(wanted, dtype=torch.float64))


def kept(case: str, weights: tuple[float, ...] = (1.0,)) -> tuple[Tensor, Tensor, list[int]]:
    """Worth, row of four and place of the responses that have a score."""
    sums = [
        None
        if all(value is None for value in values)
        else sum(w * v for w, v in zip(weights, values, strict=True) if v is not None)
        for values in INPUTS["rewards"][case]
    ]
    places = [place for place, value in enumerate(sums) if value is not None]
    worth = torch.tensor([sums[place] for place in places], dtype=torch.float64)
    return worth, torch.tensor([place // 4 for place in places]), places


def back(advantages_B: Tensor, places: list[int], size: int) -> Tensor:
    """At their places; dropped responses have none, which TRL writes as 0."""
    return torch.zeros(size, dtype=torch.float64).index_copy(0, torch.tensor(places), advantages_B)


@pytest.mark.parametrize("case", ["one", "one with None", "two functions"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_advantages(case: str, scale: Any) -> None:
    worth_B, rows_B, places = kept(case, (1.0, 0.5) if case == "two functions" else (1.0,))
    moments = Moments.of(moment_sums(worth_B, torch.ones_like(worth_B, dtype=torch.bool)))
    mine_B = group_advantages(worth_B, rows_B, baseline="group_mean", scale=scale, batch=moments)
    name = f"{case}, weights 1 and 0.5, {scale}" if case == "two functions" else f"{case}, {scale}"
    theirs = torch.tensor(GOLDEN["advantages"][name]["advantages"], dtype=torch.float64)
    exact(back(mine_B, places, len(theirs)), theirs)


@pytest.mark.parametrize("case", ["one", "one with None"])
def test_rloo_advantages(case: str) -> None:
    worth_B, rows_B, places = kept(case)
    mine_B = group_advantages(worth_B, rows_B, baseline="leave_one_out", scale="none")
    theirs = torch.tensor(GOLDEN["rloo advantages"][case]["advantages"], dtype=torch.float64)
    exact(back(mine_B, places, len(theirs)), theirs)


def test_scores_that_differ_by_rounding_are_equal() -> None:
    worth_B, rows_B, _ = kept("rounding noise")
    mine_B = group_advantages(worth_B, rows_B, baseline="group_mean", scale="group")
    exact(mine_B, torch.tensor(GOLDEN["advantages"]["rounding noise, group"]["advantages"], dtype=torch.float64))
    assert Groups.of(worth_B, rows_B).sums().tolist()[:2] == [1.0, 0.0]


def test_pairs() -> None:
    """The unbiased deviation of a pair makes every advantage ±0.7071, less what epsilon takes."""
    worth_B, rows_B = torch.tensor([1.0, 0.0, 3.0, 2.9], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    mine_B = group_advantages(worth_B, rows_B, baseline="group_mean", scale="group")
    exact(mine_B, torch.tensor(GOLDEN["advantages"]["pairs, group"]["advantages"], dtype=torch.float64))


@pytest.mark.parametrize(("case", "fraction"), [("one", 0.5), ("two functions", 0.0)])
def test_share_of_groups_of_equal_scores(case: str, fraction: float) -> None:
    worth_B, rows_B, _ = kept(case, (1.0, 0.5) if case == "two functions" else (1.0,))
    groups, differ, _ = Groups.of(worth_B, rows_B).sums().tolist()
    name = "one, group" if case == "one" else "two functions, weights 1 and 0.5, group"
    assert 1 - differ / groups == fraction == GOLDEN["advantages"][name]["metrics"]["frac_reward_zero_std"]
