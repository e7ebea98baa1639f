"""Properties of the PPO arithmetic that hold for any numbers."""

import math

import pytest
import torch
from torch import Tensor

from raytrl.algo.advantages import gae
from raytrl.algo.importance import importance_weights
from raytrl.algo.kl import kl_estimate
from raytrl.algo.logprobs import token_entropy, token_logprobs
from raytrl.algo.losses import policy_loss, value_loss
from raytrl.algo.masked import Moments, explained_variance, masked_mean, moment_sums, whiten
from raytrl.algo.rewards import RunningMoments, shaped_scores, token_rewards

B, R, V = 6, 9, 13


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def lengths_mask(rng: torch.Generator) -> Tensor:
    return torch.arange(R) < torch.randint(1, R + 1, (B, 1), generator=rng)


def randn(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_and_entropy_against_float64(rng: torch.Generator, temperature: float, dtype: torch.dtype) -> None:
    logits = (5 * randn(rng, B, R, V)).to(dtype)
    tokens = torch.randint(0, V, (B, R), generator=rng)
    exact = torch.log_softmax(logits.double() / temperature, -1)
    logprobs = token_logprobs(logits, tokens, temperature)
    assert logprobs.dtype == torch.float32
    expected = exact.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=0)
    entropy = token_entropy(logits, temperature)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), atol=1e-5, rtol=0)


def test_entropy_of_an_impossible_token_is_finite() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]])
    assert float(token_entropy(logits, 1.0)) == pytest.approx(math.log(2))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_against_the_quadratic_formula(rng: torch.Generator, gamma: float, lam: float) -> None:
    rewards, values, mask = randn(rng, B, R), randn(rng, B, R), lengths_mask(rng)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i in range(B):
        n = int(mask[i].sum())
        v = [*values[i, :n].double().tolist(), 0.0]
        r = rewards[i, :n].double().tolist()
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n))
            assert float(advantages[i, t]) == pytest.approx(expected, abs=1e-5)
            assert float(returns[i, t]) == pytest.approx(expected + v[t], abs=1e-5)
        assert (advantages[i, n:] == 0).all()


def test_lambda_1_is_reward_to_go_minus_value(rng: torch.Generator) -> None:
    rewards, values, mask = randn(rng, B, R), randn(rng, B, R), lengths_mask(rng)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = (rewards * mask).flip(-1).cumsum(-1).flip(-1) * mask
    torch.testing.assert_close(returns, to_go, atol=1e-5, rtol=0)


def test_gae_is_detached(rng: torch.Generator) -> None:
    values = randn(rng, B, R).requires_grad_()
    advantages, returns = gae(randn(rng, B, R), values, lengths_mask(rng), gamma=1.0, lam=0.95)
    assert not advantages.requires_grad and not returns.requires_grad


def test_padding_changes_nothing(rng: torch.Generator) -> None:
    mask = lengths_mask(rng)
    names = ["logprobs", "old", "ref", "values", "old_values"]
    inputs = {name: randn(rng, B, R) for name in names}
    scores = randn(rng, B)

    def everything(x: dict[str, Tensor]) -> list[Tensor]:
        rewards = token_rewards(scores, kl_estimate(x["old"], x["ref"]), mask, 0.1)
        advantages, returns = gae(rewards, x["old_values"], mask, gamma=1.0, lam=0.95)
        white = whiten(advantages, mask, Moments.of(moment_sums(advantages, mask)))
        importance = importance_weights(x["old"], x["ref"], mask, high=2.0)
        policy = policy_loss(x["logprobs"], x["old"], white, mask, clip_range=0.2, divisor=7.0, weights_BR=importance)
        value = value_loss(x["values"], x["old_values"], returns, mask, clip_range=0.2, divisor=7.0)
        unexplained, total = explained_variance(returns, x["values"], mask)
        sums = [policy.approxkl_sum, policy.clipped_sum, policy.ratio_sum, policy.max_log_ratio, value.clipped_sum]
        return [rewards, white, returns, policy.loss, value.loss, unexplained, total, *sums]

    for junk in (1e4, -1e4, math.nan):
        dirty = {name: torch.where(mask, x, junk) for name, x in inputs.items()}
        for clean_result, dirty_result in zip(everything(inputs), everything(dirty), strict=True):
            assert torch.equal(clean_result, dirty_result)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_microbatches_add_up_to_the_same_gradient(rng: torch.Generator, rows: int) -> None:
    mask = lengths_mask(rng)
    old, advantages, old_values, returns = (randn(rng, B, R) for _ in range(4))
    tokens = float(mask.sum())
    start = old + 0.3 * randn(rng, B, R)

    def gradients(size: int) -> tuple[Tensor, Tensor]:
        logprobs, values = start.clone().requires_grad_(), start.clone().requires_grad_()
        for i in range(0, B, size):
            s = slice(i, i + size)
            policy_loss(logprobs[s], old[s], advantages[s], mask[s], clip_range=0.2, divisor=tokens).loss.backward()  # type: ignore[no-untyped-call]
            value_loss(values[s], old_values[s], returns[s], mask[s], clip_range=0.2, divisor=tokens).loss.backward()  # type: ignore[no-untyped-call]
        assert logprobs.grad is not None and values.grad is not None
        return logprobs.grad, values.grad

    for whole, parts in zip(gradients(B), gradients(rows), strict=True):
        assert whole.abs().sum() > 0
        torch.testing.assert_close(whole, parts, atol=1e-7, rtol=1e-6)


def test_first_epoch_loss_is_minus_the_mean_advantage(rng: torch.Generator) -> None:
    mask, old, advantages = lengths_mask(rng), randn(rng, B, R), randn(rng, B, R)
    result = policy_loss(old, old, advantages, mask, clip_range=0.2, divisor=float(mask.sum()))
    torch.testing.assert_close(result.loss, -masked_mean(advantages, mask))
    assert float(result.approxkl_sum) == 0 and float(result.clipped_sum) == 0


def test_clipping_stops_the_gradient_only_outwards() -> None:
    old, mask = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    logprobs = torch.tensor([[1.0, 1.0, -1.0, -1.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    policy_loss(logprobs, old, advantages, mask, clip_range=0.2, divisor=1.0).loss.backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    assert (logprobs.grad[0] != 0).tolist() == [False, True, True, False]


def test_a_wild_token_leaves_the_loss_finite() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    result = policy_loss(
        torch.zeros(1, 1), torch.full((1, 1), -500.0), -torch.ones(1, 1), mask, clip_range=0.2, divisor=1.0
    )
    assert result.loss.isfinite() and result.ratio_square_sum.isfinite()


def test_value_loss_without_clipping_is_half_the_squared_error(rng: torch.Generator) -> None:
    mask, values, returns = lengths_mask(rng), randn(rng, B, R), randn(rng, B, R)
    result = value_loss(values, values + 9, returns, mask, clip_range=None, divisor=float(mask.sum()))
    torch.testing.assert_close(result.loss, 0.5 * masked_mean((values - returns) ** 2, mask))


def test_kl_estimators(rng: torch.Generator) -> None:
    logits, ref_logits = randn(rng, 1, 1, V), randn(rng, 1, 1, V)
    logp, ref = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    exact = (logp.exp() * (logp - ref)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((logp.exp() * kl_estimate(logp, ref, estimator)).sum(), exact)
    assert (kl_estimate(logp, ref, "k3") >= 0).all()
    torch.testing.assert_close(kl_estimate(logp, ref, "k2"), (logp - ref) ** 2 / 2)


def test_score_lands_on_the_last_response_token() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = token_rewards(torch.tensor([2.0, 3.0]), torch.ones(2, 3), mask, 0.5)
    assert rewards.tolist() == [[-0.5, 1.5, 0.0], [-0.5, -0.5, 2.5]]


def test_shaping_scales_then_clips_then_subtracts() -> None:
    ended = torch.tensor([True, False])
    shaped = shaped_scores(torch.tensor([8.0, -8.0]), ended, scale=2.0, clip=3.0, missing_eos_penalty=1.0)
    assert shaped.tolist() == [3.0, -4.0]


def test_running_moments_equal_those_of_all_scores(rng: torch.Generator) -> None:
    scores = 3 + 2 * randn(rng, 30)
    running = RunningMoments()
    for part in scores.split([1, 9, 20]):
        running.update(Moments.of(moment_sums(part, torch.ones_like(part, dtype=torch.bool))))
    assert running.mean == pytest.approx(float(scores.mean()), abs=1e-5)
    assert running.scale == pytest.approx(float(scores.std()), abs=1e-5)
    restored = RunningMoments()
    restored.load_state_dict(running.state_dict())
    assert restored.scale == running.scale


def test_equal_scores_are_not_scaled() -> None:
    running = RunningMoments()
    running.update(Moments.of(moment_sums(torch.ones(4), torch.ones(4, dtype=torch.bool))))
    assert running.scale == 1.0


def test_explained_variance_of_a_perfect_critic(rng: torch.Generator) -> None:
    mask, returns = lengths_mask(rng), randn(rng, B, R)
    unexplained, total = explained_variance(returns, returns + 1, mask)
    assert Moments.of(unexplained).variance == pytest.approx(0, abs=1e-6)
    assert Moments.of(total).variance > 0


def test_importance_is_cut_at_its_cap() -> None:
    mask = torch.tensor([[True, True, False]])
    weights = importance_weights(torch.tensor([[0.0, -1.0, 5.0]]), torch.tensor([[-3.0, 0.0, 0.0]]), mask, high=2.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, math.exp(-1.0), 1.0]]))


def test_a_token_whose_sampler_is_not_known_is_not_corrected() -> None:
    sampling = torch.tensor([[math.nan, -2.0, -math.inf]])
    weights = importance_weights(torch.tensor([[-1.0, -1.0, -1.0]]), sampling, torch.ones(1, 3).bool(), high=5.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, math.e, 1.0]]))
