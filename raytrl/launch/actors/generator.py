"""The loop's `Generator` on a pool of rollout actors, one in every learner worker."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from raytrl.config.runs.rollout import RolloutRun
from raytrl.config.sections.engines import CPU_SEQUENCES
from raytrl.config.sections.rollout import RolloutSection
from raytrl.errors import RunError, WeightsVersionError
from raytrl.launch.actors.base import MAX_IN_FLIGHT
from raytrl.launch.actors.calls import RayCalls
from raytrl.launch.actors.pool import Pool, Request
from raytrl.launch.actors.transport import Receivers, SentWeights
from raytrl.launch.session.gauges import RoleGauges
from raytrl.records.samples import Attempt, Prompt, Response, chunks
from raytrl.roles.context import WorkerContext
from raytrl.roles.weights.buckets import Weights

SendWeights = Callable[[Weights, Receivers], SentWeights]


class PoolGenerator:
    """`loop.protocols.Generator` on rollout actors."""

    def __init__(
        self,
        pool: Pool,
        rollout: RolloutSection,
        *,
        samples: int,
        attempt: Attempt,
        send_weights: SendWeights,
        team: WorkerContext | None = None,
    ) -> None:
        """
        Args:
            samples: responses per prompt.
            attempt: of the learner group; the actors refuse requests of earlier ones.
            send_weights: gets them, once for all workers, to the actors, or where they can take them. Collective.
            team: the learner's workers, as this one sees them; None: there is one.
        """
        self._pool, self._rollout, self._samples = pool, rollout, samples
        self._attempt, self._send_weights, self._team = attempt, send_weights, team
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
        sent = self._send_weights(weights, Receivers(self._tell, self._agree, self._pool.size, complete))
        call = ("load_weights", self._attempt, sent.version, sent.checksum, sent.num_buckets, sent.buckets)
        proof = (sent.version, sent.checksum)
        if self._team is None or self._team.rank == 0:  # one of the workers asks, and tells the others
            # At first the models are still being loaded.
            limit_s = self._rollout.start_timeout_s if first else None
            self._pool.prepare_all(*call, expect=proof, timeout_s=limit_s)
        if self._team is not None:
            up = self._team.from_rank_zero(self._pool.up)
            if self._team.rank != 0:
                self._pool.take_over(up, *call, expect=proof)
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


def generator_on(
    handles: Sequence[Any],
    run: RolloutRun,
    *,
    who: str,
    attempt: Attempt,
    send_weights: SendWeights,
    team: WorkerContext | None = None,
    beat: Callable[[], None] = lambda: None,
) -> PoolGenerator:
    """The generator of a learner worker, or of an evaluation, on these rollout actors; `who` is it, for messages; `beat`:
    see `Pool`."""
    pool = Pool(
        RayCalls(handles, RoleGauges(run.name, "rollout")),
        "rollout actors",
        who,
        run.rollout.timeout_s,
        window=requests_in_flight(run.rollout, run.samples_a_prompt),
        beat=beat,
    )
    return PoolGenerator(
        pool, run.rollout, samples=run.samples_a_prompt, attempt=attempt, send_weights=send_weights, team=team
    )


def requests_in_flight(rollout: RolloutSection, samples: int) -> int:
    """Chunks that a rollout actor should have at a time: one at work and one that waits, or enough to fill vLLM's batch.

    Half as many again as its batch holds: of those at work some responses have ended already.
    """
    if rollout.engine != "vllm":
        return 2
    sequences = rollout.engine_args.get("max_num_seqs") or (1024 if rollout.uses_gpu else CPU_SEQUENCES)
    return min(MAX_IN_FLIGHT, -(-3 * sequences // (2 * samples * rollout.chunk_prompts)) + 1)
