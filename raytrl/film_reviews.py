"""Small film reviews of known sentiment, made from a grammar: the data of `raytrl quickstart`, and its gold reward.

A review is a prompt ("The acting in this quiet western was") and a completion (" moving, and the plot felt clumsy.").
Every judging word of a completion is in one of two lists, so the true reward of any text is known: positive words minus
negative words. Prompts hold no judging word. The same seed gives the same rows on every machine and Python version.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

Row = dict[str, str]

POSITIVE = (
    "moving", "brilliant", "charming", "funny", "clever", "superb", "gripping", "elegant", "tender", "delightful",
    "fresh", "wonderful",
)  # fmt: skip
NEGATIVE = (
    "boring", "clumsy", "awful", "tedious", "shallow", "noisy", "dull", "painful", "lazy", "messy", "weak", "dreadful",
)  # fmt: skip

_ASPECTS = ("acting", "plot", "music", "dialogue", "pacing", "camera work", "ending", "casting", "editing", "humour")
_KINDS = ("western", "thriller", "comedy", "drama", "musical", "mystery", "cartoon", "war film", "love story", "remake")
_LOOKS = ("quiet", "long", "short", "black and white", "big budget", "low budget", "French", "recent")
_OPENINGS = (
    "The {aspect} in this {look} {kind} was",
    "I found the {aspect} of the {look} {kind}",
    "For a {look} {kind}, the {aspect} seemed",
    "My friends called the {aspect} of that {look} {kind}",
)
_ENDINGS = (
    " {first}.",
    " {degree} {first}.",
    " {first} and {second}.",
    " {first}, and the {aspect} felt {second}.",
    " {degree} {first}, with {article} {third} {aspect}.",
    " {first} and {second}, and the {aspect} was {third}.",
)
_DEGREES = ("very", "rather", "truly", "often", "always")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True)
class FilmReviews:
    """Rows in TRL's standard formats. No prompt of a held-out part occurs in a training part."""

    sft: tuple[Row, ...]  # {"text"}
    sft_held_out: tuple[Row, ...]
    pairs: tuple[Row, ...]  # {"prompt", "chosen", "rejected"}: chosen has the higher gold reward
    pairs_held_out: tuple[Row, ...]
    prompts: tuple[Row, ...]  # {"prompt"}
    prompts_held_out: tuple[Row, ...]


def sentiment(text: str) -> float:
    """The gold reward of one completion: how many words are positive, minus how many are negative."""
    words = _WORD.findall(text.lower())
    return float(sum(word in POSITIVE for word in words) - sum(word in NEGATIVE for word in words))


def sentiment_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """`sentiment` of each completion, as a reward function in TRL's convention."""
    return [sentiment(completion) for completion in completions]


def make_film_reviews(
    seed: int = 0, sft_rows: int = 3000, pair_rows: int = 1300, prompt_rows: int = 1000, held_out_rows: int = 200
) -> FilmReviews:
    """Make the data; `held_out_rows` is the size of each held-out part.

    Raises ValueError when more distinct prompts are asked for than the grammar has.
    """
    everything = _prompts()
    random.Random(f"film reviews {seed} prompts").shuffle(everything)
    held_out, training = everything[:held_out_rows], everything[held_out_rows:]
    if held_out_rows + prompt_rows > len(everything):
        raise ValueError(
            f"film reviews: too many prompts; found {held_out_rows} held-out + {prompt_rows} training; expected "
            f"at most {len(everything)} together, the distinct prompts of the grammar; ask for fewer"
        )

    def draw(part: str, prompts: list[str], count: int) -> tuple[random.Random, list[str]]:
        rng = random.Random(f"film reviews {seed} {part}")  # one stream a part: the size of one changes no other
        return rng, [prompts[index % len(prompts)] for index in range(count)]

    def texts(part: str, prompts: list[str], count: int) -> tuple[Row, ...]:
        rng, chosen = draw(part, prompts, count)
        return tuple({"text": prompt + _completion(rng, rng.random())} for prompt in chosen)

    def pairs(part: str, prompts: list[str], count: int) -> tuple[Row, ...]:
        rng, chosen = draw(part, prompts, count)
        return tuple(_pair(rng, prompt) for prompt in chosen)

    return FilmReviews(
        sft=texts("sft", training, sft_rows),
        sft_held_out=texts("sft held out", held_out, held_out_rows),
        pairs=pairs("pairs", training, pair_rows),
        pairs_held_out=pairs("pairs held out", held_out, held_out_rows),
        prompts=tuple({"prompt": prompt} for prompt in training[:prompt_rows]),
        prompts_held_out=tuple({"prompt": prompt} for prompt in held_out),
    )


def write_film_reviews(reviews: FilmReviews, folder: Path) -> Mapping[str, Path]:
    """Write each part to `<folder>/<part>.jsonl`; returns the path of every part by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for part in fields(reviews):
        path = folder / f"{part.name}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) for row in getattr(reviews, part.name)]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        paths[part.name] = path
    return paths


def _prompts() -> list[str]:
    """Every distinct prompt, in a fixed order."""
    return [
        opening.format(aspect=aspect, look=look, kind=kind)
        for opening in _OPENINGS
        for aspect in _ASPECTS
        for look in _LOOKS
        for kind in _KINDS
    ]


def _completion(rng: random.Random, liking: float) -> str:
    """One completion whose judging words are each positive with probability `liking`, drawn without repeats."""
    words = [rng.choice(POSITIVE if rng.random() < liking else NEGATIVE) for _ in range(3)]
    while len(set(words)) < 3:
        words = [rng.choice(POSITIVE if rng.random() < liking else NEGATIVE) for _ in range(3)]
    first, second, third = words
    return rng.choice(_ENDINGS).format(
        first=first,
        second=second,
        third=third,
        degree=rng.choice(_DEGREES),
        aspect=rng.choice(_ASPECTS),
        article="an" if third[0] in "aeiou" else "a",
    )


def _pair(rng: random.Random, prompt: str) -> Row:
    """Two completions of unequal gold reward: the higher is chosen."""
    while True:
        completions = sorted((_completion(rng, rng.random()), _completion(rng, rng.random())), key=sentiment)
        if sentiment(completions[0]) < sentiment(completions[1]):
            return {"prompt": prompt, "chosen": completions[1], "rejected": completions[0]}
