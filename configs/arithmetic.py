"""Sums of two numbers from 0 to 9, made here: data for the runs named `arithmetic`, and rewards that know the answer.

python configs/arithmetic.py                # writes sft.jsonl, prompts.jsonl and test.jsonl below runs/arithmetic
"""

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WRONG = 0.4  # share of the answers that sft.jsonl gets wrong: what is left for the reward to teach


def correct(completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 for the answer and nothing else, 0 for anything else."""
    return [float(completion.strip() == wanted) for completion, wanted in zip(completions, answer, strict=True)]


def last_number(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the last number of a completion is the one behind `####`, as GSM8K's answers end; else 0."""
    return [
        float(_last_number(_text(completion)) == _last_number(wanted))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def gsm8k(row: dict[str, Any]) -> dict[str, Any]:
    """A row of GSM8K as a conversation that asks for the steps, and the answer for the reward."""
    question = f"{row['question']}\nThink step by step. End with the number alone on the last line."
    return {"prompt": [{"role": "user", "content": question}], "answer": row["answer"]}


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(found[-1]) if found else None


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _sums() -> list[tuple[str, str]]:
    return [(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(folder: str = "runs/arithmetic") -> None:
    rng, place = random.Random(0), Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    sums = _sums()
    rng.shuffle(sums)
    told = [(prompt, answer if rng.random() > WRONG else str(rng.randrange(19))) for prompt, answer in sums * 40]
    _write(place / "sft.jsonl", ({"prompt": prompt, "completion": answer} for prompt, answer in told))
    _write(place / "prompts.jsonl", ({"prompt": prompt, "answer": answer} for prompt, answer in sums))
    _write(place / "test.jsonl", ({"prompt": prompt, "answer": answer} for prompt, answer in sums))


if __name__ == "__main__":
    main()
