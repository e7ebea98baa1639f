"""All reward sources of a run, asked together and summed: what a reward actor holds."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from raytrl.config.sections.reward import RewardSection, SourceSection
from raytrl.errors import RewardError
from raytrl.records.samples import Response, Score
from raytrl.roles.reward.call import Failure, Outcome, Pair, RewardSource, ask, check_value
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
                if source.kind != "environment":  # whose scores come with the responses
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
        sound = [(response.prompt_of(prompt), response) for prompt, response in pairs if not response.failed]
        outcomes = iter(self._outcomes(sound))
        # Nothing can be said of a response whose environment failed: it is counted as such, apart from what sources fail at.
        asked = [None if response.failed else next(outcomes) for _, response in pairs]
        failures = [text for pair, row in zip(pairs, asked, strict=True) if row for text in self._failures(pair, row)]
        scores = [self._combine(pair, row) for pair, row in zip(pairs, asked, strict=True)]
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

    def _outcomes(self, pairs: Sequence[Pair]) -> list[Mapping[str, Outcome]]:
        """Of each response, by source."""
        if not pairs:
            return []
        where_it_was = [_of_environment(response) for _, response in pairs]
        asked = [source for source in self._sources if source.section.name not in where_it_was[0]]
        found: list[list[Outcome]] = []
        if asked:  # side by side: a slow judge need not wait for a slow model
            with ThreadPoolExecutor(len(asked)) as pool:
                found = list(pool.map(lambda source: ask(source, pairs), asked))
        names = [source.section.name for source in asked]
        rows: list[tuple[Outcome, ...]] = list(zip(*found, strict=True)) if asked else [()] * len(pairs)
        return [
            {**dict(zip(names, row, strict=True)), **others} for row, others in zip(rows, where_it_was, strict=True)
        ]

    def _weight(self, name: str) -> float:
        """A class of rollout.environment need not be among the sources."""
        return next((section.weight for section in self._section.sources if section.name == name), 1.0)

    def _combine(self, pair: Pair, row: Mapping[str, Outcome] | None) -> Score:
        response = pair[1]
        if row is None:
            return Score(response.step, response.row, response.sample, None, {}, of_failed=True)
        by_source: dict[str, float | None] = {}
        total: float | None = None
        for name, outcome in row.items():
            by_source[name] = None if isinstance(outcome, Failure) else outcome
            if isinstance(outcome, float):
                total = (total or 0.0) + self._weight(name) * outcome
        if any(isinstance(outcome, Failure) for outcome in row.values()):
            total = None  # a sum without one of its parts is another reward
        return Score(response.step, response.row, response.sample, total, by_source)

    def _failures(self, pair: Pair, row: Mapping[str, Outcome]) -> Iterator[str]:
        """One description a failed outcome."""
        response, sections = pair[1], {section.name: section for section in self._section.sources}
        where = f"step {response.step}, row {response.row}, sample {response.sample}"
        for name, outcome in row.items():
            if isinstance(outcome, Failure):
                section = sections.get(name)
                retries = section.retries if section is not None and outcome.retry else 0
                tries = f" (asked {retries + 1} times)" if retries else ""
                yield (
                    f"reward source {name!r} ({_target(section)}): {where}: {outcome.reason}{tries}; "
                    "expected: one finite number"
                )
        if all(outcome is None for outcome in row.values()):
            yield f"reward: {where}: {_NOT_APPLICABLE.reason}; expected: a score from at least one"


def _of_environment(response: Response) -> dict[str, Outcome]:
    """What was asked where the environment is."""
    episode = response.episode
    if episode is None:
        return {}
    found = {name: check_value(value) for name, value in episode.scores.items()}
    return {**found, **{name: Failure(text, retry=False) for name, text in episode.problems.items()}}


def check_dropped(scores: Sequence[Score], max_dropped_fraction: float, last: str | None = None) -> int:
    """How many scores of a batch were dropped; RewardError when that is more than the fraction allowed.

    `last` describes one of the failures, for the message.
    """
    dropped = sum(score.value is None and not score.of_failed for score in scores)
    if dropped > max_dropped_fraction * len(scores):
        raise RewardError(
            f"reward: too many samples were dropped; found: {dropped} of {len(scores)}; expected: at most "
            f"{max_dropped_fraction:g} of them (reward.max_dropped_fraction)"
            + (f"; {last}" if last else "")
            + "; fix the source, or allow more"
        )
    return dropped


def check_failed(scores: Sequence[Score], max_failed_fraction: float) -> None:
    """RewardError when more of a batch's conversations failed than the fraction allowed."""
    failed = sum(score.of_failed for score in scores)
    if failed > max_failed_fraction * len(scores):
        raise RewardError(
            f"rollout.environment: too many conversations failed; found: {failed} of {len(scores)}; expected: at most "
            f"{max_failed_fraction:g} of them (rollout.max_failed_fraction); why is in samples.jsonl and the logs of the "
            f"rollout actors"
        )


def _target(section: SourceSection | None) -> str:
    if section is None or section.kind == "environment":
        return "get_reward of rollout.environment"
    return f"{section.kind} {section.model or section.function or section.url}"
