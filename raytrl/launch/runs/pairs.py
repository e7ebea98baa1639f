"""`raytrl eval` with `pairs:`: reward models in actors, pairs from here."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from raytrl.config.runs.pairs import PairsRun
from raytrl.launch.runs.measuring import EvaluationKind, asking, write_results
from raytrl.launch.runs.run import Start
from raytrl.plan.checks.common import Facts
from raytrl.plan.checks.pairs import check_pairs
from raytrl.records.progress import Progress
from raytrl.rundir import RunDirectory
from raytrl.versions import installed

if TYPE_CHECKING:
    from raytrl.roles.reward.pairs import PairScorer, Scores

_LIBRARIES = ("transformers", "torch", "datasets")


class PairsKind(EvaluationKind[PairsRun]):
    """`run.Kind` of pairs."""

    _pairs: Any  # a datasets.Dataset

    def check(self, run_dir: RunDirectory, before_last: Callable[[], None]) -> Facts:
        self._pairs, facts = check_pairs(self.run, before_last)
        return facts

    def work(self, start: Start) -> dict[str, Any]:
        started = time.time()
        with start.ray.running(start.need):
            scores = _scored(self.run, self._pairs, self.show)
        results, samples = results_of(self.run, self._pairs, scores)
        results["seconds"] = time.time() - started + start.clock["checks_s"]
        write_results(start.run_dir, results, samples)
        return {}


def _scored(run: PairsRun, pairs: Any, show: Callable[[Progress], None]) -> "dict[str, list[Scores]]":
    section, rows = run.pairs, list(pairs)
    slices = [rows[start : start + section.batch_size] for start in range(0, len(rows), section.batch_size)]
    show(Progress("phase", text="starting actors"))
    scores: dict[str, list[Scores]] = {}
    with asking(run, "pairs", section, functools.partial(make_load, run)) as asker:
        for key in run.evaluated:
            show(Progress("phase", text=f"loading {key}"))
            asker.hold(key)
            tell = functools.partial(_tell, show, key)
            scores[key] = [each for part in asker.ask("score", slices, tell) for each in part]
    return scores


def _tell(show: Callable[[Progress], None], key: str, done: int, count: int) -> None:
    show(Progress("phase", done, count, f"{key}: scoring, slices"))


def make_load(run: PairsRun) -> "Callable[[str], PairScorer]":
    """In an actor: what loads a reward model by its key."""

    def load(key: str) -> "PairScorer":
        from raytrl.config.sections.reward import SourceSection
        from raytrl.roles.reward.model import ModelSource
        from raytrl.roles.reward.pairs import PairScorer

        model = run.model
        section = SourceSection(
            name=key,
            model=run.evaluated[key],
            label=run.pairs.label,
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
        )
        keys = ("model.path" if key == "model" else key, "pairs.label")
        return PairScorer(ModelSource(section, "cuda" if run.uses_gpu else "cpu", keys), run.pairs.batch_size)

    return load


def results_of(
    run: PairsRun, pairs: Mapping[str, Any], scores: "dict[str, list[Scores]]"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What results.json and samples.jsonl hold.

    Args:
        pairs: their columns.
        scores: of all pairs, by the model's key.
    """
    from raytrl.roles.models.base import dtype_name
    from raytrl.roles.reward.pairs import compare_pairs, summarize_pairs

    category, limit = run.pairs.category, run.pairs.rows
    categories = None if category is None else [str(name) for name in pairs[category]]
    how = {"dtype": dtype_name(run.model.dtype, run.uses_gpu)}
    results: dict[str, Any] = {key: {"path": path, **how} for key, path in run.evaluated.items()}
    results["pairs"] = [
        {"model": key, "limit": limit, **row, **how}
        for key, found in scores.items()
        for row in summarize_pairs(found, categories)
    ]
    if "compare" in scores:
        compared = compare_pairs(scores["model"], scores["compare"], categories)
        results["comparison"] = [row | {"limit": limit} for row in compared]
    results["versions"] = installed(_LIBRARIES)
    samples = [
        {"model": key, "row": row, **({} if categories is None else {"category": categories[row]}), **_sides(each)}
        for key, found in scores.items()
        for row, each in enumerate(found)
    ]
    return results, samples


def _sides(scores: "Scores") -> dict[str, Any]:
    """The scores of both sides, and why one has none."""
    from raytrl.roles.reward.call import Failure

    sides = dict(zip(("chosen", "rejected"), scores, strict=True))
    values = {side: value if isinstance(value, float) else None for side, value in sides.items()}
    reasons = [f"{side}: {value.reason}" for side, value in sides.items() if isinstance(value, Failure)]
    return {**values, **({"problem": "; ".join(reasons)} if reasons else {})}
