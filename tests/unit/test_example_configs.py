"""configs/: every run file is one that raytrl takes."""

from pathlib import Path

import pytest
from datasets import Dataset

from raytrl.config.load import load_run

FILES = sorted(path for path in Path("configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to("configs")))
def test_every_run_file_is_valid_and_says_what_it_needs(path: Path) -> None:
    text = path.read_text()
    kind = next(line for line in text.splitlines() if line.startswith("kind:")).split()[1]
    run = load_run(str(path), [], kind).run
    assert run.kind == kind
    if path.parent.name != "quickstart":
        assert text.startswith("# Hardware: ")
        assert run.name == path.stem


def test_what_was_never_run_says_so() -> None:
    for path in FILES:
        text = path.read_text()
        if "GPU: " in text:
            assert "Not run here" in " ".join(text.splitlines()[:3]), path


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
