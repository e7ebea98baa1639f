"""How far from the known optimum each seed and each planted fault ends; about ten CPU-seconds each."""

from copy import deepcopy

import pytest
from optimum import Optimum
from torch import nn
from toy import LocalGenerator, LocalScorer, Log, Prompts, config, gpt2, make_engine, make_learner

from raytrl.algo.kl import kl_estimate
from raytrl.loop.loop import Schedule, run
from raytrl.roles.learner import credit, learner, sequences

pytestmark = pytest.mark.slow


def end_distance(seed: int, *, temperature: float = 1.0, kl_coef: float = 0.5) -> tuple[float, float]:
    """KL to the optimum before and after 60 updates, nats."""
    model: nn.Module = gpt2(seed)
    optimum = Optimum.of(model, length=3, beta=0.5)
    ppo = config(steps=60, batch_size=256, epochs=4, minibatches=1, kl={"coef": kl_coef})
    policy = make_learner(deepcopy(model), ppo, seed=seed)
    engine = make_engine(deepcopy(model), seed=seed, chunk=256, temperature=temperature)
    run(Schedule(60), Prompts(256), LocalGenerator([engine], 1, 256), LocalScorer(), policy, Log())
    end = optimum.distance(policy._backend.networks.policy)
    print(f"{optimum.distance(model):.4f} -> {end:.4f}")
    return optimum.distance(model), end


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_correct(seed: int) -> None:
    start, end = end_distance(seed)
    assert end <= 0.02 and end <= 0.1 * start


def test_sampling_at_another_temperature_is_far_off() -> None:
    assert end_distance(1, temperature=0.7)[1] > 0.025


def test_kl_left_out_is_far_off() -> None:
    assert end_distance(1, kl_coef=0.0)[1] > 0.5


def test_k3_in_the_reward_is_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credit, "kl_estimate", lambda a, b, _: kl_estimate(a, b, "k3"))
    assert end_distance(1)[1] > 0.1


def test_score_on_the_first_token_is_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    original = credit.token_rewards

    def early(scores_B, kl_BR, mask_BR, kl_coef):  # type: ignore[no-untyped-def]
        rewards_BR = original(scores_B * 0, kl_BR, mask_BR, kl_coef)
        rewards_BR[:, 0] += scores_B
        return rewards_BR

    monkeypatch.setattr(credit, "token_rewards", early)
    assert end_distance(1)[1] > 0.05


def test_forgotten_left_pad_positions_are_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(self: sequences.Sequences):  # type: ignore[no-untyped-def]
        return (self.attention_mask_BT * 0 + 1).cumsum(-1) - 1

    monkeypatch.setattr(sequences.Sequences, "position_ids_BT", property(plain))
    monkeypatch.setattr(learner, "MAX_FIRST_KL", {})
    assert end_distance(1)[1] > 0.03
