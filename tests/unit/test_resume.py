"""Where a run stands: fresh, to be continued or done; what may change between two starts and what may not."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrl.config.load import load_run
from raytrl.config.runs.base import Run
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.sections.learner import LearnerSection
from raytrl.errors import ConfigError
from raytrl.launch.runs import checkpoints
from raytrl.launch.runs.checkpoints import RecordCopy, settle
from raytrl.launch.runs.resume import Standing, inspect_run
from raytrl.rundir import RunDirectory
from tests.ppo_files import ppo_file
from tests.runs import run_file

RECORD = "checkpoints/checkpoint_manager_snapshot.json"


def run_of(tmp_path: Path, **sections: Any) -> SupervisedRun:
    run = load_run(run_file(tmp_path, "a", **sections), []).run
    assert isinstance(run, SupervisedRun)
    return run


def started(run: Run, state: str = "running") -> RunDirectory:
    """The run directory as a start of this run leaves it."""
    run_dir = RunDirectory(run.output_dir, run.name)
    run_dir.write("config.yaml", yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
    run_dir.update_manifest(state=state)
    return run_dir


def commit(run_dir: RunDirectory, steps: list[int], world_size: int) -> None:
    """Checkpoints of these steps, with Ray Train's record of them."""
    results = [
        {"version": 0, "checkpoint_dir_name": f"checkpoint_{n}", "metrics": {"step": n, "world_size": world_size}}
        for n in steps
    ]
    snapshot = {
        "ray_version": "2.60.0",
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(steps))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(steps),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    for n in steps:
        run_dir.write(f"checkpoints/checkpoint_{n}/state", "x")
    run_dir.write(RECORD, json.dumps(snapshot))


def test_an_empty_directory_is_a_fresh_run(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert inspect_run(run, RunDirectory(run.output_dir, run.name)) == Standing("fresh")


def test_a_finished_run_is_done(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert inspect_run(run, started(run, "done")).state == "done"


@pytest.mark.parametrize("state", ["running", "failed"])
def test_a_run_that_was_cut_off_continues_from_its_last_committed_checkpoint(state: str, tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run_dir = started(run, state)
    commit(run_dir, [4, 6], world_size=2)
    run_dir.write("checkpoints/checkpoint_8/state", "half written")
    run_dir.write(".scratch/x", "left over")
    standing = inspect_run(run, run_dir)
    assert standing.state == "continue"
    assert standing.checkpoint is not None
    assert (standing.checkpoint.step, standing.checkpoint.world_size) == (6, 2)
    assert standing.checkpoint.path == run_dir.at("checkpoints/checkpoint_6")
    assert standing.notices == ()
    assert "checkpoint_8" in run_dir.folders("checkpoints")  # what was killed may still be about to put it on record
    assert settle(run_dir) == []
    assert sorted(run_dir.folders("checkpoints")) == ["checkpoint_4", "checkpoint_6"]
    assert not run_dir.exists(".scratch")


def test_a_checkpoint_that_is_gone_costs_its_steps_and_not_the_run(tmp_path: Path) -> None:
    """Ray Train refuses a record that names a folder that is not there, with a traceback."""
    from ray.train import Result

    run = run_of(tmp_path)
    run_dir = started(run)
    commit(run_dir, [4, 6, 8], world_size=2)
    run_dir.delete("checkpoints/checkpoint_4")  # an older one costs nothing
    standing = inspect_run(run, run_dir)
    assert (standing.checkpoint and standing.checkpoint.step, standing.notices) == (8, ())
    run_dir.delete("checkpoints/checkpoint_8")
    standing = inspect_run(run, run_dir)
    assert standing.checkpoint is not None and standing.checkpoint.step == 6
    assert standing.notices == ("the checkpoint of step 8 is on record, and its folder is gone: goes on from step 6",)
    assert settle(run_dir) == [*standing.notices]  # looking at it has written nothing
    found = Result.from_path(run_dir.at("checkpoints")).checkpoint
    assert found is not None and found.path == standing.checkpoint.path
    again = inspect_run(run, run_dir)
    assert (again.checkpoint, again.notices) == (standing.checkpoint, ())


NO_CHECKPOINT = {
    "gone": r"its checkpoints are gone; found: a record of those of steps 4, 6.*--fresh",
    "half": r"record of its checkpoints cannot be read; found: 1 bytes.*--fresh",
}


@pytest.mark.parametrize("kind", NO_CHECKPOINT)
def test_without_any_checkpoint_a_run_is_not_thrown_away(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_ENDS_S", 0.0)
    run = run_of(tmp_path)
    run_dir = started(run)
    commit(run_dir, [4, 6], world_size=2)
    if kind == "gone":
        for step in (4, 6):
            run_dir.delete(f"checkpoints/checkpoint_{step}")
    else:
        run_dir.write(RECORD, "{")
    with pytest.raises(ConfigError, match=NO_CHECKPOINT[kind]):
        inspect_run(run, run_dir)
    standing = inspect_run(run, run_dir, may_begin_anew=True)  # a trial of a sweep
    assert standing.state == "fresh" and standing.notices[0].endswith("starts from the beginning")


def test_a_start_that_is_killed_may_be_writing_when_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path)
    run_dir = started(run)
    commit(run_dir, [4], world_size=2)
    whole = run_dir.read(RECORD)
    run_dir.write(RECORD, "")
    monkeypatch.setattr(checkpoints.time, "sleep", lambda seconds: run_dir.write(RECORD, whole or ""))
    assert inspect_run(run, run_dir).state == "continue"


@pytest.mark.parametrize("left", ["", '{"ray_version": "2.60.0", "checkpoint_res'])
def test_half_a_record_is_followed_by_the_one_before_it(left: str, tmp_path: Path) -> None:
    """Ray Train writes it in place."""
    run = run_of(tmp_path)
    run_dir = started(run)
    copy = RecordCopy(run_dir)
    copy.keep()  # there is none yet
    commit(run_dir, [4], world_size=2)
    copy.keep()
    commit(run_dir, [4, 6], world_size=2)
    copy.keep()
    run_dir.delete("checkpoints/checkpoint_4")
    run_dir.write("checkpoints/checkpoint_8/state", "x")
    run_dir.write(RECORD, left)
    copy.keep()  # which keeps no half one
    standing = inspect_run(run, run_dir)
    assert standing.checkpoint is not None and standing.checkpoint.step == 6
    assert standing.notices == ("the record of checkpoints was not written to its end: goes on by the one before it",)
    assert settle(run_dir) == [*standing.notices]
    assert run_dir.folders("checkpoints") == ["checkpoint_6"]
    assert inspect_run(run, run_dir).notices == ()


def test_a_start_that_committed_nothing_begins_again_and_says_so(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run_dir = started(run)
    run_dir.write("checkpoints/checkpoint_2/state", "half written")
    standing = inspect_run(run, run_dir)
    assert (standing.state, standing.checkpoint) == ("fresh", None)
    assert "starts from the beginning" in standing.notices[-1]


def test_settings_may_change_while_nothing_is_committed(tmp_path: Path) -> None:
    run_dir = started(run_of(tmp_path))
    assert inspect_run(run_of(tmp_path, seed=7), run_dir).state == "fresh"


@pytest.mark.parametrize("state", ["running", "done"])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"training": {"learning_rate": 0.5}}, "training.learning_rate was 0.01, now 0.5"),
        ({"training": {"max_grad_norm": 2.0}}, "training.max_grad_norm was None, now 2.0"),
        ({"seed": 7}, "seed was 0, now 7"),
        ({"lora": {"r": 4}}, "lora was None, now {'r': 4}"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype was 'auto', now 'bfloat16'"),
        ({"learner": {"deepspeed": {}}}, "learner.deepspeed was None, now {}"),
    ],
)
def test_other_settings_are_refused_by_name(state: str, change: dict[str, Any], line: str, tmp_path: Path) -> None:
    run_dir = started(run_of(tmp_path), state)
    commit(run_dir, [4], world_size=2)
    with pytest.raises(ConfigError) as caught:
        inspect_run(run_of(tmp_path, **change), run_dir)
    assert f"other settings: {line}; choose another name, or --fresh" in str(caught.value)


def test_where_it_runs_may_change_and_is_told(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run_dir = started(run)
    commit(run_dir, [4], world_size=2)
    changed = run_of(
        tmp_path,
        output_dir=str(tmp_path / "elsewhere" / ".." / "runs"),
        learner={"workers": [1, 2], "resources": {"CPU": 2}, "stall_timeout_s": 5, "max_failures": 0}
        | {"placement": "spread", "labels": {"role": "learner"}},
        checkpoint={"every": 1},
        report_to=["tensorboard"],
        cluster={"address": "auto"},
    )
    standing = inspect_run(changed, run_dir)
    assert standing.state == "continue"
    keys = {notice.partition(" was ")[0] for notice in standing.notices}
    assert keys == {
        "checkpoint.every",
        "cluster.address",
        "learner.labels.role",
        "learner.max_failures",
        "learner.placement",
        "learner.resources.CPU",
        "learner.stall_timeout_s",
        "learner.workers",
        "output_dir",
        "report_to",
    }


def test_resources_that_nobody_wrote_are_chosen_anew_without_a_word(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run_dir = started(run.model_copy(update={"learner": run.learner.model_copy(update={"resources": {"CPU": 0.66}})}))
    commit(run_dir, [4], world_size=2)
    learner = LearnerSection(**run.learner.model_dump(exclude={"resources"}))
    standing = inspect_run(run.model_copy(update={"learner": learner}), run_dir)
    assert (standing.state, standing.notices) == ("continue", ())
    written = LearnerSection(**learner.model_dump(exclude={"resources"}), resources={"CPU": 1})
    standing = inspect_run(run.model_copy(update={"learner": written}), run_dir)
    assert standing.notices == ("learner.resources.CPU was 0.66, now 1.0",)


def test_more_workers_without_deepspeed_continue_with_a_notice_of_the_larger_step(tmp_path: Path) -> None:
    run_dir = started(run_of(tmp_path))
    commit(run_dir, [4], world_size=2)
    standing = inspect_run(run_of(tmp_path, learner={"workers": 3}), run_dir)
    assert standing.state == "continue"
    assert "written by 2 workers: with 3 a step takes 12 rows instead of 8" in standing.notices[-1]


def test_an_elastic_run_of_another_most_is_told_of_the_other_step_whatever_wrote_the_checkpoint(tmp_path: Path) -> None:
    run_dir = started(run_of(tmp_path, learner={"workers": [1, 2]}))
    commit(run_dir, [4], world_size=1)
    assert inspect_run(run_of(tmp_path, learner={"workers": [1, 2]}), run_dir).notices == ()
    assert "step takes" not in str(inspect_run(run_of(tmp_path, learner={"workers": 2}), run_dir).notices)
    standing = inspect_run(run_of(tmp_path, learner={"workers": 1}), run_dir)
    assert "with 1 a step takes 4 rows instead of 8" in standing.notices[-1]


def test_another_number_of_workers_under_deepspeed_is_refused_with_both_numbers(tmp_path: Path) -> None:
    zero = {"zero_optimization": {"stage": 2}}
    run = run_of(tmp_path, learner={"workers": 2, "deepspeed": zero})
    run_dir = started(run)
    commit(run_dir, [4], world_size=2)
    assert inspect_run(run, run_dir).state == "continue"
    with pytest.raises(
        ConfigError, match=r"learner\.workers: .*step 4 .*2 workers under ZeRO-2.*found: 3; expected: 2"
    ):
        inspect_run(run_of(tmp_path, learner={"workers": 3, "deepspeed": zero}), run_dir)


def test_how_ppos_weights_travel_may_change(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    file = ppo_file(tmp_path, "travel")
    run = load_run(file, []).run
    run_dir = started(run)
    commit(run_dir, [4], world_size=2)
    changed = load_run(file, ["rollout.weight_transfer=broadcast", "rollout.actors=3"]).run
    standing = inspect_run(changed, run_dir)
    assert standing.state == "continue"
    assert "rollout.weight_transfer was 'object_store', now 'broadcast'" in str(standing.notices)
