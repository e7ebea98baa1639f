"""What a rollout engine is: prompts in, responses out, by the weights of one version."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from raytrl.config.sections.rollout import SamplingSection
from raytrl.errors import NonFiniteError, WeightsVersionError
from raytrl.records.samples import Prompt, Response, chunks
from raytrl.roles.models.tokenizer import turn_end
from raytrl.roles.weights.buckets import Bucket, Weights, combined

Wanted = Callable[[], bool]

_TAIL_TOKENS = 16  # of a prompt: enough for whole characters and a word


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that an engine needs."""

    @property
    def eos_token_id(self) -> Any: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> Any: ...


@dataclass(frozen=True)
class Turn:
    """What the policy is to go on from."""

    prompt: Prompt
    token_ids: Sequence[int]  # all of the context: the prompt's, and in a conversation what came behind it
    seed: int
    room: int  # tokens at most


@dataclass(frozen=True)
class Sampled:
    """One turn of the policy."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # NaN where the engine gave none
    ended: bool  # by an end token or a stop string


class Conversations(Protocol):
    """Makes conversations of prompts (`episodes.Episodes`)."""

    def responses(
        self,
        engine: "RolloutEngine",
        prompts: Sequence[Prompt],
        version: int,
        samples: int,
        greedy: bool,
        wanted: Wanted,
    ) -> list[Response]: ...


class RolloutEngine(ABC):
    """Samples responses with weights of a known version, or of several that it holds side by side.

    A fresh engine holds no version and refuses to serve: an actor that was restarted cannot answer with its first
    weights by mistake.
    """

    concurrent = False  # whether `generate` may be called from several threads at a time

    def __init__(self, num_versions: int = 1) -> None:
        """`num_versions`: how many it holds; one more takes the place of the oldest. With several, weights come while it
        samples."""
        self.num_versions = num_versions
        self.conversations: Conversations | None = None  # who turns prompts into more than one turn each
        self._versions: list[int] = []  # in the order in which they came
        self._loading: int | None = None  # the version that is being loaded
        self._checksums: list[str] = []  # of its buckets so far

    @property
    def versions(self) -> Sequence[int]:
        """Those that it serves; none before the first load."""
        return tuple(self._versions)

    def load_weights(self, weights: Weights) -> str:
        """Load and prove them; returns the checksum of what the engine now holds.

        Raises:
            WeightsVersionError: they do not fit, or did not arrive whole; the engine does not serve them then.
        """
        self.begin_weights(weights.version)
        for tensors in weights.buckets:
            self.take_bucket(Bucket.of(tensors))
        return self.finish_weights()

    def begin_weights(self, version: int) -> None:
        """New weights are coming, bucket by bucket; until all are proven, they are not served, nor is the oldest version
        where there is no room for another."""
        self._loading, self._checksums = version, []
        if version in self._versions:
            self._lose(version)
        while len(self._versions) >= self.num_versions:
            self._lose(min(self._versions))
        self._begin()

    def forget_weights(self) -> None:
        """Nothing is served until new weights have come."""
        for version in tuple(self._versions):
            self._lose(version)

    def _lose(self, version: int) -> None:
        self._versions.remove(version)
        self._drop(version)

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
        self._finish(version)
        self._versions.append(version)
        return combined(self._checksums)

    def generate(
        self,
        prompts: Sequence[Prompt],
        version: int,
        *,
        samples: int = 1,
        greedy: bool = False,
        wanted: Wanted = lambda: True,
    ) -> list[Response]:
        """`samples` responses to each prompt, ordered by (row, sample).

        A response depends on (run seed, step, row, sample), the weights and the prompts of its chunk, see
        `records.samples.chunks`; not on what else was asked, nor on the engine that makes it. Bit-equality holds for one kind
        of processor and thread count; elsewhere logits differ in the last bits, and a sampled token changes only when
        its draw falls within that distance of a border (about 1e-6 a token in float32).

        Args:
            wanted: is asked between tokens; sampling ends as soon as it says no.

        Raises:
            WeightsVersionError: the engine holds another version than `version`.
            StaleAttemptError: the responses are not wanted any more.
        """
        self._check_version(version)
        found = self.responses(prompts, version, samples, greedy, wanted)
        # A fault at one token costs its correction; at all of them it is the weights'.
        logprobs = [logprob for response in found for logprob in response.sampling_logprobs]
        if logprobs and all(map(math.isnan, logprobs)):
            rows = f"rows {found[0].row} to {found[-1].row} of step {found[0].step}"
            raise NonFiniteError(f"rollout engine: {rows}: no log-probability is finite; the weights are broken")
        return found

    def responses(
        self, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool, wanted: Wanted
    ) -> list[Response]:
        """`generate`, of a version that it holds."""
        if self.conversations is not None:
            return self.conversations.responses(self, prompts, version, samples, greedy, wanted)
        return self._generate(prompts, version, samples, greedy, wanted)

    def logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response], version: int) -> list[float]:
        """The log-probability of each whole response at the sampling temperature, in nats.

        Args:
            prompts: the responses' own, in any order.
            responses: of any policy with the same token ids.

        Raises:
            WeightsVersionError: the engine holds another version than `version`.
        """
        self._check_version(version)
        return self._logprobs(prompts, responses, version)

    def _check_version(self, version: int) -> None:
        if version not in self._versions:
            raise WeightsVersionError(
                f"rollout engine: asked for responses of weights version {version}; found version "
                f"{', '.join(map(str, self._versions)) or None}; load_weights must come first"
            )

    def close(self) -> None:  # noqa: B027 (most engines hold nothing that outlives them)
        """Let go of threads and memory; the engine is of no use afterwards."""

    def _drop(self, version: int) -> None:  # noqa: B027 (most engines hold one version, which is written over)
        """It is not served any more."""

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def _take(self, bucket: Bucket) -> str:
        """Returns the checksum of what the engine has of it."""

    @abstractmethod
    def _finish(self, version: int) -> None: ...

    @abstractmethod
    def submit(self, turns: Sequence[Turn], version: int, greedy: bool, wanted: Wanted) -> "list[Future[Sampled]]":
        """A turn of the policy each, by weights that it holds. One that samples batch by batch takes these as one, and
        returns when they are done."""

    @abstractmethod
    def _generate(
        self, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool, wanted: Wanted
    ) -> list[Response]: ...

    @abstractmethod
    def _logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response], version: int) -> list[float]: ...


class SamplingEngine(RolloutEngine):
    """An engine with one model, whose responses are what it samples at a turn."""

    def __init__(
        self,
        tokenizer: "Tokenizer",
        sampling: SamplingSection,
        *,
        seed: int,
        stop_token_ids: Sequence[int],
        chunk_prompts: int,
        num_versions: int,
    ) -> None:
        """`stop_token_ids` are the model's own, see `Endings`; `seed` is the run's."""
        super().__init__(num_versions)
        self._tokenizer, self._sampling, self._seed, self._chunk_prompts = tokenizer, sampling, seed, chunk_prompts
        self._endings, self._stop = Endings(tokenizer, stop_token_ids), StopStrings(tokenizer, sampling.stop)

    @property
    def turn_end_ids(self) -> Sequence[int]:
        """What ends a turn of a conversation."""
        return self._endings.of_chat

    def _generate(
        self, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool, wanted: Wanted
    ) -> list[Response]:
        asked: list[tuple[Prompt, int, Future[Sampled]]] = []
        for chunk in chunks(prompts, self._chunk_prompts):
            rows = [(prompt, sample) for prompt in chunk for sample in range(samples)]
            turns = [
                Turn(
                    prompt,
                    prompt.token_ids,
                    response_seed(self._seed, prompt.step, prompt.row, sample),
                    self._sampling.max_new_tokens,
                )
                for prompt, sample in rows
            ]
            futures = self.submit(turns, version, greedy, wanted)
            asked += [(*row, future) for row, future in zip(rows, futures, strict=True)]
        return [self._response(prompt, sample, future.result(), version) for prompt, sample, future in asked]

    def _response(self, prompt: Prompt, sample: int, turn: Sampled, version: int) -> Response:
        return Response(
            step=prompt.step,
            row=prompt.row,
            sample=sample,
            token_ids=turn.token_ids,
            text=response_text(self._tokenizer, prompt, turn.token_ids, self._endings.of(prompt), self._sampling.stop),
            ended=turn.ended,
            sampling_logprobs=turn.logprobs,
            policy_version=version,
        )


def response_seed(run_seed: int, step: int, row: int, sample: int) -> int:
    """An independent 63-bit seed for every response."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{row}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def response_text(
    tokenizer: Tokenizer,
    prompt: Prompt,
    token_ids: Sequence[int],
    stop_token_ids: Sequence[int],
    stop: Sequence[str] | None,
) -> str:
    """What reward sources read: special tokens, the stop token and everything from a stop string on removed."""
    # The stop token goes by its id: not every tokenizer counts it among the special ones.
    shown = token_ids[:-1] if token_ids[-1] in stop_token_ids else token_ids
    text = continued_text(tokenizer, prompt, shown)
    cuts = [text.index(word) for word in stop or () if word in text]
    return text[: min(cuts)] if cuts else text


def continued_text(tokenizer: Tokenizer, prompt: Prompt, token_ids: Sequence[int]) -> str:
    """The response as it goes on from its prompt, special tokens removed.

    SentencePiece-like tokenizers drop the space before the first word of whatever they decode, so a text that goes on is
    decoded with its prompt's last tokens before it. An assistant's turn begins a text of its own.
    """
    alone = str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    if not token_ids or (is_chat(prompt) and prompt.text[-1]["role"] != "assistant"):  # type: ignore[index]
        return alone
    tail = list(prompt.token_ids[-_TAIL_TOKENS:])
    before = str(tokenizer.decode(tail, skip_special_tokens=True))
    both = str(tokenizer.decode([*tail, *token_ids], skip_special_tokens=True))
    # Not so where the prompt ends within a character: its first bytes cannot be told from the response's.
    return both[len(before) :] if before and both.startswith(before) else alone


class StopStrings:
    """Looks for stop strings after each token of a response, at a cost that does not grow with it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] | None) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop or ())
        # A token has a byte or more of the text; the others are for those that have none, and for the text's first space.
        self.window = max((len(word.encode()) for word in self._stop), default=0) + _TAIL_TOKENS

    def __bool__(self) -> bool:
        return bool(self._stop)

    def may_end(self, tail: Sequence[int]) -> bool:
        """Whether a response that had none may have one since its last token; `tail`: its last `window` tokens."""
        if len(tail) < self.window:  # the response begins in it, with a space that decoding alone may drop
            return True
        text = str(self._tokenizer.decode(list(tail), skip_special_tokens=True))
        return any(word in text for word in self._stop)

    def are_in(self, prompt: Prompt, token_ids: Sequence[int]) -> bool:
        """Whether one is in the response: the whole of it is decoded."""
        text = continued_text(self._tokenizer, prompt, token_ids) if self._stop else ""
        return any(word in text for word in self._stop)


def is_chat(prompt: Prompt) -> bool:
    """Whether the prompt is a conversation, so that the response is a turn of it."""
    return not isinstance(prompt.text, str)


def ending_token_ids(tokenizer: Tokenizer, more: Sequence[int]) -> list[int]:
    """The tokenizer's end token, where it has one, and `more`."""
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return sorted({*own, *more})


class Endings:
    """Which tokens end a response: the tokenizer's end token and the model's own; in a conversation, the turn's as well."""

    def __init__(self, tokenizer: Tokenizer, more: Sequence[int]) -> None:
        """`more` are those of the generation config."""
        self._of_text = ending_token_ids(tokenizer, more)
        turn = turn_end(tokenizer)
        self.of_chat = sorted({*self._of_text, *(() if turn is None else (turn[0],))})

    def of(self, prompt: Prompt) -> list[int]:
        """Of a response to this prompt, ascending."""
        return self.of_chat if is_chat(prompt) else self._of_text
