"""Reshapes labelled film reviews into what each stage trains on. Used by the run files beside it."""

import random

from datasets import Dataset


def pairs(reviews: Dataset) -> Dataset:
    """Preference pairs from rows of `text` and `label`: each positive review is chosen over a random negative one."""
    positive = [text for text, label in zip(reviews["text"], reviews["label"], strict=True) if label == 1]
    negative = [text for text, label in zip(reviews["text"], reviews["label"], strict=True) if label == 0]
    random.Random(0).shuffle(negative)
    count = min(len(positive), len(negative))
    return Dataset.from_dict({"chosen": positive[:count], "rejected": negative[:count]})


def positive(reviews: Dataset) -> Dataset:
    """The positive reviews alone."""
    return reviews.filter(lambda row: row["label"] == 1)


def prompts(reviews: Dataset) -> Dataset:
    """The first five words of each review, for a policy to go on from."""
    beginnings = [" ".join(text.split()[:5]) for text in reviews["text"]]
    return Dataset.from_dict({"prompt": beginnings})


def short_prompts(reviews: Dataset) -> Dataset:
    """The first 2 to 8 words of each review of more than 200 characters; how many is drawn once for each row."""
    rng = random.Random(0)
    long = [text.split() for text in reviews["text"] if len(text) > 200]
    return Dataset.from_dict({"prompt": [" ".join(words[: rng.randint(2, 8)]) for words in long]})
