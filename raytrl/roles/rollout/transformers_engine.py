"""Rollouts by transformers: any causal language model, batch by batch."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from raytrl.algo.logprobs import token_logprobs
from raytrl.config.sections.rollout import RolloutSection, SamplingSection
from raytrl.errors import NonFiniteError, StaleAttemptError
from raytrl.records.samples import Prompt, Response
from raytrl.roles.models.adapters import add_policy_adapter
from raytrl.roles.models.loading import load_model
from raytrl.roles.rollout.decoding import Decoding, left_padded
from raytrl.roles.rollout.engine import Sampled, SamplingEngine, Tokenizer, Turn, Wanted
from raytrl.roles.weights.buckets import Bucket, PolicyCopy

# Rows that have ended leave the batch once they are so large a part of it: the cache is copied then, as with each token.
_ENDED_LEAVE = 0.25


class TransformersEngine(SamplingEngine):
    """Any Hugging Face causal language model, batch by batch, with a key-value cache."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        sampling: SamplingSection,
        *,
        seed: int,
        stop_token_ids: Sequence[int] = (),
        chunk_prompts: int = 8,
        num_versions: int = 1,
    ) -> None:
        """`stop_token_ids` are the model's own, see `Endings`; `seed` is the run's."""
        super().__init__(
            tokenizer,
            sampling,
            seed=seed,
            stop_token_ids=stop_token_ids,
            chunk_prompts=chunk_prompts,
            num_versions=num_versions,
        )
        self._model = model.eval()
        self._copy = PolicyCopy(model)

    @classmethod
    def from_pretrained(
        cls,
        model_path: str,
        tokenizer_path: str,
        rollout: RolloutSection,
        *,
        seed: int,
        lora: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        trust_remote_code: bool = False,
        num_versions: int = 1,
    ) -> "TransformersEngine":
        """An engine for the learner's model; `lora` and `dtype` must be the learner's, or no weights will fit.

        `rollout.engine_args` go to the model's `from_pretrained`. End tokens are the tokenizer's and those of the
        model's generation config.
        """
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code, **rollout.engine_args}
        model = load_model(model_path, "causal", "rollout engine", **options)
        ends = model.generation_config.eos_token_id
        stop_token_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code)
        policy = model if lora is None else add_policy_adapter(model, lora)
        return cls(
            policy.to(device),
            tokenizer,
            rollout.sampling,
            seed=seed,
            stop_token_ids=stop_token_ids,
            chunk_prompts=rollout.chunk_prompts,
            num_versions=num_versions,
        )

    def _begin(self) -> None:
        self._copy.begin()

    def _drop(self, version: int) -> None:
        self._copy.drop(version)

    def _take(self, bucket: Bucket) -> str:
        return self._copy.take(bucket.tensors)

    def _finish(self, version: int) -> None:
        self._copy.finish(version)

    def submit(self, turns: Sequence[Turn], version: int, greedy: bool, wanted: Wanted) -> "list[Future[Sampled]]":
        self._use(version)
        drawn = self._sample(turns, None if greedy else _draws(turns), wanted)
        done: list[Future[Sampled]] = [Future() for _ in turns]
        for i, future in enumerate(done):
            future.set_result(drawn.row(i))
        return done

    def _logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response], version: int) -> list[float]:
        self._use(version)
        return self._sums_of(prompts, responses)

    def _use(self, version: int) -> None:
        if self.num_versions > 1:  # a single one lies in the model's own memory
            self._copy.use(version)

    @torch.inference_mode()
    def _sums_of(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        by_row = {prompt.row: prompt for prompt in prompts}
        device = next(self._model.parameters()).device
        sums: list[float] = []
        for start in range(0, len(responses), self._chunk_prompts):
            batch = responses[start : start + self._chunk_prompts]
            prompt_BP, prompt_mask_BP = left_padded([r.prompt_of(by_row[r.row]).token_ids for r in batch], device)
            tokens_BR, mask_BR = (t.flip(-1) for t in left_padded([r.token_ids[::-1] for r in batch], device))
            mask_BT = torch.cat([prompt_mask_BP, mask_BR], dim=-1)
            logits_BRV = self._model(
                input_ids=torch.cat([prompt_BP, tokens_BR], dim=-1),
                attention_mask=mask_BT,
                position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=tokens_BR.shape[1] + 1,
            ).logits[:, :-1]
            logprobs_BR = token_logprobs(logits_BRV, tokens_BR, self._sampling.temperature)
            sampled_BR = torch.zeros_like(mask_BR)
            for i, response in enumerate(batch):
                for first, last in response.sampled:
                    sampled_BR[i, first:last] = 1
            sums += (logprobs_BR.double() * sampled_BR).sum(-1).tolist()
        return sums

    @torch.inference_mode()
    def _sample(self, turns: Sequence[Turn], draws_BR: Tensor | None, wanted: Wanted) -> "_Drawn":
        """Sample until every row has ended or is full. Some rows that are done may go on in the batch, and are cut afterwards."""
        device = next(self._model.parameters()).device
        draws_BR = None if draws_BR is None else draws_BR.to(device)
        decoding = Decoding(self._model, [turn.token_ids for turn in turns], device)
        drawn = _Drawn.of([turn.room for turn in turns])
        rows_B = torch.arange(len(turns))
        for t in range(max(turn.room for turn in turns)):
            if not wanted():
                raise StaleAttemptError("rollout engine: not wanted any more")
            logits_BV = decoding.logits()
            draws_B = None if draws_BR is None else draws_BR[:, t]
            tokens_B = _pick(logits_BV, draws_B, self._sampling.temperature)
            logprobs_B = token_logprobs(logits_BV.unsqueeze(1), tokens_B.unsqueeze(1), self._sampling.temperature)
            decoding.append(tokens_B)
            tokens_B = tokens_B.cpu()  # with the log-probs all that leaves the device
            ends_B = self._ends(turns, drawn, rows_B, tokens_B, t)
            go_on_B = drawn.append(t, rows_B, tokens_B, logprobs_B.squeeze(1).cpu(), ends_B)
            if not bool(go_on_B.any()):
                break
            if int((~go_on_B).sum()) >= _ENDED_LEAVE * len(rows_B):
                kept = go_on_B.nonzero().flatten()
                rows_B, kept = rows_B[kept], kept.to(device)
                draws_BR = None if draws_BR is None else draws_BR[kept]
                decoding.keep(kept)
        return drawn

    def _ends(self, turns: Sequence[Turn], drawn: "_Drawn", rows_B: Tensor, tokens_B: Tensor, t: int) -> Tensor:
        """True where this token, the t-th, ends its row."""
        rows, tokens = rows_B.tolist(), tokens_B.tolist()
        ends = [token in self._endings.of(turns[row].prompt) for row, token in zip(rows, tokens, strict=True)]
        if self._stop:
            first = max(0, t + 1 - self._stop.window)
            for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                if drawn.lengths_B[row] == 0 and not ends[i]:
                    may_end = self._stop.may_end([*drawn.tokens_BR[row, first:t].tolist(), token])
                    made = [*drawn.tokens_BR[row, :t].tolist(), token]
                    ends[i] = may_end and self._stop.are_in(turns[row].prompt, made)
        return torch.tensor(ends)


def _draws(turns: Sequence[Turn]) -> Tensor:
    """One uniform number a token, float64 (B, R), each row from a generator of its own; 0 behind a row's room."""
    draws_BR = torch.zeros(len(turns), max(turn.room for turn in turns), dtype=torch.float64)
    for i, turn in enumerate(turns):
        generator = torch.Generator().manual_seed(turn.seed)
        draws_BR[i, : turn.room] = torch.rand(turn.room, dtype=torch.float64, generator=generator)
    return draws_BR


@dataclass
class _Drawn:
    """Tokens and log-probs so far; `lengths_B` is 0 for a row that goes on."""

    tokens_BR: Tensor
    logprobs_BR: Tensor
    lengths_B: Tensor
    ended_B: Tensor
    rooms_B: Tensor

    @classmethod
    def of(cls, rooms: Sequence[int]) -> "_Drawn":
        """None yet; `rooms`: tokens of each row at most."""
        rows, width = len(rooms), max(rooms)
        tokens_BR, lengths_B = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        return cls(tokens_BR, torch.zeros(rows, width), lengths_B, lengths_B.bool(), torch.tensor(rooms))

    def append(self, t: int, rows_B: Tensor, tokens_B: Tensor, logprobs_B: Tensor, ends_B: Tensor) -> Tensor:
        """The t-th token of these rows; True where a row goes on."""
        self.tokens_BR[rows_B, t] = tokens_B
        self.logprobs_BR[rows_B, t] = logprobs_B
        going_B = self.lengths_B[rows_B] == 0
        done_B = going_B & (ends_B | (self.rooms_B[rows_B] == t + 1))
        self.lengths_B[rows_B[done_B]] = t + 1
        self.ended_B[rows_B[going_B & ends_B]] = True
        return going_B & ~done_B

    def row(self, i: int) -> Sampled:
        length = int(self.lengths_B[i])
        tokens, logprobs = self.tokens_BR[i, :length].tolist(), self.logprobs_BR[i, :length].tolist()
        return Sampled(tuple(tokens), tuple(logprobs), bool(self.ended_B[i]))


def _pick(logits_BV: Tensor, draws_B: Tensor | None, temperature: float) -> Tensor:
    """The likeliest token (draws None), or the one in whose slice of the cumulated distribution the draw falls."""
    if not bool(logits_BV.isfinite().any(-1).all()) or bool(logits_BV.isnan().any()):
        raise NonFiniteError("rollout engine: the policy's logits are NaN or all infinite; the weights are broken")
    if draws_B is None:
        return logits_BV.argmax(-1)
    cumulated_BV = torch.softmax(logits_BV.double() / temperature, dim=-1).cumsum(-1)
    # right=True: the first token whose cumulated probability is *above* the draw, never one of probability 0.
    point_B1 = draws_B.unsqueeze(-1) * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, point_B1, right=True).squeeze(-1).clamp(max=logits_BV.shape[-1] - 1)
