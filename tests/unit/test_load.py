"""Run files and overrides: values, origins, and the one line that answers each mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytrl.config.describe import fields_at
from raytrl.config.load import LoadedRun, load_run, overrides_of
from raytrl.config.renamed import RENAMED_PPO
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.yaml12 import yaml_text
from raytrl.errors import ConfigError

RUN = """\
kind: sft
name: a
model:
  config: {model_type: llama, hidden_size: 32}
  tokenizer: {vocab_size: 300}
data:
  train: train.jsonl
training:
  learning_rate: 1e-5
learner:
  workers: 2
report_to: [tensorboard]
"""
PPO = """\
kind: ppo
name: a
model: {path: base}
data: {train: train.jsonl}
reward: {sources: [{name: rule, function: "rules.py:rule"}]}
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str, kind: str | None = None) -> LoadedRun:
    Path("run.yaml").write_text(text)
    return load_run("run.yaml", list(overrides), kind)


def run_of(text: str, *overrides: str) -> SupervisedRun:
    run = load(text, *overrides).run
    assert isinstance(run, SupervisedRun)
    return run


def error_of(text: str, *overrides: str, kind: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides, kind=kind)
    assert caught.value.exit_status == 2
    return str(caught.value)


def origins(loaded: LoadedRun) -> dict[str, str]:
    return {key: origin for key, _, origin in loaded.values()}


# values


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "1E-5", "0.00001", "'1e-5'"])
def test_every_spelling_of_a_float_is_a_float(text: str) -> None:
    run = run_of(RUN.replace("1e-5", text))
    assert run.training["learning_rate"] == 1e-5
    assert isinstance(run_of(RUN, f"training.learning_rate={text}").training["learning_rate"], float)


def test_a_count_written_as_1e3_is_an_int() -> None:
    value = run_of(RUN, "training.max_steps=1e3").training["max_steps"]
    assert (value, type(value)) == (1000, int)


def test_a_bare_no_is_a_strategy_and_not_false() -> None:
    assert run_of(RUN, "training.eval_strategy=no").training["eval_strategy"] == "no"


@pytest.mark.parametrize("section", ["training", "learner", "checkpoint", "cluster"])
def test_a_section_with_nothing_in_it_is_as_good_as_left_out(section: str) -> None:
    with_null = run_of(RUN.partition("training:")[0] + f"{section}:\n")
    assert with_null == run_of(RUN.partition("training:")[0])


def test_a_null_section_that_may_be_off_stays_off() -> None:
    run = run_of(RUN, "lora=null", "report_to=null")
    assert run.lora is None
    assert run.report_to == []


def test_overrides_reach_into_lists_sections_and_sections_that_are_not_there() -> None:
    run = run_of(RUN, "report_to.0=wandb", "lora.r=4", "training.max_steps=3")
    assert run.report_to == ["wandb"]
    assert run.lora == {"r": 4}
    assert run.training == {"learning_rate": 1e-5, "max_steps": 3}


def test_an_override_changes_one_key_of_a_deepspeed_file() -> None:
    Path("zero.json").write_text('{\n  "zero_optimization": {\n    "stage": 2\n  }\n}')
    run = run_of(RUN, "learner.deepspeed=zero.json", "learner.deepspeed.zero_optimization.stage=1")
    assert run.learner.deepspeed == {"zero_optimization": {"stage": 1}}
    assert json.loads(Path("zero.json").read_text())["zero_optimization"]["stage"] == 2


def test_kind_may_come_from_the_command() -> None:
    loaded = load(RUN.replace("kind: sft\n", ""), kind="sft")
    assert loaded.run.kind == "sft"
    assert origins(loaded)["kind"] == "command line"


# origins


def test_origins_name_the_line_the_command_line_or_default() -> None:
    found = origins(load(RUN, "seed=3", "data.train={path: csv, data_files: a.csv}"))
    assert found["name"] == "run.yaml:2"
    assert found["model.config.hidden_size"] == "run.yaml:4"
    assert found["training.learning_rate"] == "run.yaml:9"
    assert found["report_to"] == "run.yaml:12"
    assert found["seed"] == "command line"
    assert found["data.train.data_files"] == "command line"
    assert found["data.train.split"] == "default"
    assert found["output_dir"] == "default"
    assert found["learner.resources.CPU"] == "default"


def test_a_value_written_as_one_string_gives_its_line_to_what_it_stands_for_only() -> None:
    found = origins(load(RUN))
    assert found["data.train.path"] == found["data.train.data_files"] == "run.yaml:7"
    assert found["data.train.split"] == "default"


def test_a_key_overridden_inside_an_overridden_section_leaves_its_siblings_on_the_command_line() -> None:
    found = origins(load(RUN, "lora={r: 4}", "lora.lora_alpha=8"))
    assert found["lora.r"] == found["lora.lora_alpha"] == "command line"


@pytest.mark.parametrize("indent", ["  ", "\t"])
def test_values_of_a_deepspeed_file_name_that_file(indent: str) -> None:
    Path("zero.json").write_text(
        f'{{\n{indent}"zero_optimization": {{"stage": 2}},\n{indent}"bf16": {{"enabled": "auto"}}\n}}'
    )
    text = RUN.replace("workers: 2", "workers: 2\n  deepspeed: zero.json")
    found = origins(load(text, "learner.deepspeed.zero_optimization.stage=1"))
    assert found["learner.deepspeed.zero_optimization.stage"] == "command line"
    assert found["learner.deepspeed.bf16.enabled"] == ("zero.json:3" if indent == "  " else "zero.json")


# unknown keys


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("trainin.x=1", "trainin: unknown key; nearest known key: training"),
        ("training.learnin_rate=1", "training.learnin_rate: unknown key; nearest known key: learning_rate"),
        ("lora.lora_alpa=1", "lora.lora_alpa: unknown key; nearest known key: lora_alpha"),
        ("learner.worker=1", "learner.worker: unknown key; nearest known key: workers"),
        ("model.tokenizer.vocabsize=1", "model.tokenizer.vocabsize: unknown key; nearest known key: vocab_size"),
        ("data.trian=1", "data.trian: unknown key; nearest known key: train"),
        ("Name=1", "Name: unknown key; nearest known key: name"),
        ("data.train={path: csv, data_files: a.csv, seperator: x}", "data.train.seperator: unknown key"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, answer: str) -> None:
    assert error_of(RUN, override).startswith(f"command line: {answer}")


@pytest.mark.parametrize("section", ["", "training."])
@pytest.mark.parametrize(
    ("old", "today"),
    [
        ("max_seq_length", "training.max_length"),
        ("tokenizer", "model.tokenizer"),
        ("evaluation_strategy", "training.eval_strategy"),
        ("torch_dtype", "model.dtype"),
        ("lora_r", "lora.r"),
        ("peft_config", "lora"),
        ("warmup_ratio", "training.warmup_steps"),
        ("model_name_or_path", "model.path"),
        ("no_cuda", "training.use_cpu"),
    ],
)
def test_an_old_name_is_answered_with_todays(section: str, old: str, today: str) -> None:
    assert f"{section}{old}: unknown key; today this is {today}" in error_of(RUN, f"{section}{old}=1")


@pytest.mark.parametrize("section", ["", "ppo."])
@pytest.mark.parametrize("old", sorted(RENAMED_PPO))
def test_names_of_trls_ppo_trainer_are_answered_with_todays(section: str, old: str) -> None:
    answer = error_of(PPO, f"{section}{old}=1")
    today = RENAMED_PPO[old]
    if f"{section}{old}" == today:
        return  # it kept its name here
    assert f"{section}{old}: unknown key; today this is {today}" in answer
    keys = today.partition(" ")[0].split(".")
    if keys[0] != "nothing:":
        assert keys[-1].rstrip(",:") in fields_at(PpoRun, keys[:-1])


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_baseline"])
def test_an_algorithm_is_no_kind_of_its_own(name: str) -> None:
    assert f"expected: kind: ppo, and ppo.algorithm: {name}" in error_of(PPO, f"kind={name}")


def test_an_old_name_of_a_trainer_is_not_sent_to_a_section_that_ppo_lacks() -> None:
    assert "training." not in error_of(PPO, "max_seq_length=1")
    assert "today this is lora.r" in error_of(PPO, "lora_r=1")


@pytest.mark.parametrize("place", ["", "data.", "model."])
def test_dataset_text_field_is_sent_to_training(place: str) -> None:
    message = error_of(RUN, f"{place}dataset_text_field=text")
    assert f"{place}dataset_text_field: unknown key; today this is training.dataset_text_field" in message


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("output_dir", "`output_dir` and `name` at the top"),
        ("seed", "`seed` at the top"),
        ("deepspeed", "`learner.deepspeed`"),
        ("save_steps", "`checkpoint.every`"),
        ("report_to", "`report_to` at the top"),
        ("push_to_hub", "nothing: the result is the folder model/"),
    ],
)
def test_a_key_that_raytrl_owns_is_sent_to_its_owner(key: str, owner: str) -> None:
    message = error_of(RUN, f"training.{key}=1")
    assert message.startswith(f"command line: training.{key}: is set by {owner}")
    assert "\n" not in message


# wrong values


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.learning_rate=fast", ["training.learning_rate", "'fast'", "float", "trl.SFTConfig"]),
        ("training.max_steps=4.5", ["training.max_steps", "4.5", "int"]),
        ("training.packing=3", ["training.packing", "3", "bool"]),
        ("lora.r=x", ["lora.r", "'x'", "int", "peft.LoraConfig"]),
        ("lora.task_type=CAUSAL_LM", ["lora.task_type", "`kind`"]),
        ("training=[1]", ["training:", "dictionary", "[1]"]),
        ("model.dtype=bf16", ["model.dtype", "'bf16'", "'bfloat16'"]),
        ("name=../x", ["name", "'../x'", "folder name"]),
        ("seed=-1", ["seed", "-1"]),
        ("model.path=gpt2", ["model:", "both path and config"]),
        ("learner.workers=0", ["learner.workers", "found: 0"]),
        ("learner.workers=[3, 2]", ["learner.workers", "(3, 2)"]),
        ("learner.resources={GPU: x}", ["learner.resources.GPU", "'x'"]),
        ("learner.resources={CPU: 0}", ["learner.resources", "positive"]),
        (
            "model.tokenizer={vocab_size: 300, eos_token: a, pad_token: a}",
            ["model.tokenizer.pad_token", "found: 'a', as eos_token"],
        ),
        ("data.train={path: json}", ["data.train.data_files", "missing"]),
        ("data.train.transform=f", ["data.train"]),
        ("report_to=tensorbord", ["report_to", "'tensorbord'", "tensorboard"]),
        ("training.eval_strategy=steps", ["training.eval_strategy", "data.eval is missing"]),
        ("training.fp16=true", ["training.fp16", "needs a GPU"]),
        ("kind=[sft]", ["kind", "['sft']", "sft, reward, dpo"]),
        ("learner.resources={CPU: .nan}", ["learner.resources.CPU: input should be a finite number", "nan"]),
        ("learner.stall_timeout_s=.inf", ["learner.stall_timeout_s: input should be a finite number", "inf"]),
    ],
)
def test_a_wrong_value_names_key_and_value(override: str, parts: list[str]) -> None:
    message = error_of(RUN, override)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        (
            "reward.sources.0.weight=0",
            "reward.sources.0.weight: makes the source do nothing or everything; found: 0.0; ",
        ),
        ("reward.sources.0.url=http://a", "reward.sources.0: source 'rule'; found: function and url; "),
        ("reward.sources.0.wieght=1", "reward.sources.0.wieght: unknown key; nearest known key: weight"),
        (
            "reward.sources=[]",
            "reward.sources: nothing scores a response; found: no sources; expected: at least 1 item",
        ),
        ("reward.sources=[{name: a}]", "reward.sources.0: source 'a'; found: none of model, function, url"),
        ("rollout.resources={CPU: 0}", "rollout.resources: found: {'CPU': 0.0}; expected: positive amounts"),
        ("rollout.sampling.top_p=0.9", "rollout.sampling.top_p: is refused"),
        ("ppo.kl={target: 3, coef: 0}", "ppo.kl.coef: target adapts it by factors"),
    ],
)
def test_a_wrong_value_deep_in_a_section_is_one_line_with_its_whole_key(override: str, answer: str) -> None:
    message = error_of(PPO, override)
    assert "\n" not in message
    assert answer in message


def test_a_reward_actor_may_take_nothing() -> None:
    run = load(PPO, "reward.resources={}").run
    assert isinstance(run, PpoRun)
    assert run.reward.resources == {}
    assert not run.reward.uses_gpu


def test_a_problem_of_the_file_names_its_line() -> None:
    text = RUN.replace("  learning_rate: 1e-5", "  learning_rate: 1e-5\n  max_steps: many")
    assert error_of(text).startswith("run.yaml:10: training.max_steps: ")


def test_all_problems_are_told_at_once() -> None:
    lines = error_of(RUN, "seed=-1", "training.a=1", "learner.b=1").splitlines()
    assert len(lines) == 3


def test_the_file_of_another_kind_names_the_command_for_it() -> None:
    assert error_of(RUN, kind="dpo") == (
        "run.yaml:1: kind: is 'sft', but the command is `raytrl dpo`; run `raytrl sft run.yaml`"
    )


# files that cannot be read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RUN + "name: b\n", "run.yaml:13: key 'name' stands twice; first on line 2"),
        (RUN + "training:\n  x: 1\n", "run.yaml:13: key 'training' stands twice; first on line 8"),
        ("training: {a: 1, a: 2}\n", "run.yaml:1: key 'a' stands twice"),
        (RUN + "? [a, b]\n: 3\n", "run.yaml:13: a key must be a word; found: ['a', 'b']"),
        (RUN + "1: 3\n", "run.yaml:13: 1: "),
        ("kind: sft\n\tname: x\n", "run.yaml:2: not YAML: "),
        (RUN + "x: \x07\n", "run.yaml:13: not YAML: "),
        (RUN + "x: !!python/object:os.system y\n", "run.yaml:13: not YAML: "),
        ("- a\n", "run.yaml: not a run file; found: list; expected: keys and values"),
        ("", "run.yaml: kind: found: None"),
    ],
)
def test_what_is_no_run_file_is_refused_with_its_line(text: str, message: str) -> None:
    assert error_of(text).startswith(message)


def test_a_file_that_is_not_text_is_refused() -> None:
    Path("run.yaml").write_bytes(b"kind: \xff\xfe")
    with pytest.raises(ConfigError, match=r"^run\.yaml: not a text file in UTF-8"):
        load_run("run.yaml", [])


def test_a_missing_file_lists_those_that_are_there() -> None:
    Path("other.yaml").write_text(RUN)
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: no such run file; run files there: other\.yaml"):
        load_run("nowhere.yaml", [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "'seed': not an override; expected: dotted.key=value"),
        ("seed.x=1", "command line: seed: "),
        ("name.x=1", "'name.x=1': name is 'a', which has no keys"),
        ("report_to.3=x", "'report_to.3=x': report_to.3: no such list item; expected: a number from 0 to 0"),
        ("report_to.first=x", "'report_to.first=x': report_to.first: no such list item"),
        ("seed=[1", "command line: seed: '[1':1: not YAML"),
        ("training={a: 1, a: 2}", "command line: training: '{a: 1, a: 2}':1: key 'a' stands twice"),
    ],
)
def test_a_wrong_override_is_refused(override: str, message: str) -> None:
    assert error_of(RUN, override).startswith(message)


# DeepSpeed

DEEPSPEED = RUN.replace("workers: 2", "workers: 2\n  deepspeed: zero.json")


def deepspeed_error(values: object, *overrides: str) -> str:
    Path("zero.json").write_text(json.dumps(values, indent=1))
    return error_of(DEEPSPEED, *overrides)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bf17": {}}, "zero.json:2: learner.deepspeed.bf17: unknown key; nearest known key: bf16"),
        (
            {"zero_optimization": {"stag": 2}},
            "zero.json:3: learner.deepspeed.zero_optimization.stag: unknown key; nearest known key: stage",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero.json:4: learner.deepspeed.zero_optimization.offload_optimizer.devise: unknown key; "
            "nearest known key: device",
        ),
        ({"fp16": {"enable": False}}, "zero.json:3: learner.deepspeed.fp16.enable: unknown key"),
        ({"bf16": True}, "zero.json:2: learner.deepspeed.bf16: found: True; expected: a dictionary"),
        (
            {"zero_optimization": True},
            "zero.json:2: learner.deepspeed.zero_optimization: found: True; expected: a dictionary",
        ),
        ({"zero_optimization": {"stage": 4}}, "zero.json:3: learner.deepspeed.zero_optimization.stage: "),
        (
            {"zero_optimization": {"overlap_comm": "x"}},
            "zero.json:3: learner.deepspeed.zero_optimization.overlap_comm: ",
        ),
        (
            {"gradient_clipping": 3.0},
            "zero.json:2: learner.deepspeed.gradient_clipping: is 3.0, but training.max_grad_norm is 1.0 "
            "(default of SFTConfig)",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}},
            "zero.json:5: learner.deepspeed.optimizer.params.lr: is 3e-05, but training.learning_rate is 1e-05;",
        ),
        (
            {"train_batch_size": 24},
            "zero.json:2: learner.deepspeed.train_batch_size: is 24, but training.per_device_train_batch_size 8 x "
            "training.gradient_accumulation_steps 1 x learner.workers 2 = 16;",
        ),
        (["stage"], "run.yaml:12: learner.deepspeed: zero.json: found: list; expected: one JSON object"),
    ],
)
def test_a_deepspeed_file_is_checked_line_by_line(values: object, message: str) -> None:
    assert deepspeed_error(values).startswith(message)


def test_deepspeed_values_that_agree_with_training_or_are_auto_are_accepted() -> None:
    values = {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": "auto"}},
        "gradient_clipping": 1.0,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": 16,
        "bf16": {"enabled": "auto"},
    }
    Path("zero.json").write_text(json.dumps(values))
    assert run_of(DEEPSPEED).learner.deepspeed == values


def test_a_deepspeed_file_that_is_not_there_or_not_json_names_the_line_that_asks_for_it() -> None:
    assert error_of(DEEPSPEED).startswith("run.yaml:12: learner.deepspeed: no such file; found: 'zero.json'")
    Path("zero.json").write_text('{\n "bf16": }')
    assert error_of(DEEPSPEED).startswith("run.yaml:12: learner.deepspeed: zero.json:2: not JSON")
    assert error_of(RUN, "learner.deepspeed=no.json").startswith("command line: learner.deepspeed: no such file")
    assert error_of(RUN, "learner.deepspeed=no.json", "learner.deepspeed.x=1").startswith(
        "command line: learner.deepspeed: no such file"
    )


def test_elastic_workers_with_deepspeed_are_refused() -> None:
    Path("zero.json").write_text("{}")
    assert error_of(DEEPSPEED, "learner.workers=[1, 2]").startswith(
        "command line: learner.workers: an elastic number cannot go with deepspeed"
    )


def test_an_elastic_run_keeps_its_batch_whatever_its_number_of_workers() -> None:
    run = run_of(RUN, "learner.workers=[1, 4]", "training.gradient_accumulation_steps=3")
    assert [run.accumulation(workers) * workers for workers in (1, 2, 3, 4)] == [12] * 4
    assert run_of(RUN, "training.gradient_accumulation_steps=3").accumulation(2) == 3
    error = error_of(RUN, "learner.workers=[1, 4]", "training.gradient_accumulation_steps=2")
    assert "2 x 4 cannot be shared evenly" in error
    assert "gradient_accumulation_steps a multiple of 3" in error
    assert run_of(RUN, "learner.workers=[2, 4]", "training.gradient_accumulation_steps=3").accumulation(2) == 6


def test_placement_by_rays_names() -> None:
    assert run_of(RUN, "learner.placement=strict_spread").learner.placement == "strict_spread"
    assert "learner.placement" in error_of(RUN, "learner.placement=SPREAD")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("runs/a/model", "runs/a/model"),
        ("all-linear", "all-linear"),
        ("/else where/a", '"/else where/a"'),
        ("", '""'),
        *[
            (text, f'"{text}"')
            for text in ("true", "null", "1e3", "0x1f", "2026-01-01", "~", "- a", "a: b", "#", "...")
        ],
        ('é "quoted"\\ 😀\n\x7f\u2028', None),
        (1e-5, "1e-05"),
        (1e22, "1e+22"),
        (float("inf"), ".inf"),
        (-float("inf"), "-.inf"),
        (True, "true"),
        (None, "null"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, "{stage: 3, offload_optimizer: {device: cpu}}"),
        ([1, "a, b", [], {}], '[1, "a, b", [], {}]'),
    ],
)
def test_a_value_written_as_an_override_reads_back_as_itself(value: Any, text: str | None) -> None:
    if text is not None:
        assert yaml_text(value) == text
    Path("run.yaml").write_text(RUN)
    found = load_run("run.yaml", overrides_of({"model.config.extra": value})).run
    assert isinstance(found, SupervisedRun)
    assert found.model.config is not None
    assert (found.model.config["extra"], type(found.model.config["extra"])) == (value, type(value))


def test_bfloat16_that_would_be_computed_in_float32_is_refused() -> None:
    message = error_of(RUN, "model.dtype=bfloat16", "training.bf16=false")
    assert "training.bf16: is off, and model.dtype is bfloat16" in message
    load(RUN, "model.dtype=bfloat16", "training.bf16=true")
    load(RUN, "training.bf16=false")
