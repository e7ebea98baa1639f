"""Samples that today's policy did not make: how old they are, what they count, and whether they still tell of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from raytrl.algo.importance import effective_sample_size, importance_weights, sampling_kl, weight_sums
from raytrl.config.sections.ppo import PpoSection
from raytrl.records.metrics import ESS, REDONE, SAMPLING_KL
from raytrl.roles.learner.collectives import max_over_workers, sum_over_workers
from raytrl.roles.learner.experience import Samples


def weighted(
    samples: Samples, old_BR: Tensor, config: PpoSection, step: int, num_responses: int
) -> tuple[Tensor | None, Mapping[str, float]]:
    """What each token counts, (B, R), None where all count the same; and the metrics of a run that asks. Collective.

    Args:
        num_responses: of the global batch, dropped ones left out.
    """
    if config.importance is None and not config.max_lag:
        return None, {}
    metrics = _ages(samples, config, step, num_responses) if config.max_lag else {}
    mask_BR, sampling_BR = samples.sequences.response_mask_BR, samples.sampling_logprobs_BR
    kl = sum_over_workers(sampling_kl(old_BR, sampling_BR, mask_BR).sum())
    ess = sum_over_workers(weight_sums(old_BR, sampling_BR, mask_BR))
    metrics |= {SAMPLING_KL: float(kl) / num_responses, ESS: effective_sample_size(ess, num_responses)}
    if config.importance is None:
        return None, metrics
    how = config.importance.model_dump()
    weights_BR = importance_weights(old_BR, sampling_BR, mask_BR, **how)
    ratios_BR = importance_weights(old_BR, sampling_BR, mask_BR, level=config.importance.level)
    at_tokens = [mask_BR, torch.where(mask_BR, weights_BR, 0.0), mask_BR & (weights_BR != ratios_BR)]
    tokens, total, cut = sum_over_workers(torch.stack([x_BR.double().sum() for x_BR in at_tokens])).tolist()
    return weights_BR, {**metrics, "importance/mean": total / tokens, "importance/capped_fraction": cut / tokens}


def _ages(samples: Samples, config: PpoSection, step: int, num_responses: int) -> dict[str, float]:
    lags_B = samples.lags_B
    newer_B = lags_B < step - config.version_of(step)
    lag, newer = sum_over_workers(torch.stack([lags_B.double().sum(), newer_B.double().sum()])).tolist()
    oldest = max_over_workers(lags_B.max() if lags_B.numel() else lags_B.new_zeros(()))
    return {"rollout/lag_mean": lag / num_responses, "rollout/lag_max": float(oldest), REDONE: newer}
