"""What runs inside rollout and reward actors. Plain classes: `ray.remote` is applied where they are started.

Loading is not part of `__init__`, so that its errors reach whoever asked, and so that a reborn actor loads when it is
first asked. Calls that only look or prepare run in threads of their own (`CONTROL`, `STATUS`, `WEIGHTS`), beside a long
`generate`.
The driver imports this module to start the actors, so nothing heavy is imported before it is needed.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray

from raytrl.errors import RaytrlError, StaleAttemptError, WeightGroupError, WeightsGoneError, WeightsVersionError
from raytrl.launch.logs import LOG, set_version
from raytrl.records import Attempt, Prompt, Response, Score

if TYPE_CHECKING:
    from raytrl.launch.transport import PackedBucket
    from raytrl.roles.reward.call import Pair
    from raytrl.roles.reward.sources import RewardSources
    from raytrl.roles.rollout.engine import RolloutEngine
    from raytrl.roles.weights.buckets import Bucket
    from raytrl.roles.weights.group import Announcement, Invitation, WeightGroup

CONTROL, STATUS, WEIGHTS, WORK = "control", "status", "weights", "work"
MAX_IN_FLIGHT = 128  # requests that one rollout actor works on at a time
CONCURRENCY_GROUPS = {CONTROL: 4, STATUS: 1, WEIGHTS: 1}  # weights: one thread, so that buckets keep their order
Method = TypeVar("Method", bound=Callable[..., Any])


def _in_group(name: str) -> Callable[[Method], Method]:
    """Calls of the method run in the threads of this group and do not queue behind those of others.

    Said here and not at each call: a driver that has joined through `ray://` cannot say it there.
    """
    return cast(Callable[[Method], Method], ray.method(concurrency_group=name))


class _Gate:
    """Lets calls through alone or, where they say so, several beside each other; one that must be alone goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._alone, self._want_alone = 0, False, 0

    @contextmanager
    def passed(self, concurrent: bool) -> Iterator[None]:
        with self._changed:
            if concurrent:
                self._changed.wait_for(lambda: not self._alone and not self._want_alone)
            else:
                self._want_alone += 1
                self._changed.wait_for(lambda: not self._inside)
                self._want_alone -= 1
                self._alone = True
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside, self._alone = self._inside - 1, False
                self._changed.notify_all()


class _Actor:
    """An attempt is one life of a run's learner group; older ones of the same run are not served any more."""

    def __init__(self) -> None:
        self._newest: dict[str, int] = {}  # by run: a sweep's trials share reward actors
        self._gate = _Gate()  # before the engine or the sources
        self._doing: list[str] = []

    @_in_group(STATUS)
    def doing(self) -> str:
        """What it is at, for messages; answers at any time."""
        doing = list(self._doing)
        return "nothing" if not doing else doing[0] + (f", and {len(doing) - 1} more" if len(doing) > 1 else "")

    @_in_group(CONTROL)
    def begin(self, attempt: Attempt) -> None:
        """Requests of earlier attempts that still wait here are refused from now on."""
        self._newest[attempt.run] = max(self._newest.get(attempt.run, attempt.number), attempt.number)

    def _refuse_if_old(self, attempt: Attempt) -> None:
        newest = self._newest.get(attempt.run, attempt.number)
        if attempt.number < newest:
            raise StaleAttemptError(f"{attempt.run}: request of attempt {attempt.number}; this actor serves {newest}")

    @contextmanager
    def _busy(self, text: str, concurrent: bool = False) -> Iterator[None]:
        """`concurrent`: beside other calls of that kind; else alone."""
        with self._gate.passed(concurrent):
            doing = f"{text}, since {time.strftime('%H:%M:%S')}"
            self._doing.append(doing)
            began = time.perf_counter()
            try:
                yield
                LOG.log(logging.DEBUG if concurrent else logging.INFO, "%s: %.3f s", text, time.perf_counter() - began)
            except Exception as error:
                LOG.error("%s: failed after %.3f s: %s", text, time.perf_counter() - began, error)
                raise
            finally:
                self._doing.remove(doing)


class RolloutActor(_Actor):
    """Holds a rollout engine, the weights it was given, and knows which attempt gave them."""

    def __init__(self, make_engine: "Callable[[], RolloutEngine]") -> None:
        super().__init__()
        self._make_engine = make_engine
        self._engine: RolloutEngine | None = None
        self._held: tuple[Attempt, int, str] | None = None  # attempt, version, checksum
        self._arrived: tuple[Attempt, int, int] | None = None  # of new weights: attempt, version, buckets so far
        self._group: WeightGroup | None = None  # for weights by broadcast
        self._failure: RaytrlError | None = None  # of a bucket that came by broadcast

    @_in_group(CONTROL)
    def start(self) -> None:
        """Load the model, without weights to serve."""
        with self._busy("loading the model"):
            self._loaded()

    @_in_group(WEIGHTS)
    def take_bucket(self, attempt: Attempt, version: int, number: int, packed: "PackedBucket") -> None:
        """Load a part of new weights ahead of `load_weights`, which makes up for all that was not loaded this way.

        From the first bucket on nothing is served until `load_weights` has proven the whole.
        """
        self.begin(attempt)
        with self._busy(f"taking bucket {number} of weights of version {version}"):
            self._refuse_if_old(attempt)
            if self._held is not None and self._held[0] == attempt and self._held[1] >= version:
                return  # another worker's `load_weights` was here before
            self._take(attempt, version, number, packed)

    @_in_group(WEIGHTS)
    def join_group(self, attempt: Attempt, version: int, invitation: "Invitation") -> None:
        """Become a member of the learner's group for weights from `version` on, instead of any that it was in."""
        from raytrl.roles.weights.group import WeightGroup

        self.begin(attempt)
        with self._busy(f"joining the group for weights from version {version} on"):
            self._refuse_if_old(attempt)
            if self._group is not None:
                self._group.close()
                self._group = None
            self._group = WeightGroup.join(invitation)

    @_in_group(WEIGHTS)
    def can_receive(self, attempt: Attempt, version: int, group_version: int | None) -> bool:
        """Whether it serves this attempt, and is in the group whose first version that was (None: in whichever)."""
        self._refuse_if_old(attempt)
        serves = self._held is not None and self._held[0] == attempt
        is_member = self._group is not None and self._group.first_version == group_version
        return serves and (group_version is None or is_member)

    @_in_group(WEIGHTS)
    def receive_bucket(self, attempt: Attempt, version: int, number: int, announced: "Announcement") -> None:
        """As `take_bucket`, with the group's next message. What it failed of, `load_weights` raises."""
        self.begin(attempt)
        with self._busy(f"receiving bucket {number} of weights of version {version}"):
            self._refuse_if_old(attempt)
            if self._group is None:
                raise WeightGroupError("rollout actor: is in no group for weights")
            if number == 0:
                self._begin_weights(attempt, version)
            bucket = self._group.receive(announced)  # also after a failure: the others wait for this one
            try:
                self._load(attempt, version, number, bucket)
            except RaytrlError as error:
                self._failure = error
                raise

    @_in_group(WEIGHTS)
    def has_received(self, attempt: Attempt, version: int, num_buckets: int) -> bool:
        """Whether it has all of them; answers once those that it was told of are loaded."""
        self._refuse_if_old(attempt)
        return self._arrived == (attempt, version, num_buckets)

    @_in_group(WEIGHTS)
    def load_weights(
        self, attempt: Attempt, version: int, checksum: str, num_buckets: int, *buckets: "PackedBucket"
    ) -> tuple[int, str]:
        """Take these weights, or what is missing of them, unless it holds them already.

        Args:
            checksum: of all buckets.
            buckets: none, where they came by broadcast.

        Returns:
            Version and checksum of what the engine now holds.

        Raises:
            WeightsGoneError: they came by broadcast, when this actor was not there.
        """
        self.begin(attempt)
        with self._busy(f"loading weights of version {version}"):
            self._refuse_if_old(attempt)
            if self._held is None or self._held != (attempt, version, checksum):
                arrived = (
                    self._arrived[2] if self._arrived is not None and self._arrived[:2] == (attempt, version) else 0
                )
                if arrived < num_buckets and not buckets:
                    raise self._failure or WeightsGoneError(
                        f"rollout actor: weights of version {version} were sent by broadcast when this actor was not there"
                    )
                for number in range(arrived, num_buckets):
                    self._take(attempt, version, number, buckets[number])
                self._arrived = None
                self._held = (attempt, version, self._loaded().finish_weights())
                set_version(version)
            return self._held[1], self._held[2]

    def _take(self, attempt: Attempt, version: int, number: int, packed: "PackedBucket") -> None:
        """The next bucket in order; others are left for `load_weights`."""
        from raytrl.launch.transport import unpack

        if number == 0:
            self._begin_weights(attempt, version)
        if self._arrived == (attempt, version, number):
            self._load(attempt, version, number, unpack(packed))

    def _begin_weights(self, attempt: Attempt, version: int) -> None:
        self._held, self._arrived, self._failure = None, (attempt, version, 0), None
        self._loaded().begin_weights(version)

    def _load(self, attempt: Attempt, version: int, number: int, bucket: "Bucket") -> None:
        if self._arrived == (attempt, version, number):
            self._arrived = None  # stays so after an error: `load_weights` then begins again
            self._loaded().take_bucket(bucket)
            self._arrived = (attempt, version, number + 1)

    @_in_group(WORK)
    def generate(
        self, attempt: Attempt, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool
    ) -> list[Response]:
        """Responses by the weights of this attempt and version.

        Raises:
            WeightsVersionError: it holds others, or none since it was restarted.
            StaleAttemptError: a newer attempt has begun.
        """
        rows = f"rows {prompts[0].row} to {prompts[-1].row} of step {prompts[0].step}"
        with self._busy(f"generating for {rows}", self._concurrent):
            self._check(attempt, version)
            return self._loaded().generate(prompts, version, samples=samples, greedy=greedy)

    @_in_group(WORK)
    def logprobs(
        self, attempt: Attempt, prompts: Sequence[Prompt], responses: Sequence[Response], version: int
    ) -> list[float]:
        """Log-probability of each response under the weights of this attempt and version; raises as `generate`."""
        rows = f"rows {prompts[0].row} to {prompts[-1].row}"
        with self._busy(f"log-probabilities of {rows}", self._concurrent):
            self._check(attempt, version)
            return self._loaded().logprobs(prompts, responses, version)

    @property
    def _concurrent(self) -> bool:
        return self._engine is not None and self._engine.concurrent

    def _check(self, attempt: Attempt, version: int) -> None:
        self._refuse_if_old(attempt)
        if self._held is None or self._held[:2] != (attempt, version):
            raise WeightsVersionError(
                f"rollout actor: asked for attempt {attempt.number}, version {version}; found: {self._held}"
            )

    def _loaded(self) -> "RolloutEngine":
        if self._engine is None:
            self._engine = self._make_engine()
        return self._engine


class RewardActor(_Actor):
    """Holds the reward sources."""

    def __init__(self, make_sources: "Callable[[], RewardSources]") -> None:
        super().__init__()
        self._make_sources = make_sources
        self._sources: RewardSources | None = None

    @_in_group(CONTROL)
    def start(self) -> None:
        """Load the sources."""
        with self._busy("loading reward sources"):
            self._loaded()

    @_in_group(CONTROL)
    def prepare(self, attempt: Attempt) -> None:
        """Serve this attempt; returns once the sources are loaded."""
        self.begin(attempt)
        self.start()

    def score(self, attempt: Attempt, pairs: "Sequence[Pair]") -> list[Score]:
        """One score a pair, in order.

        Raises:
            RewardError: a source failed and `reward.on_error` is fail.
            StaleAttemptError: a newer attempt has begun.
        """
        with self._busy(f"scoring {len(pairs)} responses of step {pairs[0][0].step}"):
            self._refuse_if_old(attempt)
            return self._loaded().score(pairs)

    def _loaded(self) -> "RewardSources":
        if self._sources is None:
            self._sources = self._make_sources()
        return self._sources
