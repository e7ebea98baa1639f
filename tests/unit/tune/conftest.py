"""A base run file and sweeps over it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrl.config.load import LoadedRun, load_run

BASE: dict[str, Any] = {
    "kind": "ppo",
    "name": "base",
    "model": {"path": "policy"},
    "data": {"train": "prompts.jsonl"},
    "reward": {"sources": [{"name": "rule", "function": "rule.py:rule"}]},
    "ppo": {"steps": 8, "batch_size": 16, "minibatches": 2},
}
SWEEP: dict[str, Any] = {
    "kind": "tune",
    "name": "sweep",
    "search": {"ppo.learning_rate": {"loguniform": [1e-6, 1e-4]}, "ppo.kl.coef": {"choice": [0.01, 0.2]}},
    "trials": 4,
    "metric": "objective/scores_raw",
    "mode": "max",
}


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., LoadedRun]:
    """Loads a sweep; keywords replace its keys, `base` extends the base file; None leaves a key out."""

    def load(base: dict[str, Any] | None = None, **changes: Any) -> LoadedRun:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump({**BASE, **(base or {})}))
        values = {"base": str(tmp_path / "base.yaml"), "output_dir": str(tmp_path / "runs"), **SWEEP, **changes}
        (tmp_path / "sweep.yaml").write_text(
            yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False)
        )
        return load_run(str(tmp_path / "sweep.yaml"), [], "tune")

    return load
