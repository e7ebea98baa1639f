"""Batches on their way: sent, and not yet learned from.

With a lag of k the learner is at batch s while s + 1 … s + k are sampled, that of step s + k by version s. Each lane makes one
batch at a time. Where actors hold one version, there are k lanes of actors, s mod k: when batch s has come, its lane takes the
newest weights and makes batch s + k. Where engines hold several, there are k + 1 lanes that share the actors, s mod (k + 1), of
which one is always idle: batch s + k is sent before batch s has come, and no engine waits for the last response of a batch.
With k = 2 and two lanes, a column a step of the learner:

    lane 0   batch 0, version 0 | batch 2, version 0 |                    | batch 4, version 2 | …
    lane 1   batch 1, version 0                      | batch 3, version 1                      | …
    learner                     | learns from 0      | learns from 1      | learns from 2      | …
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from raytrl.records.samples import Prompt, Response


@dataclass
class Request:
    """One worker's share of a step's batch, and what comes of it."""

    prompts: Sequence[Prompt]
    chunks: Iterable[Sequence[Response]]  # waits for them; ends early where the weights that made them are lost

    def finish(self) -> None:
        """Wait for all of it."""
        self.chunks = list(self.chunks)


def without(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Prompt]:
    """The prompts that have no responses among these; a chunk comes whole or not at all."""
    answered = {response.row for response in responses}
    return [prompt for prompt in prompts if prompt.row not in answered]


def taken_up(
    made: Sequence[Sequence[Response]],
    step: int,
    questions: Sequence[Prompt],
    send: Callable[[int, Sequence[Prompt]], Request],
) -> Request:
    """A batch of which a checkpoint may hold chunks, whoever of the workers made them; what it lacks is sent."""
    rows = {prompt.row for prompt in questions}
    kept = [chunk for chunk in made if chunk and chunk[0].step == step and chunk[0].row in rows]
    lacking = without(questions, list(chain.from_iterable(kept)))
    return Request(questions, chain(kept, send(step, lacking).chunks))  # of every worker, as new weights are
