"""What is counted on the meta device is what the real model has."""

import json
from pathlib import Path

import pytest

from raytrl.config.load import load_run
from raytrl.errors import ConfigError
from raytrl.roles.memory import estimates
from raytrl.roles.shapes import lora_parameters, read_shapes, shape_of_config, shape_of_path
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
