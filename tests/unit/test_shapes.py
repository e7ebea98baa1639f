"""What is counted on the meta device is what the real model has."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from transformers import AutoConfig

from raytrl.config.load import load_run
from raytrl.errors import ConfigError
from raytrl.plan.config_shapes import shape_of_values
from raytrl.plan.memory import estimates
from raytrl.plan.shapes import _shape, lora_parameters, read_shapes, shape_of_config, shape_of_path
from tests.ppo_files import make_policy, ppo_file
from tests.runs import TINY_LLAMA, run_file

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}


@pytest.mark.parametrize("config", [TINY_LLAMA, TINY_LLAMA | {"num_key_value_heads": 1}, GPT2])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "c_attn"], ".*mlp.*(c_fc|up_proj)", None])
def test_parameters_and_adapter_are_those_of_the_model(config: dict[str, object], targets: object) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], vocab_size=300, **fields))
    shape = shape_of_config(config, 300, "model.config", "causal")
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    lora = {"r": 4} if targets is None else {"r": 4, "target_modules": targets}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    assert lora_parameters(shape, lora) == adapted.get_nb_trainable_parameters()[0]


LLAMA = TINY_LLAMA | {"vocab_size": 300, "tie_word_embeddings": False}
KNOWN = [
    *([LLAMA | {"model_type": kind}, LLAMA | {"model_type": kind, "tie_word_embeddings": True, "num_key_value_heads": 1}]
      for kind in ("llama", "mistral", "qwen2")),
    [LLAMA | {"attention_bias": True}, LLAMA | {"mlp_bias": True}, LLAMA | {"head_dim": 24}],
    [LLAMA | {"model_type": "qwen3", "head_dim": 24}, LLAMA | {"model_type": "qwen3", "head_dim": 8, "attention_bias": True}],
    [GPT2 | {"vocab_size": 300}, GPT2 | {"vocab_size": 300, "n_inner": 80, "tie_word_embeddings": False}],
]  # fmt: skip


@pytest.mark.parametrize("head", ["causal", "score"])
@pytest.mark.parametrize("values", [values for group in KNOWN for values in group], ids=str)
def test_what_is_counted_from_the_file_alone_is_what_the_meta_device_counts(
    tmp_path: Path, values: dict[str, object], head: Literal["causal", "score"]
) -> None:
    counted = shape_of_values(values, head)
    fields = {key: value for key, value in values.items() if key != "model_type"}
    expected = _shape(AutoConfig.for_model(str(values["model_type"]), **fields), "model.path", head, False)
    assert counted is not None
    assert replace(counted, modules={}) == replace(expected, modules={})
    assert counted.modules == {name: size for name, size in expected.modules.items() if size}


def test_the_models_of_the_run_files_are_counted_without_torch() -> None:
    code = (
        "import sys\n"
        "from raytrl.plan.shapes import shape_of_path\n"
        "for path in ('Qwen/Qwen3-8B', 'openai-community/gpt2', 'Skywork/Skywork-Reward-V2-Llama-3.1-8B'):\n"
        "    print(shape_of_path(path, 'model.path', 'causal', models='configs/models').parameters)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.split() == ["8190735360", "124439808", "8030261248"]


@pytest.mark.parametrize("missing", ["tie_word_embeddings", "num_key_value_heads", "vocab_size"])
def test_what_a_file_leaves_out_is_not_guessed(missing: str) -> None:
    assert shape_of_values({key: value for key, value in LLAMA.items() if key != missing}, "causal") is None
    assert shape_of_values(LLAMA | {"model_type": "gemma2"}, "causal") is None


def test_the_cache_counts_key_value_heads() -> None:
    whole = shape_of_config(TINY_LLAMA, 300, "model.config", "causal")
    grouped = shape_of_config(TINY_LLAMA | {"num_key_value_heads": 1}, 300, "model.config", "causal")
    assert (whole.kv_width, grouped.kv_width) == (2 * 32, 2 * 16)


def test_a_model_that_is_elsewhere_is_read_from_the_folder_of_configs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.path: 'some/model': no config\.json on this machine"):
        shape_of_path("some/model", "model.path", "causal")
    (tmp_path / "some/model").mkdir(parents=True)
    (tmp_path / "some/model/config.json").write_text(json.dumps(TINY_LLAMA))
    assert shape_of_path("some/model", "model.path", "causal", models=str(tmp_path)).architecture == "llama"


def test_a_config_that_is_none_is_an_error_with_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^model\.config: cannot be"):
        shape_of_config({"model_type": "lama"}, 300, "model.config", "causal")
    with pytest.raises(ConfigError, match=r"^model\.config: cannot be"):
        shape_of_config(TINY_LLAMA | {"hidden_size": "wide"}, 300, "model.config", "causal")


def test_each_setting_moves_the_estimate_the_right_way(tmp_path: Path) -> None:
    def total(**sections: object) -> float:
        run = load_run(run_file(tmp_path, "a", **sections), []).run
        return estimates(run, read_shapes(run)[0])["learner.workers"].total

    wide = {"model": {"config": TINY_LLAMA | {"hidden_size": 512, "num_hidden_layers": 16}}}
    plain = total(**wide)
    assert total(**wide, lora={"r": 4, "target_modules": "all-linear"}) < plain
    zero = [{"workers": 4, "deepspeed": {"zero_optimization": {"stage": n}}} for n in (1, 2, 3)]
    zero.append({"workers": 4, "deepspeed": {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 0}}})
    sizes = [total(**wide, learner=learner) for learner in zero]
    assert sizes[0] > sizes[1]
    assert sizes[2] > sizes[3]  # a small model is never let go of by ZeRO-3
    assert total(**wide, training={"per_device_train_batch_size": 64}) > plain
    kept = {"per_device_train_batch_size": 64, "gradient_checkpointing": False}
    assert total(**wide, training=kept) > total(**wide, training={"per_device_train_batch_size": 64})
    assert total(**wide, kind="dpo") > plain


def test_ppo_counts_its_networks(tmp_path: Path) -> None:
    make_policy(tmp_path)

    def found(**sections: object) -> dict[str, float]:
        run = load_run(ppo_file(tmp_path, "a", **sections), []).run
        shapes, problems = read_shapes(run)
        assert problems == []
        return {key: estimate.total for key, estimate in estimates(run, shapes).items()}

    plain = found()
    assert plain.keys() == {"learner.workers", "rollout.actors", "reward.actors"}
    adapter = found(lora={"r": 2, "target_modules": "all-linear"})
    assert adapter["learner.workers"] < plain["learner.workers"]
    assert found(rollout={"chunk_prompts": 8})["rollout.actors"] > plain["rollout.actors"]
    assert found(ppo={"max_tokens_per_microbatch": 1000})["learner.workers"] < plain["learner.workers"]
