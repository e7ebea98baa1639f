"""What the learner consumes, and how it is made from a rollout and one score a response."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrl.algo.groups import Groups
from raytrl.algo.rewards import shaped_scores
from raytrl.config.sections.ppo import PpoSection
from raytrl.errors import NonFiniteError, RunError, WeightsVersionError
from raytrl.records.samples import Prompt, Response, Score
from raytrl.roles.learner.collectives import sum_over_workers
from raytrl.roles.learner.sequences import Sequences


@dataclass(frozen=True)
class Samples:
    """One worker's scored responses as tensors, dropped ones left out. B sequences, R response width."""

    sequences: Sequences
    global_rows: list[int]  # row · responses_per_prompt + sample: the place in what the step has sampled
    places: list[int]  # the place in the step's global batch: the same, where all that was sampled is learned from
    scores_B: Tensor  # float32
    ended_B: Tensor  # bool
    sampling_logprobs_BR: Tensor  # float32, 0 on padding, NaN where the engine gave none
    lags_B: Tensor  # float32: updates done since the weights that made it
    num_dropped: int

    def that_differ(self, config: PpoSection, scale: float) -> "Samples":
        """Those of the first prompts whose responses differ in what they are worth, as many as a step learns from; fewer
        where there are fewer. Where none differ nothing can be learned, and the first ones are as good as any.

        The order is one of rows, whoever finished first, so it is a function of the step; and it goes through the rows in
        strides, as each worker holds rows that follow one another. Collective.

        Args:
            scale: what scores are divided by before they are cut and compared.
        """
        samples_each, wanted = config.responses_per_prompt, config.batch_size // config.responses_per_prompt
        rows_B = self.rows_B(samples_each)
        shaped_B = shaped_scores(
            self.scores_B,
            self.ended_B,
            scale=scale,
            clip=config.reward_clip,
            missing_eos_penalty=config.missing_eos_penalty,
        )
        groups = Groups.of(shaped_B, rows_B)
        trained_K = torch.zeros_like(groups.counts_K).index_add(0, groups.places_B, self.trained_B(config).double())
        kept, differ = torch.zeros(2, config.prompts_per_step, device=rows_B.device)
        kept[groups.rows_K], differ[groups.rows_K] = 1.0, (groups.differ_K & (trained_K > 0)).float()
        kept, differ = sum_over_workers(torch.stack([kept, differ]))
        found = (differ if bool(differ.any()) else kept).nonzero().flatten()
        chosen = found[torch.argsort(found % config.candidates, stable=True)][:wanted].sort().values
        kept_B = torch.isin(rows_B, chosen).nonzero().flatten()
        order = {row: i for i, row in enumerate(chosen.tolist())}
        global_rows = [self.global_rows[i] for i in kept_B.tolist()]
        sequences = self.sequences.take(kept_B)
        return Samples(
            sequences=sequences,
            global_rows=global_rows,
            places=[order[place // samples_each] * samples_each + place % samples_each for place in global_rows],
            scores_B=self.scores_B[kept_B],
            ended_B=self.ended_B[kept_B],
            sampling_logprobs_BR=self.sampling_logprobs_BR[kept_B, : sequences.response_width],
            lags_B=self.lags_B[kept_B],
            num_dropped=self.num_dropped,
        )

    def rows_B(self, responses_per_prompt: int) -> Tensor:
        """The prompt's row of each."""
        rows = [place // responses_per_prompt for place in self.global_rows]
        return torch.tensor(rows, dtype=torch.long, device=self.scores_B.device)

    def trained_B(self, config: PpoSection) -> Tensor:
        """Which responses have a gradient, bool."""
        return torch.ones_like(self.ended_B) if config.train_unfinished else self.ended_B


@dataclass(frozen=True)
class Experience:
    """Everything that one step learns from; all float32 (B, R), detached."""

    samples: Samples
    old_logprobs_BR: Tensor | None  # None: those of the update's only pass
    ref_logprobs_BR: Tensor | None  # where the KL penalty is in the loss
    values_BR: Tensor | None  # with a critic
    advantages_BR: Tensor
    returns_BR: Tensor | None  # with a critic
    importance_BR: Tensor | None  # None: samples are not weighted
    kl: float | None  # mean over the global batch of the summed k1, nats; None without a reference
    kl_coef: float
    num_responses: int  # of the global batch, dropped ones left out
    metrics: Mapping[str, float]


def samples_of(
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    scores: Sequence[Score],
    *,
    config: PpoSection,
    step: int,
    device: torch.device,
) -> Samples:
    """Match responses with prompts and scores by (row, sample), in that order.

    Raises:
        RunError: a response or score is missing, doubled, or of another step.
        WeightsVersionError: a response is older than `max_lag` steps, or newer than the learner.
        NonFiniteError: a score is NaN or infinite.
    """
    by_row = {prompt.row: prompt for prompt in prompts}
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
        if not config.version_of(step) <= response.policy_version <= step or response.step != step:
            raise WeightsVersionError(
                f"learner: step {step}, row {response.row}: the response is of step {response.step} and weights "
                f"version {response.policy_version}; expected version {config.version_of(step)}, or a newer one where its "
                f"weights were lost"
            )
    bad = sorted(key for key, score in by_key.items() if score.value is not None and not math.isfinite(score.value))
    if bad:
        raise NonFiniteError(f"learner: step {step}: scores that are not finite, (row, sample): {bad[:8]}")
    kept = sorted(
        (response for response in responses if by_key[response.row, response.sample].value is not None),
        key=lambda response: (response.row, response.sample),
    )
    sequences = Sequences.of(
        [response.prompt_of(by_row[response.row]).token_ids for response in kept],
        [response.token_ids for response in kept],
        device,
        [response.sampled for response in kept],
    )
    sampling_BR = torch.zeros(len(kept), sequences.response_width)
    for i, response in enumerate(kept):
        sampling_BR[i, : response.num_sampled] = torch.tensor(response.sampling_logprobs)
    places = [r.row * config.responses_per_prompt + r.sample for r in kept]
    return Samples(
        sequences=sequences,
        global_rows=places,
        places=places,
        scores_B=torch.tensor([by_key[r.row, r.sample].value for r in kept], device=device).float(),
        ended_B=torch.tensor([r.ended for r in kept], dtype=torch.bool, device=device),
        sampling_logprobs_BR=sampling_BR.to(device),
        lags_B=torch.tensor([step - r.policy_version for r in kept], device=device).float(),
        num_dropped=len(responses) - len(kept),
    )


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
