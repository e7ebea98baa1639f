"""A calculator and a word game, made here: tools, an environment, rewards and data of the runs named `games`.

python configs/games.py                # writes a tokenizer, sft.jsonl, calculator.jsonl and words.jsonl below runs/games
"""

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WORDS = {"apple": 0.1, "cloud": 0.3, "grape": 0.6}  # in the order of the alphabet, and how often each is the secret
DIRECT = 0.5  # share of sft.jsonl's products that are answered without the calculator, and wrongly

Message = dict[str, Any]

# A chat template of few words, so that a small model reads little; a real model brings its own. What stands between
# `generation` and `endgeneration` is what the assistant says.
TEMPLATE = """\
{%- for tool in tools or [] %}<|im_start|>tool {{ tool.function.name }}: {{ tool.function.description }}<|im_end|>
{% endfor %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == "assistant" %}{% generation %}{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<call>{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}</call>
{%- endfor %}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# How a response is read again, in the words of transformers.
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close_pattern": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>", "content": "text"},
    },
}


def multiply(a: int, b: int) -> int:
    """Multiplies.

    Args:
        a: A number.
        b: A number.
    """
    return a * b


def correct(completions: Sequence[Sequence[Message]], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the last message of a conversation is the answer, else 0."""
    return [
        float(completion[-1]["content"].strip() == wanted)
        for completion, wanted in zip(completions, answer, strict=True)
    ]


class GuessWord:
    """One of three words that are not alike: in two guesses 0.9 of them are found by whoever knows which come often."""

    def reset(self, seed: int, **row: Any) -> None:
        (self._secret,) = random.Random(seed).choices(list(WORDS), list(WORDS.values()))
        self._found = False

    def guess(self, word: str) -> str:
        """Says where the secret word stands.

        Args:
            word: The guess.
        """
        if word not in WORDS:
            raise ValueError("no such word")
        self._found = self._found or word == self._secret
        return "yes" if word == self._secret else "before" if self._secret < word else "after"

    def get_reward(self) -> float:
        return float(self._found)


def _call(name: str, **arguments: Any) -> Message:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def _product(rng: random.Random) -> tuple[Message, str, int, int]:
    a, b = rng.randrange(32, 100), rng.randrange(32, 100)
    return {"role": "user", "content": f"{a} times {b}?"}, str(a * b), a, b


def _with_calculator(rng: random.Random) -> list[Message]:
    question, answer, a, b = _product(rng)
    if rng.random() < DIRECT:
        return [question, {"role": "assistant", "content": str(rng.randrange(1024, 9802))}]
    result = {"role": "tool", "name": "multiply", "content": answer}
    return [question, _call("multiply", a=a, b=b), result, {"role": "assistant", "content": answer}]


def _with_word(rng: random.Random) -> list[Message]:
    """Guesses at random, whatever is answered."""
    game, told = GuessWord(), [{"role": "user", "content": "Guess."}]
    game.reset(seed=rng.randrange(2**31))
    for _ in range(2):
        word = rng.choice(list(WORDS))
        answer = game.guess(word)
        told += [_call("guess", word=word), {"role": "tool", "name": "guess", "content": answer}]
        if answer == "yes":
            break
    return [*told, {"role": "assistant", "content": "Found." if game.get_reward() else "Lost."}]


def _write(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(folder: str = "runs/games") -> None:
    from transformers.utils import get_json_schema

    from raytrl.config.sections.model import TokenizerSpec
    from raytrl.roles.models.tokenizer import train_tokenizer

    rng, place = random.Random(0), Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    schemas = {"multiply": get_json_schema(multiply), "guess": get_json_schema(GuessWord().guess)}
    rows = [{"messages": _with_calculator(rng), "tools": [schemas["multiply"]]} for _ in range(8000)]
    rows += [{"messages": _with_word(rng), "tools": [schemas["guess"]]} for _ in range(8000)]
    rng.shuffle(rows)
    _write(place / "sft.jsonl", rows)
    products = (_product(rng) for _ in range(2000))
    _write(place / "calculator.jsonl", ({"prompt": [question], "answer": answer} for question, answer, *_ in products))
    _write(place / "words.jsonl", ({"prompt": [{"role": "user", "content": "Guess."}]} for _ in range(500)))

    # Bytes first, to write conversations with, and then tokens of what is in them; digits stay single.
    special = {"eos_token": "<|im_end|>", "special_tokens": ["<|im_start|>"]}
    tokenizer = train_tokenizer(iter(["aa aa"]), TokenizerSpec(vocab_size=261, **special))
    tokenizer.chat_template = TEMPLATE
    texts = [tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False) for row in rows[:500]]
    words = (re.sub(r"<\|im_\w+\|>|\d", " ", text) for text in texts)
    tokenizer = train_tokenizer(words, TokenizerSpec(vocab_size=320, **special))
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE
    tokenizer.save_pretrained(place / "tokenizer")


if __name__ == "__main__":
    main()
