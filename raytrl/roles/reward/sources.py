"""All reward sources of a run, asked together and summed: what a reward actor holds."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from raytrl.config.sections.reward import RewardSection, SourceSection
from raytrl.errors import RewardError
from raytrl.records.samples import Score
from raytrl.roles.reward.call import Failure, Outcome, Pair, RewardSource, ask
from raytrl.roles.reward.endpoint import EndpointSource
from raytrl.roles.reward.function import FunctionSource

_log = logging.getLogger(__name__)

_NOT_APPLICABLE = Failure("every source answered that it does not apply (None)")


def load_source(section: SourceSection, device: str | None = None) -> RewardSource:
    """Load one source; `device` is for models, by default a GPU where there is one. Raises ConfigError."""
    if section.kind == "function":
        return FunctionSource(section)
    if section.kind == "url":
        return EndpointSource(section)
    from raytrl.roles.reward.model import ModelSource  # torch and transformers only where a model is scored

    return ModelSource(section, device)


class RewardSources:
    """Scores responses by every source of a `reward:` section, one call of `score` at a time.

    Loading happens here; raises ConfigError when a source cannot be loaded.
    """

    def __init__(self, section: RewardSection, device: str | None = None) -> None:
        self._section = section
        self._sources: list[RewardSource] = []
        try:
            for source in section.sources:
                self._sources.append(load_source(source, device))
        except BaseException:
            self.close()
            raise

    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """One score a (prompt, response) pair, in the order given.

        `value` is the sum of weight x score over the sources; a source that answered None for a response is left out of
        its sum, as in TRL. `by_source` holds the unweighted scores, None where a source has none.

        A response that a source failed to score, or to which no source applies, raises RewardError under
        `on_error: fail`. Under `drop` its `value` is None, and RewardError is raised only when more than
        `max_dropped_fraction` of these pairs are dropped. Whoever splits a batch over several calls gives each a
        section with `max_dropped_fraction: 1.0` and judges the whole batch with `check_dropped`.
        """
        for prompt, response in pairs:
            if (prompt.step, prompt.row) != (response.step, response.row):
                raise ValueError(
                    f"reward: a response goes with another prompt; found: response (step {response.step}, row "
                    f"{response.row}), prompt (step {prompt.step}, row {prompt.row}); expected: the prompt it answers"
                )
        if not pairs:
            return []
        # Side by side: a slow judge need not wait for a slow model.
        with ThreadPoolExecutor(len(self._sources)) as pool:
            outcomes = list(pool.map(lambda source: ask(source, pairs), self._sources))
        rows = list(zip(*outcomes, strict=True))
        failures = self._failures(pairs, rows)
        scores = [self._combine(pair, row) for pair, row in zip(pairs, rows, strict=True)]
        if failures:
            message = failures[0] + (f"; and {len(failures) - 1} more like it" if len(failures) > 1 else "")
            if self._section.on_error == "fail":
                raise RewardError(f"{message}; fix the source, or set reward.on_error: drop")
            _log.warning("dropped: %s", message)
            check_dropped(scores, self._section.drop_budget, last=message)
        return scores

    def close(self) -> None:
        """End what the sources hold: processes of reward functions."""
        for source in self._sources:
            source.close()

    def _combine(self, pair: Pair, row: Sequence[Outcome]) -> Score:
        response = pair[1]
        by_source: dict[str, float | None] = {}
        total: float | None = None
        for section, outcome in zip(self._section.sources, row, strict=True):
            by_source[section.name] = None if isinstance(outcome, Failure) else outcome
            if isinstance(outcome, float):
                total = (total or 0.0) + section.weight * outcome
        if any(isinstance(outcome, Failure) for outcome in row):
            total = None  # a sum without one of its parts is another reward
        return Score(response.step, response.row, response.sample, total, by_source)

    def _failures(self, pairs: Sequence[Pair], rows: Sequence[Sequence[Outcome]]) -> list[str]:
        """One description a failed outcome."""
        found = []
        for (_, response), row in zip(pairs, rows, strict=True):
            where = f"step {response.step}, row {response.row}, sample {response.sample}"
            for section, outcome in zip(self._section.sources, row, strict=True):
                if isinstance(outcome, Failure):
                    tries = f" (asked {section.retries + 1} times)" if outcome.retry and section.retries else ""
                    found.append(
                        f"reward source {section.name!r} ({_target(section)}): {where}: {outcome.reason}{tries}; "
                        "expected: one finite number"
                    )
            if all(outcome is None for outcome in row):
                found.append(f"reward: {where}: {_NOT_APPLICABLE.reason}; expected: a score from at least one")
        return found


def check_dropped(scores: Sequence[Score], max_dropped_fraction: float, last: str | None = None) -> int:
    """How many scores of a batch were dropped; RewardError when that is more than the fraction allowed.

    `last` describes one of the failures, for the message.
    """
    dropped = sum(score.value is None for score in scores)
    if dropped > max_dropped_fraction * len(scores):
        raise RewardError(
            f"reward: too many samples were dropped; found: {dropped} of {len(scores)}; expected: at most "
            f"{max_dropped_fraction:g} of them (reward.max_dropped_fraction)"
            + (f"; {last}" if last else "")
            + "; fix the source, or allow more"
        )
    return dropped


def _target(section: SourceSection) -> str:
    return f"{section.kind} {section.model or section.function or section.url}"
