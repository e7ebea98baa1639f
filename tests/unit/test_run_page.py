"""report.html: what was measured is in it, and what a user wrote cannot break it."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytrl.errors import ConfigError
from raytrl.report.run_page import run_page, write_run_page
from raytrl.rundir import RunDirectory

MANIFEST: dict[str, Any] = {
    "kind": "ppo",
    "state": "done",
    "command": "raytrl ppo run.yaml",
    "metrics": {"objective/kl": 1.25},
    "versions": {"ray": "2.60.0"},
    "origins": {"ppo.steps": "run.yaml:7"},
}


def ppo_rows() -> list[dict[str, Any]]:
    return [
        {"step": step, "objective/kl": 0.1 * step, "objective/scores_raw": step, "time/generate_s": 1.0}
        for step in (1, 2, 3)
    ]


def sample(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "row": 0,
        "prompt": "the film",
        "response": f" of step {step}",
        "scores": {"rule": 0.5},
    } | values


def test_curves_times_responses_and_settings_are_shown() -> None:
    text = run_page("runs/a", MANIFEST, ppo_rows(), [sample(1), sample(2), sample(3)])
    assert text.count("<svg") == 2
    for words in ("KL to the reference, nats a response", ">score<", "generate", "rule 0.50", "run.yaml:7", "1.25"):
        assert words in text
    assert " of step 1" in text
    assert " of step 3" in text
    assert " of step 2" not in text
    assert "tokens a response" not in text  # no data, no picture


def test_held_out_points_join_their_curve() -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}]
    both, alone = (run_page("a", MANIFEST, part, []) for part in (rows, rows[:1]))
    assert "held out" in both
    assert "held out" not in alone


def test_an_evaluation_shows_the_models_side_by_side() -> None:
    rows = [sample(0, model=model, row=row) for model in ("model", "compare") for row in (0, 1)]
    text = run_page("a", MANIFEST, [], rows)
    cells = [
        part.partition("<")[0] for part in text.split("<tr><td>") if part.partition("<")[0] in ("model", "compare")
    ]
    assert cells == ["model", "compare", "model", "compare"]


def test_text_of_a_model_is_text() -> None:
    text = run_page("a", MANIFEST, [], [sample(1, response="<script>alert(1)</script>")])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_failed_run_names_its_error() -> None:
    failed = MANIFEST | {"state": "failed", "error": "loss is not finite"}
    assert "loss is not finite" in run_page("a", failed, [], [])


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no manifest\.json"):
        write_run_page(RunDirectory(str(tmp_path), "nothing"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/manifest.json").write_text(json.dumps(MANIFEST))
    write_run_page(RunDirectory(str(tmp_path), "a"))
    assert (tmp_path / "a/report.html").read_text().startswith("<!doctype html>")
