"""Every kind of run file, by the name that `kind` gives it."""

from collections.abc import Mapping
from typing import Any

from raytrl.config.runs.base import Run
from raytrl.config.runs.benchmark import BenchmarkRun
from raytrl.config.runs.evaluation import EvalRun
from raytrl.config.runs.pairs import PairsRun
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.runs.serve import ServeRun
from raytrl.config.runs.supervised import DpoRun, RewardRun, SftRun
from raytrl.config.runs.sweep import TuneRun
from raytrl.errors import ConfigError

RUNS: dict[str, type[Run]] = {
    "sft": SftRun,
    "reward": RewardRun,
    "dpo": DpoRun,
    "ppo": PpoRun,
    "eval": EvalRun,
    "tune": TuneRun,
    "serve": ServeRun,
}
"""The run files by kind; `train` runs those that train one network, `evaluate` eval, `tune` many of a kind,
`serve` serves a finished model."""
FORMS: dict[str, dict[str, type[Run]]] = {"eval": {"reward": EvalRun, "benchmark": BenchmarkRun, "pairs": PairsRun}}
"""Of a kind whose files have exactly one of several sections: the class by that section."""


def forms_of(kind: str) -> tuple[type[Run], ...]:
    """The classes that a kind's run files may be of."""
    return tuple(FORMS[kind].values()) if kind in FORMS else (RUNS[kind],)


def run_class(kind: str, values: Mapping[str, Any]) -> type[Run]:
    """The class that a run file is of, by what stands in it.

    Raises:
        ConfigError: it has none of the sections that decide it, or several.
    """
    forms = FORMS.get(kind, {})
    found = [section for section in forms if values.get(section) is not None]
    if not forms or len(found) == 1:
        return forms[found[0]] if found else RUNS[kind]
    rollout = values.get("rollout")
    if not found and isinstance(rollout, dict) and rollout.get("environment") is not None:
        return RUNS[kind]  # whose get_reward scores
    raise ConfigError(
        f"kind: what `raytrl {kind}` measures; found: {' and '.join(found) or 'none'} of {', '.join(forms)}; expected: "
        f"exactly one of these sections"
    )
