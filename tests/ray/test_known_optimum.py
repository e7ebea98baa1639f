"""PPO through the real path, two learners and two rollout actors, reaches the exact optimum of an enumerable task.

The same task runs in one process on every commit (tests/unit/ppo/test_optimum.py); here it is started by the command.
"""

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.runs import metrics, raytrl, write_rows, write_run_file

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/ppo"))

from optimum import Optimum
from toy import EOS, PROMPTS, VOCABULARY, gpt2, llama

BETA, LENGTH = 0.5, 3
# What `toy.reward` says, over text: a completion shorter than the limit ended by itself.
RULE = f"""
def rule(prompts, completions, **columns):
    return [value(prompt.split(), completion.split()) for prompt, completion in zip(prompts, completions)]


def value(prompt, response):
    response = response + ["{EOS}"] * (len(response) < {LENGTH})
    total = 0.5 * sum(token in ("0", "5") for token in response) + 0.2 * (response[-1] == "{EOS}")
    return total - 0.3 * (response[:1] == response[1:2]) + 0.3 * (response[0] == prompt[-1])
"""


def write_digit_tokenizer(folder: Path) -> None:
    """Token i is the digit i; texts are digits with spaces between."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=str(EOS)).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_command_reaches_the_known_optimum(tmp_path: Path, architecture: str, seed: int) -> None:
    model = {"gpt2": gpt2, "llama": llama}[architecture](1)
    model.save_pretrained(tmp_path / "policy")
    write_digit_tokenizer(tmp_path / "policy")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": " ".join(map(str, PROMPTS[i % 4]))} for i in range(256)])
    (tmp_path / "rule.py").write_text(RULE)
    values = {
        "kind": "ppo",
        "name": "optimum",
        "output_dir": str(tmp_path / "runs"),
        "seed": seed,
        "model": {"path": str(tmp_path / "policy")},
        "data": {"train": str(tmp_path / "prompts.jsonl")},
        "learner": {"workers": 2, "resources": {"CPU": 0.5}},
        "rollout": {
            "actors": 2,
            "resources": {"CPU": 0.4},
            "engine": "transformers",
            "sampling": {"max_new_tokens": LENGTH},
            "chunk_prompts": 64,
        },
        "reward": {
            "resources": {"CPU": 0.2},
            "sources": [{"name": "rule", "function": f"{tmp_path}/rule.py:rule"}],
        },
        "ppo": {
            "steps": 60,
            "batch_size": 256,
            "epochs": 4,
            "minibatches": 1,
            "learning_rate": 1e-3,
            "kl": {"coef": BETA},
        },
        "report_to": [],
    }
    raytrl("ppo", write_run_file(tmp_path, "optimum", values, {}))
    optimum = Optimum.of(model, LENGTH, BETA)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/optimum/model")
    start, end = optimum.distance(model), optimum.distance(trained)
    seconds = [row["time/step_s"] for row in metrics(tmp_path / "runs/optimum")]
    print(f"{architecture} seed {seed}: KL to the optimum {start:.4f} -> {end:.4f}, {sum(seconds):.0f} s of steps")
    assert start > 0.1
    assert end <= 0.02
    assert end <= 0.1 * start
