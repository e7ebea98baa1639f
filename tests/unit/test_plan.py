"""`raytrl plan`: what it answers, for this machine and for a described cluster."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from raytrl.config.load import load_run
from raytrl.errors import ConfigError, ResourceError
from raytrl.launch.session.session import planned_cluster
from raytrl.plan.checks.supervised import prepare_supervised
from raytrl.plan.plan import plan
from raytrl.records.plan import Plan
from raytrl.report.plan import plan_view
from raytrl.rundir import RunDirectory
from tests.ppo_files import make_files, ppo_file
from tests.runs import raytrl, run_file, text_rows, write_rows

NODES = ["nodes=2,gpus=8,gpu_gib=80,cpus=64,mem_gib=512"]
LARGE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
ON_GPUS = {"workers": 8, "resources": {"GPU": 1, "CPU": 4}}


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def planned(file: str, *overrides: str, cluster: list[str] | None = None, models: str = "") -> Plan:
    loaded = load_run(file, list(overrides))
    return plan(loaded, planned_cluster(loaded.run, cluster or ()), models)


def sft(tmp_path: Path, **sections: Any) -> str:
    write_rows(tmp_path / "train.jsonl", text_rows(60))
    return run_file(tmp_path, "a", **sections)


def large(tmp_path: Path, **sections: Any) -> str:
    """An 8B model from nothing on 8 GPUs."""
    return sft(
        tmp_path, **{"model": {"config": LARGE, "tokenizer": {"vocab_size": 300}}, "learner": ON_GPUS} | sections
    )


def test_a_run_on_this_machine(tmp_path: Path) -> None:
    training = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3}
    found = planned(sft(tmp_path, training=training, learner={"workers": 1}))
    assert found.where.startswith("this machine: 1 x CPU ")
    words = dict(found.words)
    assert words["step"] == "12 rows = 4 a forward pass x 3 accumulated x one worker"
    assert words["steps"] == "10 optimizer steps = 5 an epoch (60 rows) x 2"
    assert "time" not in words
    (role,) = found.roles
    assert role.nodes == {"this machine": 1}
    assert 0.3 < sum(role.memory_gib.values()) < 2


DROP = {"dataloader_drop_last": True, "per_device_train_batch_size": 8, "max_steps": -1}


@pytest.mark.parametrize(
    ("rows", "workers", "training", "steps"),
    [
        (60, 1, {}, 24),  # 7.5 batches of 8
        (60, 1, {"dataloader_drop_last": True}, 21),
        (60, 2, {"dataloader_drop_last": True, "gradient_accumulation_steps": 2}, 6),
        (60, 2, {"gradient_accumulation_steps": 2}, 6),
        (5, 1, {}, 3),
        (8, 1, {"dataloader_drop_last": True}, 3),
        (60, 1, {"num_train_epochs": 0.001}, 1),
        (400, 1, {"num_train_epochs": 1.1}, 56),  # 1.1 * 50 is 55.00000000000001, and the trainer rounds up
        (5, 1, {"max_steps": 7}, 7),
    ],
)
def test_steps_are_those_of_the_trainer(
    rows: int, workers: int, training: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    values = {"per_device_train_batch_size": 8, "max_steps": -1, "num_train_epochs": 3, **training}
    run = load_run(sft(tmp_path, training=values, learner={"workers": workers}), []).run
    assert run.steps({"data.train": rows}) == steps
    from transformers import Trainer, TrainingArguments  # its own arithmetic, on as many batches as a worker has

    batches = -(-rows // (8 * workers)) if "dataloader_drop_last" not in training else rows // (8 * workers)
    arguments = TrainingArguments(
        **{k: v for k, v in values.items() if k != "dataloader_drop_last"}, output_dir=str(tmp_path), use_cpu=True
    )
    stand_in = SimpleNamespace(
        get_total_train_batch_size=lambda _: 8, get_sp_size=lambda: 1, num_examples=lambda _: rows
    )
    assert Trainer.set_initial_training_values(stand_in, arguments, [None] * batches)[-1] == steps


@pytest.mark.parametrize(
    ("training", "learner", "found"),
    [
        ({}, {"workers": 1}, "found: 5 rows for batches of 8 (training.per_device_train_batch_size 8)"),
        ({"max_steps": 9}, {"workers": 1}, "found: 5 rows for batches of 8"),
        (
            {"per_device_train_batch_size": 4},
            {"workers": 2},
            "found: 5 rows for batches of 8 (training.per_device_train_",
        ),
    ],
)
def test_a_run_without_a_step_is_refused(
    training: dict[str, Any], learner: dict[str, Any], found: str, tmp_path: Path
) -> None:
    file = sft(tmp_path, training=DROP | training, learner=learner)
    write_rows(tmp_path / "train.jsonl", text_rows(5))
    with pytest.raises(
        ConfigError, match=r"data.train: training.dataloader_drop_last drops .* an epoch has no step"
    ) as error:
        planned(file)
    assert found in str(error.value)
    run: Any = load_run(file, []).run
    with pytest.raises(ConfigError, match="an epoch has no step"):
        prepare_supervised(run, RunDirectory(str(tmp_path), "x"))


def test_an_evaluation_of_no_rows_is_refused(tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "train.jsonl"), "eval": write_rows(tmp_path / "few.jsonl", text_rows(3))}
    training = DROP | {"per_device_eval_batch_size": 4}
    with pytest.raises(ConfigError, match=r"data\.eval: .* nothing is evaluated; found: 3 rows for batches of 4"):
        planned(sft(tmp_path, training=training, data=data, learner={"workers": 1}))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"max_steps": 0}, "training.max_steps: 0 is a run without a step"),
        ({"max_steps": -1, "num_train_epochs": 0}, "training.num_train_epochs: a run without a step; found: 0"),
        ({"max_steps": -1, "num_train_epochs": -1.0}, "training.num_train_epochs: a run without a step; found: -1"),
    ],
)
def test_no_steps_asked_for_are_refused(training: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run(sft(tmp_path, training=training), [])


def test_what_packing_leaves_is_counted_by_the_worker(tmp_path: Path) -> None:
    run: Any = load_run(sft(tmp_path, training=DROP | {"packing": True}, learner={"workers": 1}), []).run
    assert run.too_few_rows({"data.train": 5}) == []
    assert "an epoch has no step" in run.without_batch({"data.train": 5})[0]


def test_a_model_that_nobody_has_counted_is_planned_without_an_estimate(tmp_path: Path) -> None:
    config = {
        "model_type": "mamba2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 32,
        "n_groups": 1,
    }
    found = planned(sft(tmp_path, model={"config": config, "tokenizer": {"vocab_size": 300}}))
    assert not any(role.memory_gib for role in found.roles)
    assert [note for note in found.notes if note.startswith("memory is not estimated: model.config: mamba2 ")]


def test_an_earlier_start_tells_the_time(tmp_path: Path) -> None:
    file = sft(tmp_path, learner={"workers": 1})
    folder = tmp_path / "runs/a"
    folder.mkdir(parents=True)
    rows = [json.dumps({"step": i, "time/step_s": 1.0 + i / 10}) for i in range(1, 4)]
    (folder / "metrics.jsonl").write_text("\n".join([*rows, json.dumps({"step": 3, "eval_loss": 1}), '{"st']))
    assert dict(planned(file).words)["time"].startswith(
        "1.20 s a step, the median of the last 3 of an earlier start; 8 steps"
    )


def test_a_large_model_on_a_described_cluster(tmp_path: Path) -> None:
    found = planned(
        large(tmp_path, learner=ON_GPUS | {"deepspeed": {"zero_optimization": {"stage": 3}}}), cluster=NODES
    )
    (role,) = found.roles
    assert role.nodes == {"node 1": 8}
    assert (role.device, role.room_gib) == ("GPU", 80)
    assert role.memory_gib["optimizer"] == pytest.approx(12 * 8.03e9 / 8 / 2**30, rel=0.01)


def test_ram_beside_a_gpu_is_shown(tmp_path: Path) -> None:
    """An 8B model's optimizer on 8 GPUs is 120 GB of RAM when it is offloaded: 16 bytes a parameter."""
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    found = planned(large(tmp_path, learner=ON_GPUS | {"deepspeed": {"zero_optimization": zero}}), cluster=NODES)
    (role,) = found.roles
    assert role.host_gib > 16 * 8.03e9 / 8 / 2**30
    (line,) = [line for line in shown(found).splitlines() if line.startswith("learner.workers (GPU)")]
    assert line.endswith(f"; + {role.host_gib:.1f} GiB RAM")
    assert "GiB RAM" not in shown(planned(sft(tmp_path, learner={"workers": 1}))).partition("memory, GiB")[2]


def shown(found: Plan) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(plan_view(found))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def test_what_cannot_fit_names_the_setting_that_would(tmp_path: Path) -> None:
    """16 bytes a parameter are 120 GiB; sharded over 8 GPUs they are 15."""
    file = large(tmp_path, training={"model_init_kwargs": {"dtype": "float32"}})
    with pytest.raises(ResourceError) as caught:
        planned(file, cluster=NODES)
    text = str(caught.value)
    assert text.startswith("memory: each of learner.workers on its GPU: needs about 1")
    assert "weights 29.9" in text or "weights 44.9" in text
    assert "found: 80.0 GiB on the described cluster; would fit by this estimate: " in text
    fitting = text.rpartition("estimate: ")[2].strip("'")
    assert planned(file, fitting, cluster=NODES)


def test_tight_memory_is_a_note(tmp_path: Path) -> None:
    found = planned(large(tmp_path), cluster=["gpus=8,gpu_gib=150,cpus=64,mem_gib=512"])
    assert any(note.startswith("memory is tight: each of learner.workers on its GPU") for note in found.notes)


def test_ppo_on_two_nodes_and_models_that_are_elsewhere(tmp_path: Path) -> None:
    make_files(tmp_path)
    gpu = {"GPU": 1, "CPU": 4}
    judge = [{"name": "judge", "model": "some/judge"}]
    file = ppo_file(
        tmp_path,
        "a",
        model={"path": "some/policy"},
        learner={"workers": 8, "resources": gpu},
        rollout={"actors": 6, "resources": gpu, "chunk_prompts": 1},
        reward={"actors": 2, "resources": gpu, "sources": judge},
        lora={"r": 16, "target_modules": "all-linear"},
    )
    unknown = planned(file, cluster=NODES)
    assert [role.memory_gib for role in unknown.roles] == [{}, {}, {}]
    assert sum("no config.json on this machine" in note for note in unknown.notes) == 2
    with pytest.raises(ResourceError, match="need 64 CPU, 16 GPU"):
        planned(file)
    for name in ("policy", "judge"):
        (tmp_path / "models/some" / name).mkdir(parents=True)
        (tmp_path / "models/some" / name / "config.json").write_text(json.dumps(LARGE))
    found = planned(file, cluster=NODES, models=str(tmp_path / "models"))
    assert {role.key: role.nodes for role in found.roles} == {
        "rollout.actors": {"node 1": 6},
        "reward.actors": {"node 1": 2},
        "learner.workers": {"node 2": 8},
    }
    assert all(role.memory_gib["weights"] > 10 for role in found.roles)
    words = dict(found.words)
    assert words["update"] == "4 optimizer steps = 2 epochs x 2 minibatches of 8 responses"
    assert words["steps"] == "8; 128 responses, 128 prompts = 3.2 epochs of 40 prompts"
    assert "8.03 billion parameters" in shown(found)


def test_vllm_takes_its_share_of_a_gpu_whole(tmp_path: Path) -> None:
    """What it needs has to fit its share; what others on the GPU need has to fit beside the share."""
    make_files(tmp_path)
    (tmp_path / "models/some/policy").mkdir(parents=True)
    (tmp_path / "models/some/policy/config.json").write_text(json.dumps(LARGE | {"num_hidden_layers": 2}))
    values: dict[str, Any] = {"model": {"path": "some/policy"}, "learner": {"workers": 1, "resources": {"GPU": 0.5}}}
    values["rollout"] = {"engine": "vllm", "actors": 1, "resources": {"GPU": 0.5}}
    file = ppo_file(tmp_path, "a", **values)

    def plan_of(gpu_gib: int, *overrides: str) -> Plan:
        described = [f"nodes=1,gpus=1,gpu_gib={gpu_gib},cpus=8,mem_gib=64"]
        return planned(file, *overrides, cluster=described, models=str(tmp_path / "models"))

    rollout = plan_of(80).roles[0]
    assert rollout.room_gib == pytest.approx(0.45 * 80)
    with pytest.raises(ResourceError, match=r"each of rollout.actors in its share of its GPU: .*found: 2.0 GiB"):
        plan_of(80, "rollout.engine_args.gpu_memory_utilization=0.025")
    with pytest.raises(ResourceError, match="all processes on the GPUs of node 1"):
        plan_of(80, "rollout.engine_args.gpu_memory_utilization=0.99", "rollout.resources.GPU=0.1")


def test_missing_data_is_an_error_here_and_a_note_elsewhere(tmp_path: Path) -> None:
    file = run_file(tmp_path, "a", learner={"workers": 1})
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    for place, words in (("./nowhere/rows", "not a local file or folder"), (str(tmp_path / "rows.xlsx"), "suffix")):
        with pytest.raises(ConfigError, match=rf"^data\.train: .*{words}"):
            planned(file, f"data.train={place}")
    with pytest.raises(ConfigError, match=r"^data\.train: no such file"):
        planned(file)
    assert any("data.train: no such file" in note for note in planned(file, cluster=NODES).notes)


def test_a_builder_that_reads_a_folder_is_no_hub_id(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows/a.jsonl", text_rows(7))
    file = run_file(
        tmp_path, "a", learner={"workers": 1}, data={"train": {"path": "json", "data_dir": f"{tmp_path}/rows"}}
    )
    assert dict(planned(file).words)["data"].startswith("7 rows")


def test_files_and_folders_of_the_hub_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrl.data.load_data", lambda *_: pytest.fail("it was loaded"))
    for more in ({"data_files": "en/a.jsonl"}, {"data_dir": "en"}):
        planned(run_file(tmp_path, "a", learner={"workers": 1}, data={"train": {"path": "org/rows", **more}}))


IDLE = {
    "checkpoint.every=8": "checkpoint.every: 8, and the run has 8 steps",
    "training.num_train_epochs=2": "training.num_train_epochs: does nothing beside training.max_steps 8",
    "training.eval_steps=2": "training.eval_steps: does nothing with training.eval_strategy: no",
    "training.per_device_eval_batch_size=4": "does nothing without data.eval",
    "learner.deepspeed={zero_optimization: {stage: 2}}": "ZeRO shards over workers, and there is one",
    "learner.workers=1": None,
}


@pytest.mark.parametrize("override", IDLE)
def test_settings_that_do_nothing(tmp_path: Path, override: str) -> None:
    notes = [n for n in planned(sft(tmp_path, learner={"workers": 1}), override).notes if n.startswith("does nothing")]
    expected = IDLE[override]
    assert any(expected in note for note in notes) if expected else notes == []


def test_actors_without_work(tmp_path: Path) -> None:
    make_files(tmp_path)
    file = ppo_file(tmp_path, "a", rollout={"actors": 6})
    assert "rollout.actors: 2 of 6 would always be idle" in " ".join(planned(file, cluster=NODES).notes)


def test_the_command(tmp_path: Path) -> None:
    file = sft(tmp_path, learner={"workers": 1})
    output = raytrl("plan", file)
    assert "learner.workers" in output
    assert "this machine: 1" in output
    assert not (tmp_path / "runs").exists()
    refused = raytrl("plan", file, "learner.workers=99", status=2)
    assert "need 99 CPU; found: " in refused
    assert "would fit: learner.workers=" in refused
