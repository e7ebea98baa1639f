"""PPO and its kin through the real path, two learners and two rollout actors, end where the mathematics says: at the exact
optimum of an enumerable task, or where GRPO and Dr. GRPO have a point of their own.

The same task runs in one process on every commit (tests/learning/test_fixed_points.py); here it is started by the command.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from fixed_point import GrpoPoint
from optimum import Optimum
from toy import EOS, PROMPTS, VOCABULARY, gpt2, llama
from transformers import AutoModelForCausalLM

from tests.runs import metrics, raytrl, write_rows, write_run_file

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


ONE_BY_ONE = {"batch_size": 256, "learning_rate": 1e-3, "kl": {"coef": BETA}}
IN_GROUPS = {"batch_size": 512, "learning_rate": 2e-3, "responses_per_prompt": 4, "kl": {"coef": BETA}}
KIN: dict[str, dict[str, Any]] = {
    "ppo": ONE_BY_ONE,
    "rloo": IN_GROUPS,
    "reinforce_baseline": IN_GROUPS,
    "dr_grpo": IN_GROUPS,
    "grpo": IN_GROUPS | {"kl": {"coef": 1.0}},
}
CASES = [
    ("ppo", "gpt2", 0),
    ("ppo", "llama", 0),
    *((algorithm, "gpt2", 0) for algorithm in KIN if algorithm != "ppo"),
    *((algorithm, "gpt2", lag) for algorithm in ("ppo", "rloo") for lag in (1, 2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "architecture", "lag"), CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_command_ends_where_it_should(
    tmp_path: Path, algorithm: str, architecture: str, lag: int, seed: int
) -> None:
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
            "algorithm": algorithm,
            "steps": 80 if lag else 60,
            "epochs": 4,
            "minibatches": 1,
            **KIN[algorithm],
            **({"max_lag": lag, "batch_size": 512, "learning_rate": 1e-3} if lag else {}),
        },
        "report_to": [],
    }
    raytrl("ppo", write_run_file(tmp_path, "optimum", values, {}))
    beta = KIN[algorithm]["kl"]["coef"]
    optimum = Optimum.of(model, LENGTH, beta)
    point: Optimum | GrpoPoint = optimum
    if algorithm in ("grpo", "dr_grpo"):
        point = GrpoPoint.of(deepcopy(model), LENGTH, beta, size=4, scaled=algorithm == "grpo")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/optimum/model")
    start, end = point.distance(deepcopy(model)), point.distance(deepcopy(trained))
    seconds = [row["time/step_s"] for row in metrics(tmp_path / "runs/optimum")]
    print(
        f"{algorithm} {architecture} lag {lag} seed {seed}: KL to its point {start:.4f} -> {end:.4f}, to the optimum "
        f"{optimum.distance(trained):.4f}, {sum(seconds):.0f} s of steps"
    )
    assert start > 0.1
    assert end <= 0.02
    assert end <= 0.1 * start
