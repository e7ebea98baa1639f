"""The loop's `Generator` and `Scorer` on pools of actors: one of each in every learner worker."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from raytrl.config.engines import CPU_SEQUENCES
from raytrl.config.ppo import RolloutConfig
from raytrl.config.reward import RewardSection
from raytrl.errors import RunError, WeightsVersionError
from raytrl.launch.actors import MAX_IN_FLIGHT
from raytrl.launch.pool import Pool, Request
from raytrl.launch.transport import Receivers, SentWeights
from raytrl.records import Attempt, Prompt, Response, Score, chunks
from raytrl.roles.reward.call import Pair
from raytrl.roles.reward.sources import check_dropped
from raytrl.roles.weights.buckets import Weights

Share = Callable[[Weights, Receivers], SentWeights]


class RolloutPool:
    """`ppo.protocols.Generator` on rollout actors."""

    def __init__(self, pool: Pool, rollout: RolloutConfig, *, samples: int, attempt: Attempt, share: Share) -> None:
        """
        Args:
            samples: responses per prompt.
            attempt: of the learner group; the actors refuse requests of earlier ones.
            share: gets the weights, once for all workers, to the actors, or where they can take them. Collective.
        """
        self._pool, self._rollout, self._samples = pool, rollout, samples
        self._attempt, self._share = attempt, share
        self._version: int | None = None

    @property
    def num_up(self) -> int:
        """Actors that serve at the moment, as far as this worker knows."""
        return len(self._pool.up)

    def load_weights(self, weights: Weights) -> None:
        """Every actor that can be reached proves version and checksum; the others have to before they serve.

        They load each bucket while the next one is on its way.
        """
        first, complete = self._version is None, len(self._pool.up) == self._pool.size
        self._version = None
        if first:
            self._pool.tell_all("begin", self._attempt)  # what an earlier attempt still asks for need not be waited for
        self._pool.forget()  # the last version's buckets, so that the object store does not hold two
        sent = self._share(weights, Receivers(self._tell, self._agree, self._pool.size, complete))
        self._pool.prepare_all(
            "load_weights",
            self._attempt,
            sent.version,
            sent.checksum,
            sent.num_buckets,
            *sent.buckets,
            expect=(sent.version, sent.checksum),
            timeout_s=self._rollout.start_timeout_s if first else None,  # the models are still being loaded
        )
        self._version = sent.version

    def _tell(self, method: str, version: int, *arguments: Any) -> None:
        self._pool.tell_all(method, self._attempt, version, *arguments)

    def _agree(self, method: str, version: int, *arguments: Any) -> bool:
        return self._pool.all_answer(
            True, method, self._attempt, version, *arguments, timeout_s=self._rollout.timeout_s
        )

    def generate(self, prompts: Sequence[Prompt], version: int, *, greedy: bool) -> Iterable[Sequence[Response]]:
        if version != self._version:
            raise WeightsVersionError(f"asked for responses of version {version}; the actors have {self._version}")
        samples = 1 if greedy else self._samples
        for chunk in chunks(prompts, self._rollout.chunk_prompts):
            bare = [replace(prompt, columns={}) for prompt in chunk]  # the columns are for reward functions
            self._pool.send(
                Request(
                    name=f"rows {bare[0].row} to {bare[-1].row} of step {bare[0].step}",
                    place=bare[0].row // self._rollout.chunk_prompts,
                    method="generate",
                    arguments=(self._attempt, bare, version, samples, greedy),
                )
            )
        return self._responses()

    def logprobs(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], version: int
    ) -> dict[tuple[int, int], float]:
        """(row, sample) → log-probability of the whole response under the weights of `version`, nats."""
        by_row: dict[int, list[Response]] = {}
        for response in responses:
            by_row.setdefault(response.row, []).append(response)
        for chunk in chunks(prompts, self._rollout.chunk_prompts):
            bare = [replace(prompt, columns={}) for prompt in chunk]
            theirs = [response for prompt in bare for response in by_row[prompt.row]]
            name = f"log-probabilities of rows {bare[0].row} to {bare[-1].row}"
            place = bare[0].row // self._rollout.chunk_prompts
            self._pool.send(Request(name, place, "logprobs", (self._attempt, bare, theirs, version)))
        found: dict[tuple[int, int], float] = {}
        for request, values in self._pool.answers():
            for response, value in zip(request.arguments[2], values, strict=True):
                found[response.row, response.sample] = value
        return found

    def _responses(self) -> Iterator[Sequence[Response]]:
        """Whole chunks, each when it is done: what scores them sees the same batches in every run."""
        for request, responses in self._pool.answers():
            _, prompts, version, samples, _ = request.arguments
            wanted = [(prompt.step, prompt.row, sample, version) for prompt in prompts for sample in range(samples)]
            if [(r.step, r.row, r.sample, r.policy_version) for r in responses] != wanted:
                raise RunError(f"rollout actors: the answer to {request.name} is not what was asked for; please report")
            yield responses


class RewardPool:
    """`ppo.protocols.Scorer` on reward actors."""

    def __init__(
        self,
        pool: Pool,
        section: RewardSection,
        *,
        attempt: Attempt,
        start_timeout_s: float,
        gather: Callable[[Sequence[Score]], Sequence[Score]],
    ) -> None:
        """
        Args:
            gather: the scores of all workers, on every worker; collective.
        """
        self._pool, self._section, self._attempt, self._gather = pool, section, attempt, gather
        self._start_timeout_s, self._started, self._sent = start_timeout_s, False, 0
        self._prompts: Sequence[Prompt] = ()
        self._by_row: dict[int, Prompt] = {}

    def submit(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> None:
        if not self._started:
            self._pool.prepare_all("prepare", self._attempt, timeout_s=self._start_timeout_s)
            self._started = True
        if (
            prompts is not self._prompts
        ):  # a batch comes in many chunks: to index it for each would grow with its square
            self._prompts, self._by_row = prompts, {prompt.row: prompt for prompt in prompts}
        pairs: list[Pair] = [(self._by_row[response.row], response) for response in responses]
        first = responses[0]
        name = f"scores of rows {first.row} to {responses[-1].row} of step {first.step}"
        self._pool.send(Request(name, self._sent, "score", (self._attempt, pairs)))
        self._sent += 1

    def collect(self) -> list[Score]:
        scores = [score for _, answer in self._pool.answers() for score in answer]
        if self._section.on_error == "drop":  # judged over the step's whole batch, whoever scored it
            check_dropped(self._gather(scores), self._section.drop_budget)
        return scores


def requests_in_flight(rollout: RolloutConfig, samples: int) -> int:
    """Chunks that a rollout actor should have at a time: one at work and one that waits, or enough to fill vLLM's batch.

    Half as many again as its batch holds: of those at work some responses have ended already.
    """
    if rollout.engine != "vllm":
        return 2
    sequences = rollout.engine_args.get("max_num_seqs") or (1024 if rollout.resources.get("GPU") else CPU_SEQUENCES)
    return min(MAX_IN_FLIGHT, -(-3 * sequences // (2 * samples * rollout.chunk_prompts)) + 1)


def scoring_limit_s(rollout: RolloutConfig, reward: RewardSection, responses_per_prompt: int) -> float:
    """A reward actor's sources have limits of their own; the pool's must not come before them."""
    pairs = rollout.chunk_prompts * responses_per_prompt
    slowest = 0.0
    for source in reward.sources:
        batches = -(-pairs // (source.batch_size or pairs))
        slowest = max(slowest, batches * (source.retries + 1) * (source.timeout_s + 8.0))
    return rollout.timeout_s + slowest
