"""What the PPO loop needs from the rest: it sees no model, no tensor and no Ray.

`E` is whatever the learner calls experience, `W` whatever it calls weights; the loop only carries them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from raytrl.records.samples import Prompt, Response, Score

E = TypeVar("E")
W = TypeVar("W")
W_co = TypeVar("W_co", covariant=True)
W_contra = TypeVar("W_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One worker's share of a step's batch: prompts, their responses, and one score a response."""

    prompts: Sequence[Prompt]
    responses: Sequence[Response]
    scores: Sequence[Score]


class PromptSource(Protocol):
    """Prompts as a function of the step, so that a resumed run sees what it would have seen."""

    def next(self, step: int) -> Sequence[Prompt]:
        """This worker's share of the step's prompts; `row` counts over the global batch."""
        ...

    def evaluation(self, step: int) -> Sequence[Prompt]:
        """This worker's share of the evaluation prompts; may be empty."""
        ...


class Generator(Protocol[W_contra]):
    """The rollout actors."""

    def generate(
        self, prompts: Sequence[Prompt], version: int, *, greedy: bool, lane: int | None
    ) -> Iterable[Sequence[Response]]:
        """Send the requests now; iterating waits for responses, a chunk at a time, in any order.

        Every response is made by the weights of exactly this version. Sampled: `responses_per_prompt` each; greedy:
        one each. Where nobody has these weights any more, and nobody can get them, the iteration ends early.

        Args:
            lane: whose actors are asked; it has one batch on its way at a time. None: all of them.
        """
        ...

    def load_weights(self, weights: W_contra, lane: int | None, *, anew: bool = False) -> None:
        """Returns when every actor of the lane, or of all, that may serve has proved that it holds these weights.

        Nothing is on its way in that lane. Called by every worker; does nothing where these are the lane's last weights,
        unless `anew`: whoever had them may be gone.
        """
        ...


class Scorer(Protocol):
    """The reward actors."""

    def submit(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> None:
        """Send one chunk of responses to be scored; returns at once. `prompts` holds at least theirs."""
        ...

    def collect(self) -> Sequence[Score]:
        """Wait for the scores of everything submitted since the last `collect`: one a response, in any order."""
        ...


class Learner(Protocol[E, W_co]):
    """The networks that learn; calls are collective over the learner workers."""

    @property
    def step(self) -> int:
        """Steps done, which is also the version of the current weights; a loaded checkpoint sets it."""
        ...

    def experience(self, rollout: Rollout) -> E:
        """What `update` learns from; the rollout is this worker's share."""
        ...

    def update(self, experience: E) -> Mapping[str, float]:
        """Learn from one step's experience; `step` grows by one. Metrics are the same on every worker."""
        ...

    def weights(self) -> W_co:
        """The policy under the current version. Collective."""
        ...

    def save(self, folder: Path, ahead: Sequence[Sequence[Response]]) -> None:
        """A checkpoint that a run goes on from exactly; `ahead`: chunks that this worker has got for later steps."""
        ...

    @property
    def ahead(self) -> Sequence[Sequence[Response]]:
        """What all workers had got for later steps, when the loaded checkpoint was written."""
        ...

    def any_worker(self, mine: bool) -> bool:
        """Whether it is so on any worker: all have come to this point when it answers. Collective."""
        ...

    def mean_score(self, scores: Sequence[Score]) -> float:
        """Mean score over all workers, dropped ones left out; NaN where there is none."""
        ...


class Reporter(Protocol):
    """Where a finished step goes."""

    def report(
        self,
        step: int,
        metrics: Mapping[str, float],
        rollout: Rollout,
        evaluation: Rollout | None,
        save: Callable[[Path], None] | None,
    ) -> None:
        """`step` steps are done. Called on every worker.

        Args:
            rollout: this worker's share of what the step learned from.
            evaluation: its share of the evaluation after the step, where one was due.
            save: writes a checkpoint, where one is due: call it on every worker.
        """
        ...
