"""Credit: what each sampled token is worth to the learner."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrl.algo.advantages import gae
from raytrl.algo.groups import Groups, group_advantages
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
    returns_BR: Tensor | None  # with a critic
    kl: float | None  # with a reference
    num_responses: int
    metrics: dict[str, float]


def advantages_of(
    samples: Samples,
    old_BR: Tensor | None,
    ref_BR: Tensor | None,
    values_BR: Tensor | None,
    *,
    config: PpoSection,
    kl_coef: float,
    running: RunningMoments,
    sampled: Samples | None = None,
) -> Advantages:
    """Rewards, advantages and whitening over the global batch; `running` takes in the batch's scores.

    Args:
        old_BR: None: they are not known yet, and `metrics_of_logprobs` is called when they are. There is no reference then.
        ref_BR: None: there is no reference, and no KL in the reward.
        values_BR: None: there is no critic.
        sampled: what `samples` were chosen from, where they were: what is said of the scores is said of these.
    """
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
    zeros_BR = torch.zeros_like(samples.sampling_logprobs_BR)
    kl_BR = None if old_BR is None or ref_BR is None else kl_estimate(old_BR, ref_BR, "k1")
    penalty_BR = zeros_BR if kl_BR is None or config.kl.place == "loss" else kl_coef * kl_BR
    returns_BR = None
    if config.in_groups:
        advantages_BR = _of_groups(samples, shaped_B, penalty_BR, config)
    else:
        rewards_BR = token_rewards(shaped_B, penalty_BR, mask_BR, 1.0)
        baseline_BR = zeros_BR if values_BR is None else values_BR
        lam = config.lam if config.has_critic else 1.0
        advantages_BR, returns_BR = gae(rewards_BR, baseline_BR, mask_BR, gamma=config.gamma, lam=lam)
    if config.whiten_advantages:
        moments = Moments.of(sum_over_workers(moment_sums(advantages_BR, mask_BR)))
        advantages_BR = whiten(advantages_BR, mask_BR, moments)
    num_responses = int(score_moments.count)
    raw = score_moments if sampled is None else _moments(sampled.scores_B)

    def mean(per_response_B: Tensor) -> float:
        return float(sum_over_workers(per_response_B.double().sum())) / num_responses

    shaped = mean(shaped_B)
    kl, metrics = None, dict[str, float]()
    if old_BR is not None and ref_BR is not None and kl_BR is not None:
        kl = mean(_totals_B(kl_BR, mask_BR))
        metrics |= {
            "objective/kl": kl,
            "objective/kl_k3": mean(_totals_B(kl_estimate(old_BR, ref_BR, "k3"), mask_BR)),
            "objective/kl_coef": kl_coef,
        }
        if config.kl.place == "reward":
            metrics |= {"objective/non_score_reward": -kl_coef * kl, "objective/rlhf_reward": shaped - kl_coef * kl}
    if values_BR is not None and returns_BR is not None:
        unexplained, total = explained_variance(returns_BR, values_BR, mask_BR)
        left, whole = Moments.of(sum_over_workers(unexplained)), Moments.of(sum_over_workers(total))
        metrics["val/explained_variance"] = 1.0 - left.variance / whole.variance if whole.variance > 0 else math.nan
    if config.responses_per_prompt > 1:
        metrics |= _metrics_of_groups(sampled or samples, config)
    ended, length = mean(samples.ended_B), mean(samples.sequences.response_lengths_B)
    metrics |= {
        "objective/scores": shaped,
        "objective/scores_raw": raw.mean,
        "objective/scores_raw_std": math.sqrt(raw.variance),
        "objective/dropped": float(
            sum_over_workers(torch.tensor(float((sampled or samples).num_dropped), device=mask_BR.device))
        ),
        "val/num_eos_tokens": ended * num_responses,
        "response/ended_fraction": ended,
        "response/length": length,
    }
    if not config.has_critic:  # under the names that TRL gives them, where the meaning is the same
        metrics |= {
            "reward": raw.mean,
            "completions/mean_length": length,
            "completions/clipped_ratio": 1.0 - ended,
        }
    if old_BR is not None:
        metrics |= metrics_of_logprobs(samples, old_BR, num_responses)
    return Advantages(advantages_BR, returns_BR if config.has_critic else None, kl, num_responses, metrics)


def metrics_of_logprobs(samples: Samples, old_BR: Tensor, num_responses: int) -> dict[str, float]:
    """How sure the policy was of what was sampled, and how far the engine's log-probs are from the learner's. Collective."""
    mask_BR = samples.sequences.response_mask_BR
    known_BR = mask_BR & samples.sampling_logprobs_BR.isfinite()
    gap_BR = torch.where(known_BR, (old_BR - samples.sampling_logprobs_BR).abs(), torch.zeros_like(old_BR))
    sums = torch.stack(
        [_totals_B(-old_BR, mask_BR).sum(), gap_BR.double().sum(), known_BR.double().sum(), mask_BR.double().sum()]
    )
    surprise, gap, known, tokens = sum_over_workers(sums).tolist()
    return {
        "objective/entropy": surprise / num_responses,
        "rollout/logprob_gap_max": _largest(gap_BR),
        "rollout/logprob_gap_mean": gap / known if known else math.nan,
        "rollout/logprobs_missing": tokens - known,
    }


def _totals_B(x_BR: Tensor, mask_BR: Tensor) -> Tensor:
    return torch.where(mask_BR, x_BR, torch.zeros_like(x_BR)).double().sum(-1)


def _of_groups(samples: Samples, shaped_B: Tensor, penalty_BR: Tensor, config: PpoSection) -> Tensor:
    """One number a response, at each of its tokens. A prompt's responses lie in one worker, so only the batch's deviation is
    asked of the others."""
    mask_BR = samples.sequences.response_mask_BR
    # KL of the whole response, before the baseline: at the optimum all responses are then worth the same (RLOO's paper, TRL).
    worth_B = shaped_B.double() - torch.where(mask_BR, penalty_BR, torch.zeros_like(penalty_BR)).double().sum(-1)
    assert config.advantage in ("group_mean", "leave_one_out")
    advantages_B = group_advantages(
        worth_B,
        samples.rows_B(config.responses_per_prompt),
        baseline=config.advantage,
        scale=config.advantage_scale,
        batch=_moments(worth_B) if config.advantage_scale == "batch" else None,
    )
    return torch.where(mask_BR, advantages_B.float().unsqueeze(-1), torch.zeros_like(penalty_BR))


def _metrics_of_groups(samples: Samples, config: PpoSection) -> dict[str, float]:
    """Of the scores alone, whatever advantages are made of."""
    sums = Groups.of(samples.scores_B, samples.rows_B(config.responses_per_prompt)).sums()
    groups, differ, deviations = sum_over_workers(sums).tolist()
    found = {
        "groups/kept": differ,
        "groups/equal_fraction": 1.0 - differ / groups if groups else math.nan,
        "groups/score_std": deviations / groups if groups else math.nan,
    }
    return found if config.has_critic else {**found, "frac_reward_zero_std": found["groups/equal_fraction"]}


def _moments(x_B: Tensor) -> Moments:
    return Moments.of(sum_over_workers(moment_sums(x_B, torch.ones_like(x_B, dtype=torch.bool))))


def _largest(x: Tensor) -> float:
    return float(max_over_workers(x.max() if x.numel() else x.new_zeros(())))
