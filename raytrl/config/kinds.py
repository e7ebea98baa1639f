"""Every kind of run file, by the name that `kind` gives it."""

from raytrl.config.runs.base import Run
from raytrl.config.runs.evaluation import EvalRun
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.runs.serve import ServeRun
from raytrl.config.runs.supervised import DpoRun, RewardRun, SftRun
from raytrl.config.runs.sweep import TuneRun

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
