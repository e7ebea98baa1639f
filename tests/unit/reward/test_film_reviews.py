"""The quickstart's data: known sentiment, disjoint parts, the same rows every time; and the example rewards."""

import hashlib
import json
import runpy
from pathlib import Path

import pytest

from raytrl.film_reviews import make_film_reviews, sentiment, sentiment_reward, write_film_reviews

EXAMPLES = Path(__file__).parents[3] / "configs" / "rewards.py"


def test_gold_reward() -> None:
    assert sentiment(" Moving, and the plot felt clumsy.") == 0.0
    assert sentiment(" very funny and tender, with a dull plot.") == 1.0
    assert sentiment_reward(prompts=["p"], completions=[" unmoving awful"], chosen=["x"]) == [-1.0]


def test_pairs_are_ordered_by_the_gold_reward() -> None:
    reviews = make_film_reviews()
    for row in reviews.pairs + reviews.pairs_held_out:
        assert sentiment(row["chosen"]) > sentiment(row["rejected"])


def test_prompts_judge_nothing_and_held_out_prompts_are_new() -> None:
    reviews = make_film_reviews()
    held_out = {row["prompt"] for row in reviews.prompts_held_out}
    assert len(held_out) == 200
    assert held_out == {row["prompt"] for row in reviews.pairs_held_out}
    assert all(sentiment(prompt) == 0 for prompt in held_out)
    assert not held_out & {row["prompt"] for row in reviews.pairs + reviews.prompts}
    assert not any(row["text"].startswith(tuple(held_out)) for row in reviews.sft)
    assert all(row["text"].startswith(tuple(held_out)) for row in reviews.sft_held_out)


def test_it_is_varied_and_balanced() -> None:
    texts = [row["text"] for row in make_film_reviews().sft]
    assert len(set(texts)) > 2900
    assert abs(sum(map(sentiment, texts)) / len(texts)) < 0.15


def test_the_same_seed_gives_the_same_rows(tmp_path: Path) -> None:
    reviews = make_film_reviews(seed=3)
    assert reviews == make_film_reviews(seed=3) != make_film_reviews(seed=4)
    assert reviews.pairs == make_film_reviews(seed=3, sft_rows=5).pairs
    paths = write_film_reviews(reviews, tmp_path / "data")
    assert [json.loads(line) for line in paths["pairs"].read_text().splitlines()] == list(reviews.pairs)
    digest = hashlib.sha256(b"".join(paths[name].read_bytes() for name in sorted(paths))).hexdigest()
    assert digest.startswith("8492f623957d95d2")  # the same on every machine


def test_more_prompts_than_there_are() -> None:
    with pytest.raises(ValueError, match="at most 3200"):
        make_film_reviews(prompt_rows=3001)


def test_example_rewards() -> None:
    rewards = runpy.run_path(str(EXAMPLES))
    assert rewards["brevity"](completions=["a b c d", [{"role": "assistant", "content": "a b"}]]) == [-0.2, -0.1]
    closer = rewards["closer_to_chosen"]
    assert closer(completions=["a b", "c d", "x"], chosen=["a b", "a b", ""], rejected=["c d", "c d", ""]) == [
        1,
        -1,
        None,
    ]
