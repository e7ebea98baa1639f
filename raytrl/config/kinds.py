"""Every kind of run file, by the name that `kind` gives it."""

from raytrl.config.eval_run import EvalRun
from raytrl.config.ppo_run import PpoRun
from raytrl.config.runs import DpoRun, RewardRun, Run, SftRun
from raytrl.config.tune import TuneRun

RUNS: dict[str, type[Run]] = {
    "sft": SftRun,
    "reward": RewardRun,
    "dpo": DpoRun,
    "ppo": PpoRun,
    "eval": EvalRun,
    "tune": TuneRun,
}
"""The run files by kind; `train` runs those that train one network, `evaluate` eval, `tune` many of a kind."""
