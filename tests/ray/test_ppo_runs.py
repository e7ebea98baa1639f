"""Whole PPO runs by the command a user types: real Ray, two learners, two rollout actors, and what they leave behind."""

import json
import re
from pathlib import Path

import pytest

from raytrl.records.metrics import METRICS
from tests.ppo_files import make_files, ppo_file
from tests.runs import metrics, raytrl, weights_hash


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ppo")
    make_files(path)
    return path


def test_a_run_raises_its_score_and_leaves_models_that_load(folder: Path) -> None:
    """LoRA, evaluation, two responses a prompt, one epoch of data shorter than the run."""
    file = ppo_file(
        folder,
        "whole",
        lora={"r": 8, "lora_alpha": 32, "target_modules": "all-linear"},
        data={"eval": str(folder / "prompts.jsonl")},
        eval={"every": 10, "rows": 6},
        ppo={
            "steps": 20,
            "batch_size": 64,
            "responses_per_prompt": 2,
            "learning_rate": 3e-2,
            "epochs": 4,
            "minibatches": 2,
            "lr_schedule": "constant",
            "kl": {"coef": 0.02},
        },
        checkpoint={"every": 10},
        report_to=["tensorboard"],
    )
    output = raytrl("ppo", file)
    run = folder / "runs/whole"
    assert re.search(r"learner\.workers +2 x CPU 0\.25 ", output)
    assert ", data parallel " in output
    assert "Traceback" not in output
    assert "Warning" not in output
    assert "step 20/20  score" in output
    rows = metrics(run)
    assert {key for row in rows for key in row} <= set(METRICS)  # each says what it means
    assert [row["step"] for row in rows] == list(range(1, 21))
    first, last = (sum(row["objective/scores_raw"] for row in part) / 4 for part in (rows[:4], rows[-4:]))
    assert last > first + 0.15, (first, last)
    assert [row["step"] for row in rows if "eval/score" in row] == [10, 20]
    assert all(row["time/step_s"] > 0 and row["rollout/actors"] == 2 for row in rows)

    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 20 * 8 + 2 * 6
    assert samples[0].keys() == {
        *("step", "data", "row", "sample", "prompt", "response", "ended", "tokens", "score", "scores"),
    }
    # Spread over the whole batch of 32 prompts, of which each of the two workers holds a half.
    assert [(row["row"], row["sample"]) for row in samples[:8]] == [(row, 0) for row in range(0, 32, 4)]
    evaluated = [row for row in samples if row["data"] == "eval"]
    assert [(row["step"], row["row"]) for row in evaluated] == [(step, row) for step in (10, 20) for row in range(6)]
    scored = [row["score"] for row in evaluated if row["step"] == 20]
    assert sum(scored) / 6 == pytest.approx(rows[-1]["eval/score"], abs=1e-5)
    assert samples[0]["score"] == samples[0]["scores"]["spelling"]
    assert len(list((run / "checkpoints").glob("checkpoint_2*"))) == 2
    assert list((run / "tensorboard").glob("events*"))
    assert not (run / ".scratch").exists()
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["state"], manifest["kind"]) == ("done", "ppo")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(run / "model/merged")
    merged, policy = (
        AutoModelForCausalLM.from_pretrained(place) for place in (run / "model/merged", folder / "policy")
    )
    names = [n for n, p in merged.named_parameters() if not p.equal(dict(policy.named_parameters())[n])]
    assert names
    assert all("proj" in name for name in names)
    assert (run / "model/adapter_config.json").is_file()
    assert (run / "value_model/value_head.pt").is_file()
    assert "PPO" in (run / "model/README.md").read_text()

    before = weights_hash(run / "model")
    assert "finished already" in raytrl("ppo", file)
    refused = raytrl("ppo", file, "ppo.kl.coef=0.5", status=2)
    assert "ppo.kl.coef was 0.02, now 0.5" in refused
    assert weights_hash(run / "model") == before


def test_a_reward_function_that_raises_ends_the_run_with_one_message(folder: Path) -> None:
    (folder / "broken.py").write_text(
        "def broken(completions, trainer_state, **columns):\n"
        "    assert trainer_state.global_step < 3, 'the judge is out'\n"
        "    return [0.0] * len(completions)\n"
    )
    source = {"name": "judge", "function": f"{folder}/broken.py:broken", "retries": 0}
    file = ppo_file(folder, "broken", reward={"resources": {"CPU": 0.5}, "sources": [source]})
    for name in ("datasets", "statistics", "evaluate", "peft"):  # no process may take a user's file for a library
        (folder / f"{name}.py").write_text("raise RuntimeError('imported instead of the library')\n")
    output = raytrl("ppo", file, status=1, cwd=folder)
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    assert "reward source 'judge'" in errors[0]
    assert "the judge is out" in errors[0]
    assert "fix the source, or set reward.on_error: drop" in errors[0]
    assert "continues from" not in output  # a restart would fail the same way
    assert [row["step"] for row in metrics(folder / "runs/broken")] == [1, 2, 3]


REFUSED = {
    "learner.resources.CPU=90": "rollout.actors: 2 x CPU 0.5 + reward.actors: 1 x CPU 0.5 + learner.workers: 2 x "
    "CPU 90 need 181.5 CPU; found: ",
    "model.path=nowhere/at/all": "model.path: no such folder; found: 'nowhere/at/all'",
    "reward.sources.0.function=nowhere.py:f": "nowhere.py",
    "rollout.sampling.max_new_tokens=120": "do not fit the model; found: ",
    "learner.workers=9": "9 workers share the prompts of a step in whole chunks; found: 4 chunks",
    "learner.deepspeed={zero_optimization: {stage: 0}}": "is 0, which is plain data parallelism",
    "learner.deepspeed={zero_optimization: {stage: 2}, gradient_clipping: 1.0}": "is set by ppo.max_grad_norm",
    "learner.workers=[1,2]": "PPO cannot change its number of workers on the way yet",
    "rollout.engine=vllm": "rollout.engine: vllm cannot be taken: ",
    "eval.every=5": "eval: does nothing without data.eval",
    "ppo.kl.horizon=5": "ppo.kl.horizon: does nothing without ppo.kl.target",
    "rollout.sampling.top_p=0.9": "rollout.sampling.top_p: is refused",
    "report_to=all": "ppo needs trackers by name",
    "report_to=[clearml]": "report_to: 'clearml' is not installed",
    "ppo.kl.coeff=0.1": "nearest known key: coef",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_is_refused_before_ray_starts(folder: Path, override: str) -> None:
    from raytrl.config.load import load_run
    from raytrl.errors import RaytrlError
    from raytrl.launch.runs.run import kind_of, run_to_end

    file = ppo_file(folder, "refused")
    with pytest.raises(RaytrlError) as caught:
        run_to_end(kind_of(load_run(file, [override], "ppo")), "a test", False, lambda event: None)
    assert caught.value.exit_status == 2
    assert REFUSED[override] in str(caught.value)
    assert not (folder / "runs/refused/manifest.json").exists()
