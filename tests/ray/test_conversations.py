"""Conversations with an environment by the commands that a user types: real Ray, real processes, a model that calls."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from raytrl.records.metrics import METRICS
from tests.conversation_files import TOOLS, conversation_file, make_caller, write_prompts
from tests.runs import (
    kill_everything,
    last_step,
    metrics,
    raytrl,
    start,
    wait_for,
    weights_hash,
    worker_pids,
    write_run_file,
)

PPO = {"steps": 3, "batch_size": 16, "responses_per_prompt": 4, "algorithm": "grpo", "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conversations")
    write_prompts(path)
    return path


@pytest.fixture(scope="module")
def caller(folder: Path) -> str:
    return make_caller(folder)


def test_a_run_calls_scores_and_learns(folder: Path, caller: str) -> None:
    sources = [{"name": "Counter", "weight": 2.0}, {"name": "near", "function": f"{TOOLS}:near"}]
    file = conversation_file(
        folder,
        "whole",
        caller,
        ppo={**PPO, "max_lag": 1, "epochs": 1, "minibatches": 1},
        reward={"sources": sources},
        data={"eval": str(folder / "questions.jsonl")},
        eval={"every": 3, "rows": 4},
    )
    output = raytrl("ppo", file)
    run = folder / "runs/whole"
    assert "increment(step: integer)" in output and "Traceback" not in output
    rows = metrics(run)
    assert {key for row in rows for key in row} <= set(METRICS)
    assert rows[0]["tools/call_frequency"] > 0.5 and rows[0]["conversations/turns"] > 1.5
    assert rows[0]["rollout/logprob_gap_max"] <= 1e-4
    assert all(row["conversations/failed"] == 0 for row in rows)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    called = next(sample for sample in samples if len(sample["messages"]) > 1)
    assert [message["role"] for message in called["messages"][:2]] == ["assistant", "tool"]
    assert called["prompt"][-1]["content"] == "Go. Begin at 0."
    assert called["scores"].keys() == {"Counter", "near"}
    assert called["score"] == pytest.approx(2.0 * called["scores"]["Counter"] + called["scores"]["near"])
    assert "increment(step=" in raytrl("report", str(run)) or "increment(step=" in (run / "report.html").read_text()


@pytest.mark.slow
def test_neither_actors_nor_tool_processes_nor_deaths_change_a_bit(folder: Path, caller: str) -> None:
    ppo = {**PPO, "steps": 12, "max_lag": 1}
    more: dict[str, Any] = {"ppo": ppo, "checkpoint": {"every": 3}, "learner": {"workers": 1}}
    for name, rollout in {
        "one": {"actors": 1, "tool_processes": 1, "resources": {"CPU": 0.5}},
        "three": {"actors": 3, "tool_processes": 4, "resources": {"CPU": 0.3}},
    }.items():
        raytrl("ppo", conversation_file(folder, name, caller, rollout=rollout, **more))
    file = conversation_file(folder, "killed", caller, **more)
    process, run = start("ppo", file), folder / "runs/killed"
    wait_for("step 4", lambda: last_step(run) >= 4, process)
    os.kill(worker_pids(process, "RolloutActor")[-1], signal.SIGKILL)
    wait_for("step 7", lambda: last_step(run) >= 7, process)
    kill_everything(process)
    raytrl("ppo", file)
    assert len({weights_hash(folder / f"runs/{name}/model") for name in ("one", "three", "killed")}) == 1
    samples = {(folder / f"runs/{name}/samples.jsonl").read_text() for name in ("one", "three", "killed")}
    assert len(samples) == 1


def test_an_evaluation_shows_conversations(folder: Path, caller: str) -> None:
    values = {
        "kind": "eval",
        "name": "evaluated",
        "output_dir": str(folder / "runs"),
        "model": {"path": caller},
        "data": {"eval": str(folder / "questions.jsonl")},
        "rows": 4,
        "rollout": {
            "environment": f"{TOOLS}:Counter",
            "tools": [f"{TOOLS}:multiply"],
            "max_prompt_length": 2000,
            "sampling": {"max_new_tokens": 400},
        },
    }
    output = raytrl("eval", write_run_file(folder, "evaluated", values, {}))
    assert "call: increment(step=" in output and "Counter" in output


def test_what_always_fails_ends_the_run_with_its_reason(folder: Path) -> None:
    model = make_caller(folder, call=("misbehave", {"how": "exit"}))
    file = conversation_file(folder, "failing", model, ppo=PPO)
    error = raytrl("ppo", file, status=1)
    assert "too many conversations failed" in error and "rollout.max_failed_fraction" in error


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"environment": f"{TOOLS}:Undocumented"}, "close: is no tool"),
        ({"environment": {"a": f"{TOOLS}:Counter"}}, "each row says which is its own"),
        ({"environment": f"{TOOLS}:Silent"}, "nothing scores a response"),
        ({"max_prompt_length": 20}, "a cut would take the tools away"),
    ],
)
def test_what_cannot_begin_is_refused(folder: Path, caller: str, rollout: dict[str, Any], words: str) -> None:
    file = conversation_file(folder, "refused", caller, ppo=PPO, rollout=rollout)
    assert words in " ".join(raytrl("ppo", file, status=2).split())
