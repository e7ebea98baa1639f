"""The model card: front matter the hub reads, and a run file that loads again."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from raytrl.config.load import load_run
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.yaml12 import dump
from raytrl.roles.models.card import for_others, write_model_card
from tests.runs import run_file


def card_of(tmp_path: Path, **sections: Any) -> tuple[SupervisedRun, ModelCard]:
    run = load_run(run_file(tmp_path, "a", **sections), []).run
    assert isinstance(run, SupervisedRun)
    write_model_card(str(tmp_path), run, "raytrl sft a.yaml", {"ray": "2.60.0"}, 8, {"loss": 1.23456789})
    return run, ModelCard.load(tmp_path / "README.md")


@pytest.mark.parametrize(
    ("sections", "library", "task", "tags"),
    [
        ({}, "transformers", "text-generation", ["raytrl", "trl", "sft"]),
        ({"kind": "reward"}, "transformers", "text-classification", ["raytrl", "trl", "reward"]),
        ({"kind": "dpo", "lora": {"r": 4}}, "peft", "text-generation", ["raytrl", "trl", "dpo", "lora"]),
        ({"lora": {}}, "peft", "text-generation", ["raytrl", "trl", "sft", "lora"]),
    ],
)
def test_front_matter_is_what_the_hub_reads(
    sections: dict[str, Any], library: str, task: str, tags: list[str], tmp_path: Path
) -> None:
    _, card = card_of(tmp_path, **sections)
    assert (card.data.library_name, card.data.pipeline_tag, card.data.tags) == (library, task, tags)


def test_a_hub_base_model_is_linked_and_a_local_one_is_not(tmp_path: Path) -> None:
    model = {"config": None, "tokenizer": None}
    _, card = card_of(tmp_path, model=model | {"path": "some-org/base"})
    assert card.data.base_model == "some-org/base"
    _, card = card_of(tmp_path, model=model | {"path": str(tmp_path)})
    assert card.data.base_model is None


def test_the_card_holds_command_metrics_and_a_run_file_that_loads_to_the_same_run(tmp_path: Path) -> None:
    run, card = card_of(tmp_path, lora={"r": 4}, training={"optim_args": "a: b"})
    assert "raytrl sft a.yaml" in card.text
    assert "| loss | 1.23457 |" in card.text
    assert "ray 2.60.0" in card.text
    text = card.text.partition("```yaml\n")[2].partition("\n```")[0]
    assert yaml.safe_load(text)["name"] == "a"
    (tmp_path / "again.yaml").write_text(text)
    assert load_run(str(tmp_path / "again.yaml"), []).run == run


PLACES = {
    "/Users/Jane Doe/some rows.jsonl": ".../some rows.jsonl",
    "~/rows.jsonl": ".../rows.jsonl",
    "s3://bucket/a/rows.jsonl?region=x": ".../rows.jsonl",
    "http://10.0.0.1:8000/score": ".../score",
    "/home/jane/rules.py:short": ".../rules.py:short",
    "hf://datasets/some-org/rows/a.jsonl": None,
    "https://huggingface.co/datasets/a/b/rows.jsonl": None,
    "data/rows.jsonl": None,
    "some-org/base": None,
    "/think": None,
    "</s>": None,
}


@pytest.mark.parametrize(("place", "short"), PLACES.items())
def test_of_a_place_the_published_card_has_the_last_part(place: str, short: str | None) -> None:
    """The hub's own addresses, relative paths and what only looks like a path stay."""
    values = {"data": {"files": [place]}, "training": {"learning_rate": 1e-7}}
    words = shlex.join(["raytrl", "sft", place, f"data.train={place}"])
    card = f"---\nlibrary_name: peft\n---\nof `{place}`\n```\n{words}\n```\n```yaml\n{dump(values)}```\n"
    text, count = for_others(card, "transformers")
    left = short or place
    assert f"library_name: transformers\n---\nof `{left}`\n" in text
    assert shlex.split(text.partition("```\n")[2].partition("\n```")[0]) == [
        "raytrl",
        "sft",
        left,
        f"data.train={left}",
    ]
    assert f"```yaml\n{dump(values | {'data': {'files': [left]}})}```" in text
    assert count == (4 if short else 0)


def test_a_place_within_a_text_is_shortened_too() -> None:
    values = {"note": "see /home/jane/a.txt, s3://bucket/b and a/b"}
    assert "note: see .../a.txt, .../b and a/b" in for_others(f"```yaml\n{dump(values)}```\n", "peft")[0]


def test_a_card_without_places_is_published_as_it_is(tmp_path: Path) -> None:
    card_of(tmp_path, model={"config": None, "tokenizer": None, "path": "some-org/base"}, data={"train": "a.jsonl"})
    text = (tmp_path / "README.md").read_text().replace(str(tmp_path), ".")
    assert for_others(text, "transformers") == (text, 0)
