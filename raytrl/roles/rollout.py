"""Rollout engines: what samples responses inside a rollout actor."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytrl.algo.logprobs import token_logprobs
from raytrl.config.ppo import RolloutConfig, SamplingConfig
from raytrl.errors import NonFiniteError, WeightsVersionError
from raytrl.records import Prompt, Response, chunks
from raytrl.roles.networks import add_policy_adapter
from raytrl.roles.weights import Bucket, PolicyCopy, Weights, combined


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that an engine needs."""

    @property
    def eos_token_id(self) -> Any: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> Any: ...


class RolloutEngine(ABC):
    """Samples responses with weights of a known version.

    A fresh engine holds no version and refuses to serve: an actor that was restarted cannot answer with its first
    weights by mistake.
    """

    concurrent = False  # whether `generate` may be called from several threads at a time

    def __init__(self) -> None:
        self._version: int | None = None
        self._loading: int | None = None  # the version that is being loaded
        self._checksums: list[str] = []  # of its buckets so far

    @property
    def version(self) -> int | None:
        """The version of the loaded weights; None before the first load."""
        return self._version

    def load_weights(self, weights: Weights) -> str:
        """Load and prove them; returns the checksum of what the engine now holds.

        Raises:
            WeightsVersionError: they do not fit, or did not arrive whole; the engine then serves nothing.
        """
        self.begin_weights(weights.version)
        for tensors in weights.buckets:
            self.take_bucket(Bucket.of(tensors))
        return self.finish_weights()

    def begin_weights(self, version: int) -> None:
        """New weights are coming, bucket by bucket; until all are proven, the engine serves nothing."""
        self._version, self._loading, self._checksums = None, version, []
        self._begin()

    def take_bucket(self, bucket: Bucket) -> None:
        """Load a part of them and prove it. After an error only `begin_weights` goes on.

        Raises:
            WeightsVersionError: it does not fit, or did not arrive whole.
        """
        version, self._loading = self._loading, None
        if version is None:
            raise WeightsVersionError("rollout engine: was given weights that it was not told of; found no version")
        found = self._take(bucket)
        if found != bucket.checksum:
            raise WeightsVersionError(
                f"rollout engine: weights of version {version} are not what the learner sent; found checksum {found}; "
                f"expected {bucket.checksum}; the engine's dtype must be the one that the learner sends"
            )
        self._checksums.append(found)
        self._loading = version

    def finish_weights(self) -> str:
        """All buckets were taken: serve their version; returns the checksum of all that the engine now holds.

        Raises:
            WeightsVersionError: a part is missing, or failed.
        """
        version, self._loading = self._loading, None
        if version is None:
            raise WeightsVersionError(
                "rollout engine: weights are not whole; a bucket of them failed, or none was sent"
            )
        self._finish()
        self._version = version
        return combined(self._checksums)

    def generate(
        self, prompts: Sequence[Prompt], version: int, *, samples: int = 1, greedy: bool = False
    ) -> list[Response]:
        """`samples` responses to each prompt, ordered by (row, sample).

        A response depends on (run seed, step, row, sample), the weights and the prompts of its chunk, see
        `records.chunks`; not on what else was asked, nor on the engine that makes it. Bit-equality holds for one kind
        of processor and thread count; elsewhere logits differ in the last bits, and a sampled token changes only when
        its draw falls within that distance of a border (about 1e-6 a token in float32).

        Raises:
            WeightsVersionError: the engine holds another version than `version`.
        """
        self._check_version(version)
        return self._generate(prompts, version, samples, greedy)

    def logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response], version: int) -> list[float]:
        """The log-probability of each whole response at the sampling temperature, in nats.

        Args:
            prompts: the responses' own, in any order.
            responses: of any policy with the same token ids.

        Raises:
            WeightsVersionError: the engine holds another version than `version`.
        """
        self._check_version(version)
        return self._logprobs(prompts, responses)

    def _check_version(self, version: int) -> None:
        if self._version != version:
            raise WeightsVersionError(
                f"rollout engine: asked for responses of weights version {version}; found version {self._version}; "
                f"load_weights must come first"
            )

    def close(self) -> None:  # noqa: B027 (most engines hold nothing that outlives them)
        """Let go of threads and memory; the engine is of no use afterwards."""

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def _take(self, bucket: Bucket) -> str:
        """Returns the checksum of what the engine has of it."""

    @abstractmethod
    def _finish(self) -> None: ...

    @abstractmethod
    def _generate(self, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool) -> list[Response]: ...

    @abstractmethod
    def _logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]: ...


def response_seed(run_seed: int, step: int, row: int, sample: int) -> int:
    """An independent 63-bit seed for every response."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{row}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def response_text(
    tokenizer: Tokenizer, token_ids: Sequence[int], stop_token_ids: Sequence[int], stop: Sequence[str] | None
) -> str:
    """What reward sources read: special tokens, the stop token and everything from a stop string on removed."""
    # The stop token goes by its id: not every tokenizer counts it among the special ones.
    shown = token_ids[:-1] if token_ids[-1] in stop_token_ids else token_ids
    text = str(tokenizer.decode(list(shown), skip_special_tokens=True))
    cuts = [text.index(word) for word in stop or () if word in text]
    return text[: min(cuts)] if cuts else text


def ending_token_ids(tokenizer: Tokenizer, more: Sequence[int]) -> list[int]:
    """The tokenizer's end token, where it has one, and `more`."""
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return sorted({*own, *more})


class TransformersEngine(RolloutEngine):
    """Any Hugging Face causal language model, batch by batch, with a key-value cache."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        *,
        seed: int,
        stop_token_ids: Sequence[int] = (),
        chunk_prompts: int = 8,
    ) -> None:
        """`stop_token_ids` are added to the tokenizer's end token; `seed` is the run's."""
        super().__init__()
        self._model = model.eval()
        self._copy = PolicyCopy(model)
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._seed = seed
        self._stop_token_ids = torch.tensor(ending_token_ids(tokenizer, stop_token_ids), dtype=torch.long)
        self._chunk_prompts = chunk_prompts

    @classmethod
    def from_pretrained(
        cls,
        model_path: str,
        tokenizer_path: str,
        rollout: RolloutConfig,
        *,
        seed: int,
        lora: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> "TransformersEngine":
        """An engine for the learner's model; `lora` and `dtype` must be the learner's, or no weights will fit.

        `rollout.engine_args` go to the model's `from_pretrained`. End tokens are the tokenizer's and those of the
        model's generation config.
        """
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, trust_remote_code=trust_remote_code, **rollout.engine_args
        )
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
        )

    def _begin(self) -> None:
        self._copy.begin()

    def _take(self, bucket: Bucket) -> str:
        return self._copy.take(bucket.tensors)

    def _finish(self) -> None:
        self._copy.finish()

    def _generate(self, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool) -> list[Response]:
        responses: list[Response] = []
        for chunk in chunks(prompts, self._chunk_prompts):
            rows = [(prompt, sample) for prompt in chunk for sample in range(samples)]
            drawn = self._sample([prompt.token_ids for prompt, _ in rows], self._draws(rows, greedy))
            for i, (prompt, sample) in enumerate(rows):
                responses.append(self._response(prompt, sample, drawn, i, version))
        return responses

    @torch.inference_mode()
    def _logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        by_row = {prompt.row: prompt.token_ids for prompt in prompts}
        device = next(self._model.parameters()).device
        sums: list[float] = []
        for start in range(0, len(responses), self._chunk_prompts):
            batch = responses[start : start + self._chunk_prompts]
            prompt_BP, prompt_mask_BP = _left_padded([by_row[response.row] for response in batch], device)
            tokens_BR, mask_BR = (t.flip(-1) for t in _left_padded([r.token_ids[::-1] for r in batch], device))
            mask_BT = torch.cat([prompt_mask_BP, mask_BR], dim=-1)
            logits_BRV = self._model(
                input_ids=torch.cat([prompt_BP, tokens_BR], dim=-1),
                attention_mask=mask_BT,
                position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=tokens_BR.shape[1] + 1,
            ).logits[:, :-1]
            logprobs_BR = token_logprobs(logits_BRV, tokens_BR, self._sampling.temperature)
            sums += (logprobs_BR.double() * mask_BR).sum(-1).tolist()
        return sums

    def _draws(self, rows: Sequence[tuple[Prompt, int]], greedy: bool) -> Tensor | None:
        """One uniform number a token, float64 (B, R), each row from a generator of its own; None when greedy."""
        if greedy:
            return None
        draws = []
        for prompt, sample in rows:
            generator = torch.Generator().manual_seed(response_seed(self._seed, prompt.step, prompt.row, sample))
            draws.append(torch.rand(self._sampling.max_new_tokens, dtype=torch.float64, generator=generator))
        return torch.stack(draws)

    @torch.inference_mode()
    def _sample(self, prompts: Sequence[Sequence[int]], draws_BR: Tensor | None) -> "_Drawn":
        """Sample until every row has ended or is full. Rows that ended go on in the batch and are cut afterwards."""
        device = next(self._model.parameters()).device
        input_ids, mask = _left_padded(prompts, device)
        drawn = _Drawn.empty(len(prompts), self._sampling.max_new_tokens)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache: Any = None
        for t in range(self._sampling.max_new_tokens):
            out = self._model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            logits_BV = out.logits[:, -1].float().cpu()
            draws_B = None if draws_BR is None else draws_BR[:, t]
            tokens_B = _pick(logits_BV, draws_B, self._sampling.temperature)
            logprobs_B = token_logprobs(logits_BV.unsqueeze(1), tokens_B.unsqueeze(1), self._sampling.temperature)
            drawn.append(t, tokens_B, logprobs_B.squeeze(1), self._ends(drawn, tokens_B, t))
            if bool((drawn.lengths_B > 0).all()):
                break
            input_ids = tokens_B.to(device).unsqueeze(-1)
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=-1)
            positions = positions[:, -1:] + 1
        return drawn

    def _ends(self, drawn: "_Drawn", tokens_B: Tensor, t: int) -> Tensor:
        """True where this token, the t-th, ends its row."""
        ends_B = torch.isin(tokens_B, self._stop_token_ids)
        if self._sampling.stop:
            for i in range(len(tokens_B)):
                if drawn.lengths_B[i] == 0 and not ends_B[i]:
                    text = self._decode([*drawn.tokens_BR[i, :t].tolist(), int(tokens_B[i])])
                    ends_B[i] = any(stop in text for stop in self._sampling.stop)
        return ends_B

    def _response(self, prompt: Prompt, sample: int, drawn: "_Drawn", i: int, version: int) -> Response:
        ended = bool(drawn.lengths_B[i] > 0)
        length = int(drawn.lengths_B[i]) if ended else self._sampling.max_new_tokens
        token_ids = tuple(drawn.tokens_BR[i, :length].tolist())
        return Response(
            step=prompt.step,
            row=prompt.row,
            sample=sample,
            token_ids=token_ids,
            text=response_text(self._tokenizer, token_ids, self._stop_token_ids.tolist(), self._sampling.stop),
            ended=ended,
            sampling_logprobs=tuple(drawn.logprobs_BR[i, :length].tolist()),
            policy_version=version,
        )

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


@dataclass
class _Drawn:
    """Tokens and log-probs so far; `lengths_B` is 0 for a row that goes on."""

    tokens_BR: Tensor
    logprobs_BR: Tensor
    lengths_B: Tensor

    @classmethod
    def empty(cls, rows: int, width: int) -> "_Drawn":
        tokens_BR = torch.zeros(rows, width, dtype=torch.long)
        return cls(tokens_BR, torch.zeros(rows, width), torch.zeros(rows, dtype=torch.long))

    def append(self, t: int, tokens_B: Tensor, logprobs_B: Tensor, ends_B: Tensor) -> None:
        self.tokens_BR[:, t] = tokens_B
        self.logprobs_BR[:, t] = logprobs_B
        self.lengths_B[ends_B & (self.lengths_B == 0)] = t + 1


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both int64 (B, P). Padding holds id 0, which only the mask tells from a real 0."""
    width = max(len(ids) for ids in prompts)
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(prompts):
        input_ids[i, width - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        mask[i, width - len(ids) :] = 1
    return input_ids.to(device), mask.to(device)


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
