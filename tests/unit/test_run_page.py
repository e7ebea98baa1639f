"""report.html: what was measured is in it, and what a user wrote cannot break it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from raytrl.errors import ConfigError
from raytrl.records.samples import Response, Score
from raytrl.report.run_page import run_page, write_run_page
from raytrl.roles.reward.summary import compare, summarize
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


def test_an_evaluation_shows_its_numbers_and_how_responses_were_scored() -> None:
    samples, scored = [], {}
    for model, shift in (("model", 1.0), ("compare", 0.0)):
        responses = [Response(0, row, 0, (5,), " x", True, (0.0,), 0) for row in range(4)]
        scores = [Score(0, row, 0, row + shift, {"rule": row + shift}) for row in range(4)]
        samples += [sample(0, model=model, row=row, scores={"rule": row + shift}) for row in range(4)]
        scored[model] = (summarize(responses, scores).to_json() | {"path": f"runs/{model}"}, scores)
    results = {model: summary for model, (summary, _) in scored.items()}
    comparison = compare(scored["model"][1], scored["compare"][1]).to_json()
    text = run_page("a", MANIFEST, [], samples, results | {"comparison": comparison})
    assert ">responses by their score, rule<" in text
    for words in (
        "model: runs/model",
        "2.500 ± 1.291",
        "1.500 ± 1.291",
        "100.0%",
        "4, 0, 0",
        "+1.000 ± 0.000",
        "0.125",
    ):
        assert f">{words}<" in text


def _benchmark(model: str, **values: Any) -> dict[str, Any]:
    row = {"task": "praise", "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.1, "n": 3, "of": 3}
    return row | {"fewshot": 0, "limit": None, "model": model} | values


def _models(*keys: str) -> dict[str, Any]:
    return {key: {"path": f"runs/{key}", "engine": "vllm", "dtype": "float32", "chat": False, "cut": 0} for key in keys}


def test_a_benchmark_shows_intervals_and_first_where_the_models_differ() -> None:
    results = _models("model", "compare")
    found = [_benchmark("model"), _benchmark("compare", value=0.25), _benchmark("model", metric="f1", value=None)]
    samples = [
        {"model": model, "task": "praise", "filter": "none", "doc_id": doc, "prompt": f"asks {doc}"}
        | {"response": " so", "metrics": {"acc": float(model == "model" or doc != 5)}}
        for model in ("model", "compare")
        for doc in range(8)
    ]
    text = run_page("a", MANIFEST, [], samples, results | {"benchmarks": found})
    assert ">acc, 95 % of each model by itself<" in text
    assert ">f1, 95 %" not in text  # nothing to draw
    for words in ("0.5000 ± 0.1000", "0.2500 ± 0.1000", "not a number"):
        assert f">{words}<" in text
    assert [part[0] for part in text.split("asks ")[1:]] == ["5", "5", "0", "0", "1", "1", "2", "2"]


def test_pairs_are_drawn_by_category() -> None:
    rows = [
        {"model": "model", "category": category, "accuracy": accuracy, "stderr": 0.1, "n": 4, "limit": None}
        | {"right": 2, "ties": 1, "wrong": 1, "margin": 0.5, "too_long": 0, "unscored": 0}
        for category, accuracy in ((None, 0.6), ("long", 0.7), ("short", None))
    ]
    text = run_page("a", MANIFEST, [], [], {"model": {"path": "runs/reward", "dtype": "float32"}, "pairs": rows})
    assert ">accuracy, 95 % of each model by itself<" in text
    assert [text.count(f">{name}<") for name in ("all pairs", "long", "short")] == [2, 2, 1]  # in picture and table


def test_many_tasks_are_one_below_the_other_and_none_without_error_looks_sure() -> None:
    found = [_benchmark("model", task=f"task {i}", stderr=None if i == 3 else 0.1) for i in range(60)]
    text = run_page(
        "a", MANIFEST, [], [], _models("model") | {"benchmarks": [*found, _benchmark("model", metric="f1")]}
    )
    assert all(f">task {i}<" in text for i in range(60))
    assert 500 < float(re.findall(r'height="([\d.]+)pt"', text)[0]) < 2000
    assert text.count("fill: #ffffff; stroke: #1f77b4") == 1  # one hollow point


def test_what_a_user_wrote_breaks_no_picture() -> None:
    rows = [
        {"model": "model", "category": category, "accuracy": 0.5, "stderr": 0.1, "n": 4, "limit": None}
        | {"right": 2, "ties": 0, "wrong": 2, "margin": 0.5, "too_long": 0, "unscored": 0}
        for category in ("from $10 to $20", "$_a_$", "<b>")
    ]
    text = run_page(
        "a", MANIFEST, [], [], {"model": {"path": "a"}, "pairs": rows}
    )  # of an earlier version, without dtype
    assert text.count(">from $10 to $20<") == 2
    assert "<b>" not in text


@pytest.mark.parametrize("scores", [(0.3, 0.1 + 0.2), (1e17, 1e17), (0.0, 0.0), (0.0, 5e-324)])
def test_scores_that_are_alike_are_drawn(scores: tuple[float, float]) -> None:
    samples = [sample(0, model="model", row=row, scores={"$rule$": score}) for row, score in enumerate(scores)]
    responses = [Response(0, row, 0, (5,), " x", True, (0.0,), 0) for row in range(2)]
    told = [Score(0, row, 0, score, {"$rule$": score}) for row, score in enumerate(scores)]
    results = {"model": summarize(responses, told).to_json() | {"path": "a"}}
    assert ">responses by their score, $rule$<" in run_page("a", MANIFEST, [], samples, results)


def test_a_model_without_scores_stands_beside_one_with() -> None:
    responses = [Response(0, 0, 0, (5,), " x", True, (0.0,), 0)]
    whole = summarize(responses, [Score(0, 0, 0, 2.0, {"rule": 2.0})]).to_json() | {"path": "a"}
    empty = summarize([], []).to_json() | {"path": "b"}
    for results in ({"model": whole, "compare": empty}, {"model": empty, "compare": whole}):
        assert ">score, rule<" in run_page("a", MANIFEST, [], [], results)


def test_what_a_run_had_measured_before_it_failed_is_shown(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/manifest.json").write_text(json.dumps(MANIFEST | {"state": "failed", "error": "gone"}))
    (tmp_path / "a/results.json").write_text(json.dumps(_models("model") | {"benchmarks": [_benchmark("model")]}))
    write_run_page(RunDirectory(str(tmp_path), "a"))
    assert "0.5000 ± 0.1000" in (tmp_path / "a/report.html").read_text()


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
