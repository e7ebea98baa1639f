"""Summaries of an evaluation: pure functions from scored responses to plain numbers, for `raytrl eval`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raytrl.records.samples import Response, Score
from raytrl.roles.paired import sign_test


@dataclass(frozen=True, slots=True)
class Spread:
    """Of `count` finite numbers; `std` is the sample standard deviation, 0 for a single one."""

    count: int
    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One model's responses. A spread is None where there is nothing to summarise, never 0."""

    responses: int
    dropped: int  # responses without a score
    score: Spread | None  # weighted sums over the sources
    by_source: Mapping[str, Spread | None]  # unweighted
    response_tokens: Spread | None  # sampled tokens, the end token included
    end_token_share: float | None  # share of responses that ended by themselves; the rest were cut
    kl_mean: float | None  # nats a response: log-probability under the policy minus the reference, summed over tokens

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and numbers, ready for json.dumps."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model against another on the same prompts; a tie counts half."""

    compared: int
    wins: int
    ties: int
    losses: int
    left_out: int  # pairs of which one was dropped
    win_rate: float | None  # (wins + ties / 2) / compared
    margin: Spread | None  # score minus the other's score
    margin_stderr: float | None  # of its mean, prompt by prompt; None for fewer than two
    p: float | None  # two-sided, by the exact sign test: wins and losses as unlike where both models are alike

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and numbers, ready for json.dumps."""
        return asdict(self)


def summarize(
    responses: Sequence[Response], scores: Sequence[Score], sequence_kls: Sequence[float] | None = None
) -> Summary:
    """Summarise one model's responses and their scores, which may come in any order.

    `sequence_kls` holds one KL estimate a response, in nats. Raises ValueError when responses and scores do not name
    the same samples, or a KL is missing or not finite.
    """
    _by_sample(scores, responses)
    if sequence_kls is not None and len(sequence_kls) != len(responses):
        raise ValueError(
            f"evaluation: one KL a response; found: {len(sequence_kls)} for {len(responses)} responses; expected: as many"
        )
    values = [score.value for score in scores if score.value is not None]
    names = sorted({name for score in scores for name in score.by_source})
    kls = spread(sequence_kls or ())
    return Summary(
        responses=len(responses),
        dropped=len(scores) - len(values),
        score=spread(values),
        by_source={name: spread(_source_values(scores, name)) for name in names},
        response_tokens=spread([response.num_sampled for response in responses]),
        end_token_share=sum(r.ended for r in responses) / len(responses) if responses else None,
        kl_mean=kls.mean if kls else None,
    )


def compare(scores: Sequence[Score], other: Sequence[Score]) -> Comparison:
    """How often a model's score is above another's for the same (row, sample), which may come in any order.

    Raises ValueError when the two do not name the same samples.
    """
    others = _by_sample(other, scores)
    margins = []
    for score in scores:
        against = others[score.row, score.sample].value
        if score.value is not None and against is not None:
            margins.append(score.value - against)
    wins, losses = sum(margin > 0 for margin in margins), sum(margin < 0 for margin in margins)
    ties = len(margins) - wins - losses
    return Comparison(
        compared=len(margins),
        wins=wins,
        ties=ties,
        losses=losses,
        left_out=len(scores) - len(margins),
        win_rate=(wins + ties / 2) / len(margins) if margins else None,
        margin=(found := spread(margins)),
        margin_stderr=found.std / math.sqrt(found.count) if found is not None and found.count > 1 else None,
        p=sign_test(wins, losses) if margins else None,
    )


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and spread of finite numbers, summed exactly; None for no numbers. Raises ValueError for NaN or infinity."""
    bad = [index for index, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"evaluation: not a finite number; found: {values[bad[0]]} at position {bad[0]}; expected: finite numbers "
            "only; drop or mend that sample first"
        )
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    std = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0
    return Spread(len(values), mean, std, float(min(values)), float(max(values)))


def _source_values(scores: Sequence[Score], name: str) -> list[float]:
    values = [score.by_source.get(name) for score in scores]
    return [value for value in values if value is not None]


def _by_sample(scores: Sequence[Score], of: Sequence[Response] | Sequence[Score]) -> dict[tuple[int, int], Score]:
    """Scores by (row, sample); ValueError unless they name exactly the samples of `of`, each once."""
    found = {(score.row, score.sample): score for score in scores}
    expected = {(one.row, one.sample) for one in of}
    if found.keys() != expected or len(found) != len(scores) or len(expected) != len(of):
        odd = sorted(found.keys() ^ expected)[:3]
        raise ValueError(
            f"evaluation: two sets of one evaluation must name the same (row, sample) once each; found: {len(scores)} "
            f"and {len(of)}, differing first in {odd or 'repeated ones'}; expected: the same samples on both sides"
        )
    return found
