"""The loop's `Generator` on a pool of rollout actors, one in every learner worker."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

from raytrl.config.runs.rollout import RolloutRun
from raytrl.config.sections.engines import CPU_SEQUENCES
from raytrl.config.sections.rollout import RolloutSection
from raytrl.errors import ActorsGoneError, RunError, StalledError, WeightsGoneError, WeightsVersionError
from raytrl.launch.actors.base import MAX_IN_FLIGHT
from raytrl.launch.actors.calls import RayCalls
from raytrl.launch.actors.pool import Pool, Request
from raytrl.launch.actors.transport import Receivers, SentWeights
from raytrl.launch.session.gauges import RoleGauges
from raytrl.launch.session.logs import LOG
from raytrl.records.samples import Attempt, Prompt, Response, chunks
from raytrl.roles.context import WorkerContext
from raytrl.roles.weights.buckets import Weights

SendWeights = Callable[[Weights, Receivers], SentWeights]
T = TypeVar("T")
_BEAT_S = 1.0
# For the actors of a lane that was gone when its last weights came: so long, and so many times what it took to send these.
_OUT_LIMIT_S, _OUT_PATIENCE = 2.0, 5.0


class PoolGenerator:
    """`loop.protocols.Generator` on rollout actors."""

    def __init__(
        self,
        lanes: Sequence[Pool],
        rollout: RolloutSection,
        *,
        samples: int,
        attempt: Attempt,
        send_weights: SendWeights,
        team: WorkerContext | None = None,
        ahead: bool = False,
        groups: int = 1,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            lanes: a pool each. Lane l has the actors of group l modulo `groups`, so lanes may share actors.
            samples: responses per prompt.
            attempt: of the learner group; the actors refuse requests of earlier ones.
            send_weights: gets them, once for all workers, to the actors, or where they can take them. Collective.
            team: the learner's workers, as this one sees them; None: there is one.
            ahead: what is sampled is taken in while its worker learns.
            beat: as the pools'.
        """
        self._lanes, self._rollout, self._samples = list(lanes), rollout, samples
        self._attempt, self._send_weights, self._team = attempt, send_weights, team
        self._ahead, self._num_groups, self._beat = ahead, groups, beat
        self._versions: list[int | None] = [None] * len(self._lanes)
        self._out: set[int] = set()  # lanes without any actor that serves
        self._missed: set[int] = set()  # lanes that this worker waited for in vain

    @property
    def num_up(self) -> int:
        """Actors that serve at the moment, as far as this worker knows."""
        up = [frozenset[int]()] * self._num_groups
        for lane, pool in enumerate(self._lanes):
            up[lane % self._num_groups] |= pool.up
        return sum(map(len, up))

    def load_weights(self, weights: Weights, lane: int | None = None, *, anew: bool = False) -> None:
        """Every actor that can be reached proves version and checksum; the others have to before they serve.

        They load each bucket while the next one is on its way.
        """
        lanes = range(len(self._lanes)) if lane is None else [lane]
        if not anew and all(self._versions[each] == weights.version for each in lanes):
            return
        first = all(version is None for version in self._versions) and not self._out
        for each in lanes:
            self._versions[each] = None
        others = [version for version in self._versions if version is not None]
        # Lanes that share their actors are sent weights by one of them.
        pools = [self._lanes[each] for each in lanes if lane is not None or each < self._num_groups]
        receivers = Receivers(
            tell=lambda method, version, *more: self._tell(pools, method, version, *more),
            agree=lambda method, version, *more: self._agree(pools, method, version, *more),
            count=sum(pool.size for pool in pools),
            complete=all(len(pool.up) == pool.size for pool in pools),
            group=lanes[0] % self._num_groups if len(pools) == 1 else None,
            oldest=min([weights.version, *others]),
        )
        for pool in pools:
            if first:
                pool.tell_all("begin", self._attempt)  # what an earlier attempt still asks for need not be waited for
        for each in lanes:
            self._lanes[each].forget()  # the last version's buckets, so that the object store does not hold two
        began = time.monotonic()
        sent = self._send_weights(weights, receivers)
        out_limit_s = _OUT_LIMIT_S + _OUT_PATIENCE * (time.monotonic() - began)
        for each in lanes:
            self._bring_up_to_date(each, sent, first, out_limit_s)
        if len(self._out) == len(self._lanes):
            raise ActorsGoneError(f"no rollout actor serves; last: {self._lanes[0].last_loss}")

    def _bring_up_to_date(self, lane: int, sent: SentWeights, first: bool, out_limit_s: float) -> None:
        pool, proof = self._lanes[lane], (sent.version, sent.checksum)
        call = ("load_weights", self._attempt, sent.version, sent.checksum, sent.num_buckets, sent.buckets)
        served = True
        if self._team is None or self._team.rank == 0:  # one of the workers asks, and tells the others
            # At first the models are still being loaded. One that was gone just now need not be waited for again.
            is_out = self._num_groups > 1 and lane in self._out | self._missed
            limit_s = self._rollout.start_timeout_s if first else out_limit_s if is_out else None
            try:
                pool.prepare_all(*call, expect=proof, timeout_s=limit_s)
            except (StalledError, ActorsGoneError, WeightsGoneError) as error:
                if self._num_groups == 1 or pool.up:
                    raise
                LOG.warning("lane %d: %s", lane, error)
                served = False
        if self._team is not None:
            served, up = self._team.from_rank_zero((served, pool.up))
            if self._team.rank != 0:
                pool.take_over(up, *call, expect=proof)
        self._missed.discard(lane)
        self._versions[lane] = sent.version if served else None
        self._out = self._out - {lane} if served else self._out | {lane}

    def _tell(self, pools: Sequence[Pool], method: str, version: int, *arguments: Any) -> None:
        for pool in pools:
            pool.tell_all(method, self._attempt, version, *arguments)

    def _agree(self, pools: Sequence[Pool], method: str, version: int, *arguments: Any) -> bool:
        limit_s = self._rollout.timeout_s
        return all(
            pool.all_answer(True, method, self._attempt, version, *arguments, timeout_s=limit_s) for pool in pools
        )

    def generate(
        self, prompts: Sequence[Prompt], version: int, *, greedy: bool, lane: int | None = None
    ) -> Iterable[Sequence[Response]]:
        asked = range(self._num_groups) if lane is None else [lane]  # one lane for all the actors of a group
        serving = [each for each in asked if each not in self._out and not self._lanes[each].is_gone]
        others = {self._versions[each] for each in serving} - {version}
        if others:
            raise WeightsVersionError(f"asked for responses of version {version}; the actors have {others}")
        samples = 1 if greedy else self._samples
        for number, chunk in enumerate(chunks(prompts, self._rollout.chunk_prompts) if serving else ()):
            # The columns are for reward functions, and for an environment's reset.
            bare = chunk if self._rollout.converses else [replace(prompt, columns={}) for prompt in chunk]
            self._lanes[serving[number % len(serving)]].send(
                Request(
                    name=f"rows {bare[0].row} to {bare[-1].row} of step {bare[0].step}",
                    # By the step, too: lanes that share actors do not know what the others have sent.
                    place=bare[0].row // self._rollout.chunk_prompts + bare[0].step,
                    method="generate",
                    arguments=(self._attempt, bare, version, samples, greedy),
                )
            )
        answers = [self._answers(each) for each in serving if self._lanes[each].is_busy]
        if self._ahead:
            answers = [_taken_in(each, self._beat) for each in answers]
        return self._responses(chain.from_iterable(answers))

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
            self._lanes[0].send(Request(name, place, "logprobs", (self._attempt, bare, theirs, version)))
        found: dict[tuple[int, int], float] = {}
        for request, values in self._lanes[0].answers():
            for response, value in zip(request.arguments[2], values, strict=True):
                found[response.row, response.sample] = value
        return found

    def _answers(self, lane: int) -> Iterator[tuple[Request, Any]]:
        """Those of a lane; they end early where nobody has the weights that its requests ask for, or can get them."""
        pool = self._lanes[lane]
        try:
            yield from pool.answers()
        except (WeightsGoneError, ActorsGoneError, StalledError) as error:
            if not isinstance(error, WeightsGoneError) and (self._num_groups == 1 or pool.up):
                raise  # there is nobody else; or somebody has them, and is stuck
            LOG.warning("%s", error)
            pool.abandon()
            self._missed.add(lane)

    def _responses(self, answers: Iterable[tuple[Request, Any]]) -> Iterator[Sequence[Response]]:
        """Whole chunks, each when it is done: what scores them sees the same batches in every run."""
        for request, responses in answers:
            _, prompts, version, samples, _ = request.arguments
            wanted = [(prompt.step, prompt.row, sample, version) for prompt in prompts for sample in range(samples)]
            if [(r.step, r.row, r.sample, r.policy_version) for r in responses] != wanted:
                raise RunError(f"rollout actors: the answer to {request.name} is not what was asked for; please report")
            yield responses


def _taken_in(answers: Iterator[T], beat: Callable[[], None]) -> Iterator[T]:
    """What comes, taken in by a thread of its own from now on: requests are handed out, and lost ones sent again, while
    nobody waits for it. The thread ends with the answers, for which the pool has limits."""
    taken: queue.SimpleQueue[T | BaseException | None] = queue.SimpleQueue()

    def take() -> None:
        try:
            for answer in answers:
                taken.put(answer)
            taken.put(None)
        except BaseException as error:
            taken.put(error)

    thread = threading.Thread(target=take, name="responses", daemon=True)
    thread.start()

    def given() -> Iterator[T]:
        while True:
            try:
                item = taken.get(timeout=_BEAT_S)
            except queue.Empty:
                beat()
                continue
            if item is None or isinstance(item, BaseException):
                thread.join()
                if item is not None:
                    raise item
                return
            yield item

    return given()


def generator_on(
    handles: Sequence[Any],
    run: RolloutRun,
    *,
    who: str,
    attempt: Attempt,
    send_weights: SendWeights,
    team: WorkerContext | None = None,
    beat: Callable[[], None] = lambda: None,
    lanes: int = 1,
    groups: int = 1,
    ahead: bool = False,
) -> PoolGenerator:
    """The generator of a learner worker, or of an evaluation, on these rollout actors; `who` is it, for messages; `beat`:
    see `Pool`; the others: see `PoolGenerator`."""
    gauges, owner = RoleGauges(run.name, "rollout"), threading.get_ident()

    def beat_of_worker() -> None:  # that responses come does not say that the learner learns
        if threading.get_ident() == owner:
            beat()

    def pool(lane: int) -> Pool:
        name = "rollout actors" if groups == 1 else f"rollout actors of lane {lane}"
        window = requests_in_flight(run.rollout, run.samples_a_prompt)
        calls = RayCalls(handles[lane % groups :: groups], gauges.part(counts_losses=lane < groups))
        # Lanes that share their actors wait for one another's chunks.
        limit_s = run.rollout.timeout_s * -(-lanes // groups)
        return Pool(calls, name, who, limit_s, window=window, beat=beat_of_worker)

    return PoolGenerator(
        [pool(lane) for lane in range(lanes)],
        run.rollout,
        samples=run.samples_a_prompt,
        attempt=attempt,
        send_weights=send_weights,
        team=team,
        ahead=ahead,
        groups=groups,
        beat=beat,
    )


def requests_in_flight(rollout: RolloutSection, samples: int) -> int:
    """Chunks that a rollout actor should have at a time: one at work and one that waits, or enough to fill vLLM's batch.

    Half as many again as its batch holds: of those at work some responses have ended already.
    """
    if rollout.engine != "vllm":
        return 2
    sequences = rollout.engine_args.get("max_num_seqs") or (1024 if rollout.uses_gpu else CPU_SEQUENCES)
    return min(MAX_IN_FLIGHT, -(-3 * sequences // (2 * samples * rollout.chunk_prompts)) + 1)
