"""PPO's steps in a tracker, through transformers' own callback: a real MLflow, storing to files."""

from pathlib import Path
from typing import Any

import mlflow
import pytest
from toy import gpt2

from raytrl.roles.trackers import Trackers


def test_mlflow_gets_settings_and_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # it would rather have a database
    values: dict[str, Any] = {"seed": 7, "ppo.learning_rate": 1e-5}
    trackers = Trackers(["mlflow"], values, "a-run", str(tmp_path / "scratch"), gpt2(width=16), 3)
    for step in (1, 2):
        trackers.log(step, {"objective/kl": 0.5 * step, "time/step_s": 1.0})
        mlflow.flush_async_logging()  # two of its threads that make one folder at once lose a line
    trackers.close()
    (run,) = [path.parent for path in (tmp_path / "mlruns").glob("*/*/metrics")]
    assert (run / "tags/mlflow.runName").read_text() == "a-run"
    assert (run / "params/seed").read_text() == "7"
    assert (run / "params/ppo.learning_rate").read_text() == "1e-05"
    assert not (run / "params/num_train_epochs").exists()  # a trainer's default, which PPO never reads
    mlflow.flush_async_logging()
    lines = (run / "metrics/objective/kl").read_text().splitlines()
    # The callback logs without waiting, so lines may change places; each names its step.
    assert sorted(line.split()[1:] for line in lines) == [["0.5", "1"], ["1.0", "2"]]
