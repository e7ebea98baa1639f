"""A sweep's trials as run files: the base file with other values, by the same loader and its checks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytrl.config.load import LoadedRun, load_run, overrides_of
from raytrl.config.runs.base import TrainingRun
from raytrl.config.runs.sweep import TuneRun
from raytrl.errors import ConfigError


@dataclass(frozen=True)
class Edge:
    """The base run with one searched key at one of its extreme values."""

    key: str
    value: Any
    loaded: LoadedRun


def load_base(sweep: LoadedRun) -> LoadedRun:
    """The base run as it is.

    Raises:
        ConfigError: naming the sweep's `base` and what is wrong with it.
    """
    run = sweep.run
    assert isinstance(run, TuneRun)
    base = load_run(run.base, overrides_of(run.fixed))
    where = sweep.where("base")
    if not isinstance(base.run, TrainingRun):
        raise ConfigError(
            f"{where}: base: found: a run file of kind {base.run.kind!r}; expected: sft, reward, dpo or ppo"
        )
    learner = base.run.learner
    if learner.min_workers != learner.max_workers:
        raise ConfigError(
            f"{where}: base: learner.workers is elastic, and trials side by side would take each other's places; found: "
            f"{list(learner.workers) if not isinstance(learner.workers, int) else learner.workers}; expected: one number"
        )
    for role in ("rollout", "reward"):
        if getattr(getattr(base.run, role, None), "placement", "pack").startswith("strict"):
            raise ConfigError(
                f"{where}: base: {role}.placement: a trial's own process shares the placement of its actors, so strict "
                f"placement is not there for sweeps; expected: pack or spread"
            )
    _check_metrics(sweep, run, base.run)
    return base


# Keys of `ppo` that decide which metrics there are: where one is searched, its own values are asked, not the base.
_DECIDE = (
    "ppo.algorithm",
    "ppo.advantage",
    "ppo.kl.coef",
    "ppo.kl.place",
    "ppo.responses_per_prompt",
    "ppo.max_lag",
    "ppo.importance",
    "reference.path",
)


def _check_metrics(sweep: LoadedRun, run: TuneRun, base: TrainingRun, of: str | None = None) -> None:
    """A metric that comes from an evaluation, a reference or a critic needs one. Other unknown names show at a trial's first
    step.

    Args:
        of: the searched key that this base has a value of; None: the base as it is.
    """
    decided = [key for key in run.search if key in _DECIDE]
    for key in ("metric", "limit"):
        for name in [run.metric] if key == "metric" else run.limit:
            is_asked = name.startswith("eval") or not decided or of in decided
            if is_asked and (why := base.why_without(name)) is not None:
                raise ConfigError(
                    f"{sweep.where(key)}: {key}: {name!r} {why[0]}; found: {why[1]} in {run.base}; expected: {why[2]}"
                )


def check_edges(sweep: LoadedRun) -> list[Edge]:
    """Builds the base run with every extreme value, one key at a time.

    Raises:
        ConfigError: with one line for each value that is refused, naming key and value.
    """
    run = sweep.run
    assert isinstance(run, TuneRun)
    edges, problems = [], []
    for key, distribution in run.search.items():
        for value in distribution.edge_values():
            try:
                edge = trial_run(run, {key: value}, "edge", run.output_dir)
                assert isinstance(edge.run, TrainingRun)
                _check_metrics(sweep, run, edge.run, key)
                edges.append(Edge(key, value, edge))
            except ConfigError as error:
                problems.append(f"{sweep.where(f'search.{key}')}: search.{key}: {_value_error(value, error)}")
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    _check_algorithms(sweep, [edge for edge in edges if edge.key == "ppo.algorithm"])
    return edges


def _check_algorithms(sweep: LoadedRun, edges: Sequence[Edge]) -> None:
    """An algorithm is a set of defaults, and a base that has every key written leaves it none to set."""
    seen: dict[str, Any] = {}
    for edge in edges:
        keys = edge.loaded.run.model_dump(mode="json")["ppo"] | {"algorithm": None}
        for value, others in seen.items():
            if others == keys:
                raise ConfigError(
                    f"{sweep.where('search.ppo.algorithm')}: search.ppo.algorithm: {value} and {edge.value} are the same run, "
                    f"as the base has all of their keys written (ppo.advantage, ppo.loss …); expected: a base without them"
                )
        seen[str(edge.value)] = keys


def trial_run(run: TuneRun, values: Mapping[str, Any], name: str, output_dir: str) -> LoadedRun:
    """The run of one trial: the base file, the searched values on the command line, so to say.

    Raises:
        ConfigError: the values do not fit, alone or together.
    """
    own = {"name": name, "output_dir": output_dir}
    return load_run(run.base, overrides_of({**run.fixed, **values, **own}))


def trial_name(number: int, values: Mapping[str, Any]) -> str:
    """A folder name that tells what is in it: `03-learning_rate-1.2e-05-coef-0.05`."""
    words = [f"{number:02}"]
    for key, value in values.items():
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        words += [short_name(key, list(values)), shown]
    return re.sub(r"[^\w.\-]+", "_", "-".join(words))[:100].rstrip(".-_")


def short_name(key: str, keys: Sequence[str]) -> str:
    """The last part of a dotted key, or as many of its last parts as tell it from the other keys."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        tail = ".".join(parts[-count:])
        if sum(other == tail or other.endswith(f".{tail}") for other in keys) == 1:
            return tail
    return key


def _value_error(value: Any, error: ConfigError) -> str:
    """The loader's message without the origin it gives to overrides, which is not where the user wrote the value."""
    lines = [line.removeprefix("command line: ") for line in str(error).splitlines()]
    return f"value {value!r} is refused: {'; '.join(lines)}"
