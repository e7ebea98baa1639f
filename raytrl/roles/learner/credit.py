"""Credit: what each sampled token is worth to the learner."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrl.algo.advantages import gae
from raytrl.algo.kl import kl_estimate
from raytrl.algo.masked import Moments, explained_variance, moment_sums, whiten
from raytrl.algo.rewards import RunningMoments, shaped_scores, token_rewards
from raytrl.config.sections.ppo import PpoSection
from raytrl.errors import RewardError
from raytrl.roles.learner.collectives import max_over_workers, sum_over_workers
from raytrl.roles.learner.experience import Samples


@dataclass(frozen=True)
class Advantages:
    """The credit that each token gets, and the metrics of how."""

    advantages_BR: Tensor
    returns_BR: Tensor
    kl: float
    num_responses: int
    metrics: dict[str, float]


def advantages_of(
    samples: Samples,
    old_BR: Tensor,
    ref_BR: Tensor,
    values_BR: Tensor,
    *,
    config: PpoSection,
    kl_coef: float,
    running: RunningMoments,
) -> Advantages:
    """Rewards, GAE and whitening over the global batch; `running` takes in the batch's scores."""
    mask_BR = samples.sequences.response_mask_BR
    score_moments = _moments(samples.scores_B)
    if score_moments.count == 0:
        raise RewardError("learner: the scores of every response of the step were dropped; nothing to learn from")
    running.update(score_moments)
    shaped_B = shaped_scores(
        samples.scores_B,
        samples.ended_B,
        scale=running.scale if config.reward_scaling else 1.0,
        clip=config.reward_clip,
        missing_eos_penalty=config.missing_eos_penalty,
    )
    kl_BR = kl_estimate(old_BR, ref_BR, "k1")
    rewards_BR = token_rewards(shaped_B, kl_BR, mask_BR, kl_coef)
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantages:
        moments = Moments.of(sum_over_workers(moment_sums(advantages_BR, mask_BR)))
        advantages_BR = whiten(advantages_BR, mask_BR, moments)
    num_responses = int(score_moments.count)

    def mean(per_response_B: Tensor) -> float:
        return float(sum_over_workers(per_response_B.double().sum())) / num_responses

    def total_B(x_BR: Tensor) -> Tensor:
        return torch.where(mask_BR, x_BR, torch.zeros_like(x_BR)).double().sum(-1)

    kl = mean(total_B(kl_BR))
    shaped = mean(shaped_B)
    unexplained, total = explained_variance(returns_BR, values_BR, mask_BR)
    left, whole = Moments.of(sum_over_workers(unexplained)), Moments.of(sum_over_workers(total))
    known_BR = mask_BR & samples.sampling_logprobs_BR.isfinite()
    gap_BR = torch.where(known_BR, (old_BR - samples.sampling_logprobs_BR).abs(), torch.zeros_like(old_BR))
    known = mean(known_BR.sum(-1))
    ended, length = mean(samples.ended_B), mean(samples.sequences.response_lengths_B)
    metrics = {
        "objective/kl": kl,
        "objective/kl_k3": mean(total_B(kl_estimate(old_BR, ref_BR, "k3"))),
        "objective/kl_coef": kl_coef,
        "objective/entropy": mean(total_B(-old_BR)),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": shaped - kl_coef * kl,
        "objective/scores": shaped,
        "objective/scores_raw": score_moments.mean,
        "objective/scores_raw_std": math.sqrt(score_moments.variance),
        "objective/dropped": float(sum_over_workers(torch.tensor(float(samples.num_dropped), device=old_BR.device))),
        "val/num_eos_tokens": ended * num_responses,
        "val/explained_variance": 1.0 - left.variance / whole.variance if whole.variance > 0 else math.nan,
        "response/ended_fraction": ended,
        "response/length": length,
        "rollout/logprob_gap_max": _largest(gap_BR),
        "rollout/logprob_gap_mean": mean(total_B(gap_BR)) / known if known else math.nan,
        "rollout/logprobs_missing": (length - known) * num_responses,
    }
    return Advantages(advantages_BR, returns_BR, kl, num_responses, metrics)


def _moments(x_B: Tensor) -> Moments:
    return Moments.of(sum_over_workers(moment_sums(x_B, torch.ones_like(x_B, dtype=torch.bool))))


def _largest(x: Tensor) -> float:
    return float(max_over_workers(x.max() if x.numel() else x.new_zeros(())))
