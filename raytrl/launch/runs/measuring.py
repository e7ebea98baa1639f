"""What evaluations have in common: done as a whole or anew, and actors that hold finished models."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from raytrl.config.runs.base import Run
from raytrl.config.sections.benchmark import MeasuringSection
from raytrl.launch.runs.resume import Standing
from raytrl.launch.runs.run import Kind
from raytrl.records.outcome import Evaluated
from raytrl.rundir import RunDirectory

R = TypeVar("R", bound=Run)


class EvaluationKind(Kind[R, Evaluated]):
    """`run.Kind` of an evaluation, of whatever form."""

    def standing(self, run_dir: RunDirectory, fresh: bool) -> Standing:
        found = super().standing(run_dir, fresh)
        return found if found.state == "done" else Standing("fresh")

    def outcome(self, run_dir: RunDirectory, already_done: bool) -> Evaluated:
        results = json.loads(run_dir.read("results.json") or "{}")
        return Evaluated(str(run_dir), already_done, results, run_dir.rows("samples.jsonl"))


def write_results(run_dir: RunDirectory, results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    """samples.jsonl, then results.json."""
    run_dir.write(
        "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in samples)
    )
    run_dir.write("results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")


@contextmanager
def asking(run: Run, role: str, section: MeasuringSection, make_load: Callable[[], Any]) -> Iterator[Any]:
    """A `PoolAsker` of actors that live as long as the block.

    Args:
        make_load: called in each actor; what it returns loads a model by its key.

    Raises:
        ResourceError: they could not all be placed in time.
    """
    from raytrl.launch.actors.measuring import MeasuringActor, asker_on
    from raytrl.launch.actors.start import Role, placed_actors

    limit = (section.start_timeout_s, f"{role}.start_timeout_s")
    roles = [Role(role, MeasuringActor, section, section.actors, make_load)]
    with placed_actors(run.output_dir, run.name, roles, limit) as started:
        yield asker_on(started[role], run.name, role, section)
