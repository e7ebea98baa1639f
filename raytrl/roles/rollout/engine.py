"""What a rollout engine is: prompts in, responses out, by the weights of one version."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from raytrl.errors import WeightsVersionError
from raytrl.records.samples import Prompt, Response
from raytrl.roles.weights.buckets import Bucket, Weights, combined


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
        `records.samples.chunks`; not on what else was asked, nor on the engine that makes it. Bit-equality holds for one kind
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
