"""configs/, with the package's own run files that it links to: every run file is one that raytrl takes."""

import re
from pathlib import Path

import pytest
from datasets import Dataset

from raytrl.config.load import load_run

FILES = sorted({*Path("configs").glob("*.yaml"), *Path("configs/quickstart").glob("*.yaml")})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to("configs")))
def test_every_run_file_is_valid_and_says_what_it_needs(path: Path) -> None:
    text = path.read_text()
    kind = next(line for line in text.splitlines() if line.startswith("kind:")).split()[1]
    run = load_run(str(path), [], kind).run
    assert run.kind == kind
    assert text.startswith("# Hardware: ")
    assert run.name == path.stem


PLANNED = [path for path in FILES if "GPU: " in path.read_text() and "kind: tune" not in path.read_text()]


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_what_was_never_run_says_so_and_passes_its_plan(path: Path) -> None:
    """By the command in its header, on the hardware that it names; with GPUs of 4 GiB it is refused with numbers."""
    from typer.testing import CliRunner

    from raytrl.cli import app

    header = path.read_text().partition("\nkind:")[0]
    assert "Not run here" in header
    command = re.search(r"raytrl (plan .*) \\\n#\s+(--cluster \S+)\n", header)
    assert command is not None
    words = [*command[1].split(), *command[2].split()]
    assert words[1] == str(path)
    planned = CliRunner().invoke(app, words)
    assert planned.exit_code == 0, planned.output
    assert "learner.workers (GPU)" in planned.output
    less = re.sub(r"gpu_gib=(\d+)", "gpu_gib=4", words[-1])
    refused = CliRunner().invoke(app, [*words[:-1], less])
    assert refused.exit_code == 2, refused.output
    assert "found: 4.0 GiB" in refused.output


def test_flash_attention_is_one_word_more() -> None:
    run = load_run("configs/sft-8b-lora.yaml", ["training.model_init_kwargs={attn_implementation: flash_attention_2}"])
    assert run.run.training["model_init_kwargs"] == {"attn_implementation": "flash_attention_2"}  # type: ignore[attr-defined]


def test_short_prompts_are_beginnings_of_long_reviews() -> None:
    from raytrl.functions import load_function

    long = " ".join(f"word{i}" for i in range(60))
    reviews = Dataset.from_dict({"text": [long] * 50 + ["too short"], "label": [1] * 51})
    short_prompts = load_function("configs/reviews.py:short_prompts", "test")
    prompts = short_prompts(reviews)["prompt"]
    assert len(prompts) == 50
    assert {len(prompt.split()) for prompt in prompts} == set(range(2, 9))
    assert all(long.startswith(prompt) for prompt in prompts)
    assert prompts == short_prompts(reviews)["prompt"]
