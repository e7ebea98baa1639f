"""A batch that another policy made, as the population: every pair of responses as often as the sampler's probability says.

What the learner makes of it is the expectation under the sampler, and is held to what the weights promise: with the product
over a response, uncapped, the very gradient of a batch of its own; else what the enumeration says. No test of an optimum
sees a wrong weight, since all advantages vanish there.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from test_population import (
    BETA,
    EXPECTED,
    LONGEST,
    POLICY,
    RESPONSES,
    REWARD,
    STATES,
    TOKENS,
    close,
    expected_gradient,
    gradient,
    kl_of,
    population,
    probability,
)
from torch import Tensor

SAMPLER = {"a": 0.25, "b": 0.5, "E": 0.25}  # ratios of a response: 4 (aa), 2 (aE), 1, ½ (bE), ¼ (bb)


def weights_of(text: str, level: str, mode: str, low: float | None, high: float | None) -> list[float]:
    ratios = [POLICY[token] / SAMPLER[token] for token in text]
    if level == "sequence":
        ratios = [math.prod(ratios)] * len(text)
    kept = [min(max(ratio, low or 0.0), high or math.inf) for ratio in ratios]
    return [k if k == r or mode == "truncate" else 0.0 for k, r in zip(kept, ratios, strict=True)]


def expected_of_stale(**how: Any) -> Tensor:
    """RLOO's gradient of pairs that the sampler made, each token by its weight."""
    found = torch.zeros(3, 3, dtype=torch.float64)
    for pair in itertools.product(RESPONSES, repeat=2):
        chance = probability(pair[0], SAMPLER) * probability(pair[1], SAMPLER)
        worth = [REWARD[text] - BETA * sum(kl_of(text[:i], token) for i, token in enumerate(text)) for text in pair]
        for i, text in enumerate(pair):
            for t, weight in enumerate(weights_of(text, **how)):
                pull = chance / 2 * weight * (worth[i] - worth[1 - i]) / LONGEST
                for other, name in enumerate(TOKENS):
                    found[STATES.index(text[:t]), other] -= pull * ((name == text[t]) - POLICY[name])
    return found


@pytest.mark.parametrize(
    "how",
    [
        {"level": "token", "high": None},
        {"level": "token", "high": 2.0},
        {"level": "token", "high": 1.5},
        {"level": "token", "low": 0.75, "high": None},
        {"level": "token", "mode": "mask", "high": 1.5},
        {"level": "token", "mode": "mask", "low": 0.75, "high": 3.0},
        {"level": "sequence", "high": None},
        {"level": "sequence", "high": 3.0},
        {"level": "sequence", "mode": "mask", "high": 3.0},
        {"level": "sequence", "mode": "mask", "low": 0.3, "high": None},
    ],
    ids=str,
)
def test_the_gradient_of_samples_of_older_weights(how: dict[str, Any]) -> None:
    how = {"mode": "truncate", "low": None} | how
    mine, metrics = gradient(population(sampler=SAMPLER), algorithm="rloo", max_lag=1, importance=how)
    close(mine, expected_of_stale(**how))
    own = expected_gradient(*EXPECTED["rloo"])
    is_whole = how["level"] == "sequence" and how["low"] is how["high"] is None
    assert (float((mine - own).norm() / own.norm()) < 1e-5) == is_whole
    at_tokens = [
        (probability(text, SAMPLER), weight, weight != ratio)
        for text in RESPONSES
        for weight, ratio in zip(
            weights_of(text, **how), weights_of(text, how["level"], "truncate", None, None), strict=True
        )
    ]
    tokens = sum(chance for chance, *_ in at_tokens)
    assert metrics["importance/mean"] == pytest.approx(sum(chance * w for chance, w, _ in at_tokens) / tokens, rel=1e-5)
    cut = sum(chance for chance, _, is_cut in at_tokens if is_cut) / tokens
    assert metrics["importance/capped_fraction"] == pytest.approx(cut, abs=1e-9)


def test_how_far_the_sampler_is() -> None:
    _, metrics = gradient(population(sampler=SAMPLER), algorithm="rloo", max_lag=1)
    kl = sum(
        probability(text, SAMPLER) * math.log(probability(text, SAMPLER) / probability(text)) for text in RESPONSES
    )
    assert metrics["rollout/kl_to_sampler"] == pytest.approx(kl, rel=1e-5)
    squares = sum(probability(text) ** 2 / probability(text, SAMPLER) for text in RESPONSES)
    assert metrics["importance/ess"] == pytest.approx(1 / squares, rel=1e-5)
    assert metrics["rollout/lag_mean"] == metrics["rollout/redone_newer"] == 0.0


def test_without_weights_older_samples_count_as_if_they_were_todays() -> None:
    mine, metrics = gradient(population(sampler=SAMPLER), algorithm="rloo", max_lag=1, importance=None)
    own = expected_gradient(*EXPECTED["rloo"])
    assert float((mine - own).norm() / own.norm()) > 0.1
    assert metrics["importance/ess"] < 0.7 and "importance/mean" not in metrics


def test_the_weight_is_not_the_penaltys() -> None:
    """A KL in the loss pulls each sampled token as it is; only what the score says is weighted."""
    stale = population(sampler=SAMPLER)

    def pull(**how: Any) -> Tensor:
        with_kl, _ = gradient(stale, algorithm="dr_grpo", max_lag=1, kl={"coef": BETA}, **how)
        without, _ = gradient(stale, algorithm="dr_grpo", max_lag=1, kl={"coef": 0.0}, **how)
        return with_kl - without

    close(pull(importance={"level": "sequence", "high": None}), pull(importance=None))
