"""Whole sweeps by the command a user types: real Ray Tune, two trials at a time on shared reward actors."""

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.ppo_files import make_files, ppo_file
from tests.runs import (
    is_committed,
    kill_everything,
    last_step,
    metrics,
    output_of,
    raytrl,
    run_file,
    start,
    text_rows,
    wait_for,
    weights_hash,
    worker_pids,
    write_rows,
)

METRIC = "objective/scores_raw"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune")
    make_files(path)
    return path


def base_file(folder: Path, **sections: Any) -> str:
    small: dict[str, Any] = {
        "learner": {"workers": 1, "resources": {"CPU": 0.5}},
        "rollout": {"actors": 1, "resources": {"CPU": 0.25}},
        "reward": {"resources": {"CPU": 0.25}},
        "report_to": ["tensorboard"],
    }
    return ppo_file(folder, "base", **(small | sections))


def sweep_file(folder: Path, name: str, base: str, **values: Any) -> str:
    sweep = {"kind": "tune", "name": name, "output_dir": str(folder / "runs"), "base": base, "mode": "max", **values}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return str(path)


def trials_of(sweep: Path) -> dict[str, dict[str, Any]]:
    file = sweep / "trials.json"
    return {trial["name"]: trial for trial in json.loads(file.read_text())} if file.exists() else {}


def cut_off(file: str, sweep: Path, step: int) -> dict[str, str]:
    """Starts a sweep, kills everything when one trial is done and another at a step; finished trial → its weights."""
    process = start("tune", file)

    def half_way() -> bool:
        found = trials_of(sweep).values()
        running = [sweep / "trials" / trial["name"] for trial in found if trial["state"] == "running"]
        return any(trial["state"] == "done" for trial in found) and any(
            last_step(run) >= step and is_committed(run) for run in running
        )

    wait_for(f"one trial done, another at step {step}", half_way, process)
    assert len(worker_pids(process, "RewardActor")) == 1
    kill_everything(process)
    done = [name for name, trial in trials_of(sweep).items() if trial["state"] == "done"]
    return {name: weights_hash(sweep / "trials" / name / "model") for name in done}


def starts_of(trial: Path) -> int:
    return int(json.loads((trial / "manifest.json").read_text())["starts"])


def check_finished(sweep: Path, finished: dict[str, str]) -> None:
    """After a cut: what was done was not run again, what was not went on; every trial has each of its steps once."""
    trials = trials_of(sweep)
    for name, trial in trials.items():
        folder = sweep / "trials" / name
        if name in finished:
            assert starts_of(folder) == 1
            assert weights_hash(folder / "model") == finished[name]
        steps = [row["step"] for row in metrics(folder)]
        assert steps == list(range(1, len(steps) + 1))
        assert trial["step"] == len(steps)
    assert any(starts_of(sweep / "trials" / name) == 2 for name in trials.keys() - finished.keys())


def test_a_ppo_sweep_cut_off_half_way_goes_on(folder: Path) -> None:
    """Two trials of different length: one is done when everything is killed, the other goes on from its checkpoint."""
    base = base_file(folder, ppo={"batch_size": 16, "epochs": 2, "minibatches": 2, "learning_rate": 1e-2})
    file = sweep_file(folder, "cut", base, search={"ppo.steps": {"grid": [3, 80]}}, metric=METRIC, average_last=3)
    sweep = folder / "runs/cut"
    finished = cut_off(file, sweep, step=3)
    assert len(finished) == 1
    output = raytrl("tune", file)
    assert "2 trials of CPU 0.75 each beside CPU 0.25 of reward actors that all share" in output
    check_finished(sweep, finished)
    trials = trials_of(sweep)
    assert [(trial["state"], trial["step"]) for trial in trials.values()] == [("done", 3), ("done", 80)]
    best = max(trials.values(), key=lambda trial: trial["metrics"][METRIC])
    manifest = json.loads((sweep / "manifest.json").read_text())
    assert (manifest["state"], manifest["best"], manifest["starts"]) == ("done", best["name"], 2)
    assert weights_hash(sweep / "model") == weights_hash(sweep / "trials" / best["name"] / "model")
    rows = list(csv.DictReader((sweep / "results.csv").open()))
    assert [row["state"] for row in rows] == ["done", "done"]
    assert (sweep / "report.html").read_text().count("<svg") == 3
    assert "this sweep is finished already" in raytrl("tune", file)
    refused = raytrl("tune", file, "search.ppo.steps={grid: [4]}", status=2)
    assert "this run was started with other settings: search.ppo.steps.grid" in refused


@pytest.mark.slow
def test_a_sweep_that_was_cut_off_ends_as_one_that_was_not(folder: Path) -> None:
    """The same trials, states, weights and winner; one trial stays over the KL limit; the best is run once more."""
    base = base_file(folder, ppo={"steps": 12, "batch_size": 16, "epochs": 2, "minibatches": 2})
    values: dict[str, Any] = {
        # Their KL stays below 1.5 and 10 and rises above 28, their scores end near 0.41, 0.53 and 0.99.
        "search": {"ppo.learning_rate": {"grid": [1e-3, 1e-2, 1e-1]}, "ppo.kl.coef": {"grid": [0.05]}},
        "metric": METRIC,
        "average_last": 6,
        "limit": {"objective/kl": 18.0},
    }
    whole, sweep = folder / "runs/whole", folder / "runs/grid"
    raytrl("tune", sweep_file(folder, "whole", base, **values))
    file = sweep_file(folder, "grid", base, **values)
    finished = cut_off(file, sweep, step=3)
    raytrl("tune", file)
    check_finished(sweep, finished)
    trials, uncut = trials_of(sweep), trials_of(whole)
    assert [trial["state"] for trial in trials.values()] == ["done", "done", "over limit"]
    assert "3 values in a row" in list(trials.values())[2]["cause"]
    for name, trial in trials.items():
        assert (trial["state"], trial["metrics"]) == (uncut[name]["state"], uncut[name]["metrics"])
        if trial["state"] == "done":
            models = [weights_hash(each / "trials" / name / "model") for each in (whole, sweep)]
            assert models[0] == models[1]
            assert list((sweep / "trials" / name / "tensorboard").glob("events*"))
    winners = [json.loads((each / "manifest.json").read_text())["best"] for each in (whole, sweep)]
    assert winners[0] == winners[1] == list(trials)[1]
    raytrl("ppo", str(sweep / "best.yaml"))
    assert weights_hash(folder / "runs/grid-best/model") == weights_hash(sweep / "model")


@pytest.mark.slow
def test_optuna_and_asha_on_sft(folder: Path) -> None:
    """ASHA stops the worse trials; their workers and places go, though no `finally` of theirs runs. Two fill the machine."""
    write_rows(folder / "train.jsonl", text_rows(200))
    base = run_file(
        folder,
        "sft-base",
        learner={"workers": 1, "resources": {"CPU": len(os.sched_getaffinity(0)) / 2}},
        training={"max_steps": 40, "logging_steps": 1},
    )
    file = sweep_file(
        folder,
        "optuna",
        base,
        search={
            "training.learning_rate": {"loguniform": [1e-6, 1e-2]},
            "training.max_length": {"choice": [32, 16]},
        },
        trials=5,
        mode="min",
        metric="loss",
        scheduler={"name": "asha", "grace_period": 4, "reduction_factor": 2},
        algorithm={"name": "optuna"},
        max_concurrent=2,
    )
    process, sweep = start("tune", file), folder / "runs/optuna"

    def count(state: str) -> int:
        return sum(trial["state"] == state for trial in trials_of(sweep).values())

    wait_for("a stopped trial", lambda: count("stopped") > 0, process)
    wait_for("no worker without a trial", lambda: len(worker_pids(process)) <= count("running"), process, 60)
    output = output_of(process)
    assert process.returncode == 0, output
    trials = trials_of(sweep)
    states = [trial["state"] for trial in trials.values()]
    assert len(states) == 5
    assert "stopped" in states
    assert states.count("done") + states.count("stopped") == 5
    for trial in trials.values():
        if trial["state"] == "stopped":
            assert trial["step"] < 40
            assert "by asha at step" in trial["cause"]
    done = [trial for trial in trials.values() if trial["state"] == "done"]
    assert min(done, key=lambda trial: trial["metrics"]["loss"])["name"] in output


@pytest.mark.slow
def test_median_stopping_on_sft(folder: Path) -> None:
    """Two trials that learn come first; of the two that do not, each is stopped when it is worse than their median."""
    write_rows(folder / "train.jsonl", text_rows(200))
    base = run_file(
        folder,
        "median-base",
        learner={"workers": 1, "resources": {"CPU": 0.5}},
        training={"max_steps": 40, "logging_steps": 1},
    )
    file = sweep_file(
        folder,
        "median",
        base,
        search={"training.learning_rate": {"grid": [1e-2, 3e-3, 1e-6, 1e-7]}},
        mode="min",
        metric="loss",
        scheduler={"name": "median", "grace_period": 6, "min_samples_required": 2},
        max_concurrent=2,
    )
    process = start("tune", file)
    output = output_of(process)
    assert process.returncode == 0, output
    trials = list(trials_of(folder / "runs/median").values())
    assert [trial["state"] for trial in trials] == ["done", "done", "stopped", "stopped"]
    for trial in trials[2:]:
        assert 6 <= trial["step"] < 40
        assert f"by median at step {trial['step']}" in trial["cause"]
    assert json.loads((folder / "runs/median/manifest.json").read_text())["best"] == trials[0]["name"]


@pytest.mark.slow
def test_too_many_failures_end_the_sweep_with_their_causes(folder: Path) -> None:
    base = base_file(folder)
    file = sweep_file(
        folder, "failing", base, search={"ppo.gamma": {"grid": [0.9, 1.0]}}, metric="objective/score", max_failed=0
    )
    output = raytrl("tune", file, status=1)
    assert "trials failed, more than max_failed 0: 0" in output  # whichever trial failed first
    assert "metric: the run does not log 'objective/score'" in output
    assert "objective/scores" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(folder: Path) -> None:
    base = base_file(folder, ppo={"steps": 500, "batch_size": 16, "epochs": 2, "minibatches": 2})
    file = sweep_file(folder, "stopped", base, search={"ppo.gamma": {"grid": [0.9, 1.0]}}, metric=METRIC)
    process = start("tune", file)
    sweep = folder / "runs/stopped"
    wait_for("step 2", lambda: any(last_step(sweep / "trials" / name) >= 2 for name in trials_of(sweep)), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output = output_of(process)
    assert process.returncode == 130, output
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert "the same command continues" in output


REFUSED = {
    "scheduler.name=pbt": "pbt is refused: Ray Tune's population-based training copies checkpoints",
    "search.ppo.kl.coef={grid: [0.1, -1]}": "search.ppo.kl.coef: value -1 is refused: ppo.kl.coef: input should be",
    "search.model.path={grid: [nowhere/at/all]}": "search.model.path: value 'nowhere/at/all' is refused: model.path: no",
    "fixed={rollout.resources: {CPU: 90}}": "one trial (rollout.actors: 1 x CPU 90 + learner.workers: 1 x CPU 0.5) does "
    "not fit beside what all trials share (reward.actors: 1 x CPU 0.25); found: ",
    "max_concurrent=3": "max_concurrent: 3 trials do not fit, 2 do; each takes rollout.actors: 1 x CPU ",
    "base=nowhere.yaml": "nowhere.yaml: no such run file",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_is_refused_before_ray_starts(folder: Path, override: str) -> None:
    from raytrl.config.load import load_run
    from raytrl.errors import RaytrlError
    from raytrl.launch.runs.run import kind_of, run_to_end

    two_trials = (len(os.sched_getaffinity(0)) - 0.25) / 2.5
    base = base_file(folder, rollout={"actors": 1, "resources": {"CPU": round(two_trials - 0.5, 3)}})
    file = sweep_file(
        folder, "refused", base, search={"ppo.learning_rate": {"grid": [1e-3, 1e-2, 1e-4]}}, metric=METRIC
    )
    with pytest.raises(RaytrlError) as caught:
        run_to_end(kind_of(load_run(file, [override], "tune")), "a test", False, lambda event: None)
    assert caught.value.exit_status == 2
    assert REFUSED[override] in str(caught.value)
    assert not (folder / "runs/refused/manifest.json").exists()
