"""What the learner consumes, and how it is made from a rollout and one score a response."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrl.algo.advantages import gae
from raytrl.algo.kl import kl_estimate
from raytrl.algo.masked import Moments, explained_variance, moment_sums, whiten
from raytrl.algo.rewards import RunningMoments, shaped_scores, token_rewards
from raytrl.config.ppo import PpoConfig
from raytrl.errors import NonFiniteError, RewardError, RunError, WeightsVersionError
from raytrl.records import Prompt, Response, Score
from raytrl.roles.collectives import max_over_workers, sum_over_workers
from raytrl.roles.sequences import Sequences


@dataclass(frozen=True)
class Samples:
    """One worker's scored responses as tensors, dropped ones left out. B sequences, R response width."""

    sequences: Sequences
    global_rows: list[int]  # row · responses_per_prompt + sample: the place in the step's global batch
    scores_B: Tensor  # float32
    ended_B: Tensor  # bool
    sampling_logprobs_BR: Tensor  # float32, 0 on padding
    num_dropped: int


@dataclass(frozen=True)
class Experience:
    """Everything that one step learns from; all float32 (B, R), detached."""

    samples: Samples
    old_logprobs_BR: Tensor
    values_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor
    importance_BR: Tensor | None  # None: the rollout is from the current weights
    kl: float  # mean over the global batch of the summed k1, nats
    num_responses: int  # of the global batch, dropped ones left out
    metrics: Mapping[str, float]


def samples_of(
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    scores: Sequence[Score],
    *,
    config: PpoConfig,
    step: int,
    device: torch.device,
) -> Samples:
    """Match responses with prompts and scores by (row, sample), in that order.

    Raises:
        RunError: a response or score is missing, doubled, or of another step.
        WeightsVersionError: a response is older than `max_lag` steps, or newer than the learner.
        NonFiniteError: a score is NaN or infinite.
    """
    token_ids = {prompt.row: prompt.token_ids for prompt in prompts}
    by_key = {(score.row, score.sample): score for score in scores}
    wanted = {(prompt.row, sample) for prompt in prompts for sample in range(config.responses_per_prompt)}
    found = [(response.row, response.sample) for response in responses]
    if len(found) != len(wanted) or set(found) != wanted or by_key.keys() != wanted:
        raise RunError(
            f"learner: step {step}: responses and scores do not match the prompts; found {len(found)} responses "
            f"({len(set(found) ^ wanted)} unmatched) and {len(by_key)} scores ({len(by_key.keys() ^ wanted)} "
            f"unmatched); expected {len(wanted)} of each; this is a fault in raytrl, please report it"
        )
    for response in responses:
        if not 0 <= step - response.policy_version <= config.max_lag or response.step != step:
            raise WeightsVersionError(
                f"learner: step {step}, row {response.row}: the response is of step {response.step} and weights "
                f"version {response.policy_version}; expected version {step} or at most {config.max_lag} older"
            )
    bad = sorted(key for key, score in by_key.items() if score.value is not None and not math.isfinite(score.value))
    if bad:
        raise NonFiniteError(f"learner: step {step}: scores that are not finite, (row, sample): {bad[:8]}")
    kept = sorted(
        (response for response in responses if by_key[response.row, response.sample].value is not None),
        key=lambda response: (response.row, response.sample),
    )
    sequences = Sequences.of([token_ids[r.row] for r in kept], [r.token_ids for r in kept], device)
    sampling_BR = torch.zeros(len(kept), sequences.response_width)
    for i, response in enumerate(kept):
        sampling_BR[i, : len(response.token_ids)] = torch.tensor(response.sampling_logprobs)
    return Samples(
        sequences=sequences,
        global_rows=[r.row * config.responses_per_prompt + r.sample for r in kept],
        scores_B=torch.tensor([by_key[r.row, r.sample].value for r in kept], device=device).float(),
        ended_B=torch.tensor([r.ended for r in kept], dtype=torch.bool, device=device),
        sampling_logprobs_BR=sampling_BR.to(device),
        num_dropped=len(responses) - len(kept),
    )


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
    config: PpoConfig,
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
    gap_BR = torch.where(mask_BR, (old_BR - samples.sampling_logprobs_BR).abs(), torch.zeros_like(old_BR))
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
        "rollout/logprob_gap_mean": mean(total_B(gap_BR)) / length,
    }
    return Advantages(advantages_BR, returns_BR, kl, num_responses, metrics)


def refuse_non_finite(named_BR: Mapping[str, Tensor], samples: Samples, step: int) -> None:
    """Raise NonFiniteError with the rows where one of the tensors is NaN or infinite at a response token."""
    mask_BR = samples.sequences.response_mask_BR
    for name, x_BR in named_BR.items():
        bad_B = (~x_BR.isfinite() & mask_BR).any(-1)
        if bool(bad_B.any()):
            rows = [samples.global_rows[i] for i in bad_B.nonzero().flatten().tolist()]
            raise NonFiniteError(
                f"learner: step {step}: {name} not finite in rows {rows[:8]} of the global batch ({len(rows)} in all)"
            )


def _moments(x_B: Tensor) -> Moments:
    return Moments.of(sum_over_workers(moment_sums(x_B, torch.ones_like(x_B, dtype=torch.bool))))


def _largest(x: Tensor) -> float:
    return float(max_over_workers(x.max() if x.numel() else x.new_zeros(())))
