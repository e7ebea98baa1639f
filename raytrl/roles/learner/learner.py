"""The learner of PPO and its kin: experience from rollouts, and the updates."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from raytrl.algo.kl import KlController
from raytrl.algo.rewards import RunningMoments
from raytrl.config.sections.ppo import PpoSection
from raytrl.errors import NonFiniteError, RunError
from raytrl.records.samples import Prompt, Response, Score
from raytrl.roles.learner.backend import Backend, schedule_factor
from raytrl.roles.learner.collectives import (
    failing_together,
    max_over_workers,
    sum_over_workers,
    wait_for_all,
    worker_rank,
)
from raytrl.roles.learner.conversations import metrics_of_conversations
from raytrl.roles.learner.credit import advantages_of, metrics_of_logprobs
from raytrl.roles.learner.experience import Experience, Samples, refuse_non_finite, samples_of
from raytrl.roles.learner.minibatch import Divisors, Part, Totals
from raytrl.roles.learner.sequences import Sequences, minibatch_rows, pack
from raytrl.roles.learner.staleness import weighted
from raytrl.roles.weights.buckets import GatheredBuckets, Weights

_AHEAD = "ahead-{}.jsonl"  # in a checkpoint, of each worker: a chunk a line
# Two forward passes of the same float32 weights differ by about 1e-6 a token; bfloat16 by about 1e-2.
MAX_FIRST_LOG_RATIO = {torch.float32: 1e-3}
MAX_FIRST_KL = {torch.float32: 1e-3, torch.bfloat16: 1e-3}  # of one forward pass by two equal networks


class Rollout(Protocol):
    """One worker's share of a step (`raytrl.loop.protocols.Rollout`)."""

    @property
    def prompts(self) -> Sequence[Prompt]: ...
    @property
    def responses(self) -> Sequence[Response]: ...
    @property
    def scores(self) -> Sequence[Score]: ...


class PpoLearner:
    """One learner worker. Every public method but `step` is collective: all workers call it, each with its share."""

    def __init__(
        self,
        backend: Backend,
        config: PpoSection,
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int | None = None,
        reference: Literal["start", "named"] | None = "start",
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            temperature: the one that responses are sampled with.
            seed: the run's; minibatches follow from (seed, step, epoch), so there is no random state to lose.
            max_new_tokens: the longest response, which `loss_mean: max_tokens` divides by.
            reference: the starting policy, so that the first KL must be 0, or another model; None: there is none, and no
                KL is known.
            beat: is called with every micro-batch.
        """
        self._backend = backend
        self._config = config
        self._temperature = temperature
        self._seed = seed
        self._max_new_tokens = max_new_tokens
        self._reference = reference
        self._beat = beat
        self._step = 0
        self._episodes = 0
        self._ahead: list[list[Response]] = []
        self._controller = KlController(config.kl.coef, config.kl.target, config.kl.horizon)
        self._running = RunningMoments()

    @property
    def step(self) -> int:
        """Steps done, which is also the version of the weights."""
        return self._step

    @torch.no_grad()
    def experience(self, rollout: Rollout) -> Experience:
        """Old and reference log-probs, values, rewards, advantages and returns for this worker's share.

        Raises:
            RunError, WeightsVersionError: the rollout does not fit the step, or a frozen model's file was written over.
            RewardError: every score of the global batch was dropped.
            NonFiniteError: a score, log-prob or value is NaN or infinite; the message names the rows.
        """
        with failing_together(self._backend.device):
            sampled = samples_of(
                rollout.prompts,
                rollout.responses,
                rollout.scores,
                config=self._config,
                step=self._step,
                device=self._backend.device,
            )
        samples = sampled
        if self._config.candidates > 1:
            samples = sampled.that_differ(self._config, self._running.scale if self._config.reward_scaling else 1.0)
        known = None if self._learns_in_one_pass else self._passes(samples.sequences)
        old_BR, ref_BR, values_BR = (None, None, None) if known is None else known
        named = {"log-probs of the policy": old_BR, "log-probs of the reference": ref_BR, "values": values_BR}
        with failing_together(self._backend.device):
            refuse_non_finite({name: x_BR for name, x_BR in named.items() if x_BR is not None}, samples, self._step)
            if self._backend.device.type == "cpu":  # a GPU has a copy
                self._backend.networks.files.check()
        kl_coef = self._controller.coef
        credit = advantages_of(
            samples,
            old_BR,
            ref_BR,
            values_BR,
            config=self._config,
            kl_coef=kl_coef,
            running=self._running,
            sampled=sampled if self._config.candidates > 1 else None,
        )
        if credit.kl is not None:
            self._check_first_kl(credit.kl)
        importance_BR: Tensor | None = None
        ages: Mapping[str, float] = {}
        if old_BR is not None:
            importance_BR, ages = weighted(samples, old_BR, self._config, self._step, credit.num_responses)
        return Experience(
            samples=samples,
            old_logprobs_BR=old_BR,
            ref_logprobs_BR=ref_BR if self._config.kl.place == "loss" and kl_coef > 0 else None,
            values_BR=values_BR,
            advantages_BR=credit.advantages_BR,
            returns_BR=credit.returns_BR,
            importance_BR=importance_BR,
            kl=credit.kl,
            kl_coef=kl_coef,
            num_responses=credit.num_responses,
            metrics={**credit.metrics, **ages, **metrics_of_conversations(rollout.responses, self._backend.device)},
        )

    def update(self, experience: Experience) -> Mapping[str, float]:
        """PPO's epochs over one step's experience; one optimizer step a minibatch. The metrics are global.

        Raises:
            NonFiniteError: a loss or gradient; the weights stay as they were before that minibatch.
            RunError: the first forward pass does not reproduce the old log-probs.
        """
        config, factor = self._config, schedule_factor(self._config.lr_schedule, self._step, self._config.steps)
        totals = Totals(self._backend.device, self._config)
        # Filled by the only pass, where there is one.
        seen_BR = None if experience.old_logprobs_BR is not None else torch.zeros_like(experience.advantages_BR)
        for epoch in range(config.epochs):
            minibatches = minibatch_rows(self._seed, self._step, epoch, config.batch_size, config.minibatches)
            kept = [self._local_rows(experience.samples, rows) for rows in minibatches]
            trained = [rows[experience.samples.trained_B(self._config)[rows]] for rows in kept]
            lengths_B = experience.samples.sequences.response_lengths_B
            sizes = [
                (lengths_B[rows].sum(), all_kept.new_tensor(len(all_kept)))
                for rows, all_kept in zip(trained, kept, strict=True)
            ]
            counts = sum_over_workers(torch.stack([torch.stack(size) for size in sizes])).tolist()
            for rows, (num_tokens, num_kept) in zip(trained, counts, strict=True):
                if num_tokens == 0:  # every response of the minibatch was dropped or trains nothing, on all workers
                    continue
                first = totals.optimizer_steps == 0
                divisors = Divisors.of(self._config.loss_mean, num_tokens, num_kept, self._max_new_tokens)
                problems = self._minibatch(experience, rows.tolist(), divisors, totals, seen_BR)
                with failing_together(self._backend.device):
                    if problems:
                        raise NonFiniteError(f"learner: step {self._step}: {problems[0]}")
                if first:
                    self._check_first_ratio(totals)
                totals.add_step(self._backend.step(factor), num_tokens)
        rate = config.learning_rate * factor
        metrics = {**experience.metrics, **totals.metrics(), "lr": rate, "val/first_log_ratio": totals.first_log_ratio}
        if seen_BR is not None:
            metrics |= metrics_of_logprobs(experience.samples, seen_BR, experience.num_responses)
        if experience.kl is not None:
            self._controller.update(experience.kl, experience.num_responses)
        self._step += 1
        self._episodes += experience.num_responses
        return {**metrics, "episode": float(self._episodes)}

    def weights(self) -> Weights:
        """The policy for the rollout engines, under the current version, to be sent before the next update."""
        return Weights(self._step, GatheredBuckets(self._backend.policy_buckets, self._backend.networks.sent_dtype))

    def mean_score(self, scores: Sequence[Score]) -> float:
        """Mean score over all workers, dropped ones left out; NaN where there is none."""
        values = [score.value for score in scores if score.value is not None]
        sums = torch.tensor([sum(values), float(len(values))], dtype=torch.float64, device=self._backend.device)
        total, count = sum_over_workers(sums).tolist()
        return total / count if count else math.nan

    @property
    def ahead(self) -> Sequence[Sequence[Response]]:
        """Chunks for later steps, of all workers, that the loaded checkpoint holds."""
        return self._ahead

    def any_worker(self, mine: bool) -> bool:
        """Whether it is so on any worker."""
        return bool(max_over_workers(torch.tensor(float(mine), device=self._backend.device)) > 0)

    def save(self, folder: Path, ahead: Sequence[Sequence[Response]] = ()) -> None:
        """Everything that `load` needs to go on bit by bit: weights, optimizer, KL coefficient, moments, counters.

        Args:
            ahead: chunks of responses that this worker has for later steps.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(folder)
        if ahead:
            rows = [json.dumps([asdict(response) for response in chunk]) for chunk in ahead]
            (folder / _AHEAD.format(worker_rank())).write_text("".join(f"{row}\n" for row in rows))
        if worker_rank() == 0:
            state = {
                "step": self._step,
                "episodes": self._episodes,
                "seed": self._seed,
                "kl": self._controller.state_dict(),
                "scores": self._running.state_dict(),
            }
            (folder / "learner.json").write_text(json.dumps(state))
        wait_for_all()

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            RunError: the checkpoint is of a run with another seed.
        """
        state = json.loads((folder / "learner.json").read_text())
        if state["seed"] != self._seed:
            raise RunError(
                f"learner: {folder} is of a run with another seed; found {state['seed']}; expected {self._seed}"
            )
        self._backend.load(folder)
        self._step, self._episodes = int(state["step"]), int(state["episodes"])
        self._controller.load_state_dict(state["kl"])
        self._running.load_state_dict(state["scores"])
        self._ahead = [
            [Response.from_json(values) for values in json.loads(line)]
            for file in sorted(folder.glob(_AHEAD.format("*")))
            for line in file.read_text().splitlines()
        ]

    @property
    def _learns_in_one_pass(self) -> bool:
        """Whether nothing needs the old log-probs before the update's only pass, which has them: ratios are 1 there."""
        config = self._config
        needs = config.has_critic or self._reference is not None or config.importance is not None or config.max_lag
        return config.is_one_step and config.train_unfinished and not needs

    def _passes(self, sequences: Sequences) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs of the policy and the reference, and values: float32 (B, R), 0 on padding."""
        zeros_BR = torch.zeros(sequences.response_mask_BR.shape, device=self._backend.device)
        old_BR, values_BR = zeros_BR.clone(), zeros_BR.clone() if self._config.has_critic else None
        ref_BR = None if self._reference is None else zeros_BR.clone()
        for rows_B, batch in self._microbatches(sequences, range(len(sequences))):
            self._beat()
            old_N, _, values_N = self._policy_and_values(batch)
            found = [(old_BR, old_N)]
            if ref_BR is not None:
                found.append((ref_BR, self._backend.logprobs("reference", batch, self._temperature)[0]))
            if values_BR is not None and values_N is not None:
                found.append((values_BR, values_N))
            if rows_B is not None:
                for target_BR, source_N in found:
                    target_BR[rows_B[batch.rows_N], batch.columns_N] = source_N
        return old_BR, ref_BR, values_BR

    def _minibatch(
        self, experience: Experience, rows: list[int], divisors: Divisors, totals: Totals, seen_BR: Tensor | None
    ) -> list[str]:
        """Add up the gradients of this worker's rows of one minibatch; says which losses were not finite.

        Does not raise for them: sharded parameters are gathered in every pass, so all workers must run all passes.
        """
        problems: list[str] = []
        microbatches = list(self._microbatches(experience.samples.sequences, rows))
        for i, (rows_B, batch) in enumerate(microbatches):
            self._beat()
            last = i == len(microbatches) - 1
            logprobs_N, entropies_N, values_N = self._policy_and_values(batch)
            if rows_B is None:
                nothing = logprobs_N.sum() if values_N is None else logprobs_N.sum() + values_N.sum()
                self._backend.backward(0.0 * nothing, last=last)
                continue
            assert entropies_N is not None
            if seen_BR is not None:
                seen_BR[rows_B[batch.rows_N], batch.columns_N] = logprobs_N.detach()
            part = Part(experience, rows_B[batch.rows_N], batch.columns_N, divisors, self._config)
            policy = part.policy_loss(logprobs_N)
            value = None if values_N is None else part.value_loss(values_N)
            losses = [(policy.loss, "policy"), *([] if value is None else [(value.loss, "value")])]
            for loss, name in losses:
                if not bool(loss.isfinite()):
                    problems.append(_not_finite(loss, name, experience, rows_B))
            # One backward pass for both: ZeRO-3 overwrites gradients in a minibatch's first pass and adds in the
            # later ones, for all parameters alike, so a first pass without some would add to the last step's.
            loss = policy.loss if value is None else policy.loss + self._config.value_coef * value.loss
            self._backend.backward(loss, last=last)
            totals.add_part(policy, value, entropies_N.sum())
        return problems

    def _policy_and_values(self, batch: Sequences) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self._config.has_critic:
            return self._backend.policy_and_values(batch, self._temperature)
        return *self._backend.logprobs("policy", batch, self._temperature), None

    def _microbatches(self, sequences: Sequences, rows: Sequence[int]) -> Iterator[tuple[Tensor | None, Sequences]]:
        """(rows, their sequences); in lockstep, None and a filler once this worker's rows are used up."""
        lengths = (sequences.prompt_lengths_B.tolist(), sequences.tail_lengths_B.tolist())
        packed = pack(rows, *lengths, self._max_tokens(), padded=not self._backend.networks.packed)
        num_passes = len(packed)
        if self._backend.lockstep:
            num_passes = int(max_over_workers(torch.tensor(num_passes, device=self._backend.device)))
        for i in range(num_passes):
            if i < len(packed):
                rows_B = torch.tensor(packed[i], device=self._backend.device)
                yield rows_B, sequences.take(rows_B)
            else:
                yield None, Sequences.filler(self._backend.device)

    def _max_tokens(self) -> int:
        on_gpu = self._backend.device.type == "cuda"
        return self._config.microbatch_tokens(self._backend.networks.token_bytes(), on_gpu)

    def _local_rows(self, samples: Samples, global_rows: Tensor) -> Tensor:
        place = {row: i for i, row in enumerate(samples.places)}
        local = [place[row] for row in global_rows.tolist() if row in place]
        return torch.tensor(local, dtype=torch.long, device=self._backend.device)

    def _check_first_kl(self, kl: float) -> None:
        limit = MAX_FIRST_KL.get(self._backend.networks.dtype)
        if self._step == 0 and self._reference == "start" and limit is not None and abs(kl) > limit:
            raise RunError(
                f"learner: the KL between the untrained policy and its reference is not 0; found {kl:.3g} nats a "
                f"response; expected at most {limit}; both should be the same weights"
            )

    def _check_first_ratio(self, totals: Totals) -> None:
        totals.first_log_ratio = float(max_over_workers(totals.max_log_ratio))
        limit = MAX_FIRST_LOG_RATIO.get(self._backend.networks.dtype)
        if limit is not None and totals.first_log_ratio > limit:
            raise RunError(
                f"learner: step {self._step}: the first forward pass of the update does not repeat the old log-probs; "
                f"found a difference of {totals.first_log_ratio:.3g} nats; expected at most {limit}; the model's "
                f"forward pass is not deterministic"
            )


def _not_finite(loss: Tensor, name: str, experience: Experience, rows_B: Tensor) -> str:
    rows = sorted(experience.samples.global_rows[i] for i in rows_B.tolist())
    return (
        f"the {name} loss is {float(loss.detach())}; the micro-batch held rows {rows[:8]} of the global batch "
        f"({len(rows)} in all), which was not applied"
    )
