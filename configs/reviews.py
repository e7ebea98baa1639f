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
