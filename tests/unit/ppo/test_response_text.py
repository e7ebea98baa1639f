"""What reward sources read of a response, and which tokens end it, with the tokenizers that people have."""

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raytrl.records.samples import Prompt, PromptText
from raytrl.roles.models.tokenizer import turn_end
from raytrl.roles.rollout.engine import Endings, response_text

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["▁The", "▁film", "▁was", "▁good", "ness", "▁"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def wrapped(made: Tokenizer, **more: Any) -> Any:
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=made, eos_token="</s>", bos_token="<s>", clean_up_tokenization_spaces=False, **more)


def metaspace() -> Any:
    """As Llama 2's: "▁" for spaces, bytes for what it has no piece for."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(made)


def byte_level() -> Any:
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "The", "Ġfilm", "Ġwas", "Ġgood"]
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.decoder = decoders.ByteLevel()
    return wrapped(made)


def read(tokenizer: Any, prompt: list[str], response: list[str], text: PromptText = "…", **more: Any) -> str:
    ids = tokenizer.convert_tokens_to_ids
    stops = [ids("</s>")]
    return response_text(tokenizer, Prompt(0, 0, text, tuple(ids(prompt))), ids(response), stops, more.get("stop"))


PROMPT = ["<s>", "▁The", "▁film", "▁was"]


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (PROMPT, ["▁good", "ness"], " goodness"),
        (PROMPT, ["ness", "▁good"], "ness good"),
        (PROMPT, ["▁good", "</s>"], " good"),
        (PROMPT, ["</s>"], ""),
        (PROMPT, ["▁", "▁good"], "  good"),
        (PROMPT, ["▁good", "<|im_end|>", "▁good"], " good good"),
        (PROMPT, ["<0xC3>", "<0xA9>", "▁good"], "é good"),
        (PROMPT, ["▁good", "<0xC3>"], " good�"),  # a character cut at max_new_tokens
        ([*PROMPT, "<0xC3>"], ["<0xA9>", "▁good"], "� good"),  # half of a character is the prompt's
        ([*PROMPT, "▁"], ["▁good"], " good"),
        (["<s>"], ["▁good", "▁was"], "good was"),  # nothing is gone on with
    ],
)
def test_a_response_goes_on_from_its_prompt(prompt: list[str], response: list[str], expected: str) -> None:
    assert read(metaspace(), prompt, response) == expected


def test_a_stop_string_may_begin_with_the_space() -> None:
    assert read(metaspace(), PROMPT, ["ness", "▁good", "ness"], stop=[" good"]) == "ness"
    assert read(metaspace(), PROMPT, ["▁good", "ness"], stop=[" good"]) == ""


def test_a_turn_begins_a_text_and_a_turn_that_goes_on_does_not() -> None:
    user, assistant = {"role": "user", "content": "The"}, {"role": "assistant", "content": "The film was"}
    tokenizer, rendered = metaspace(), ["<|im_start|>", "▁The", "<|im_end|>", "▁was"]
    assert read(tokenizer, rendered, ["▁good"], [user]) == "good"
    assert read(tokenizer, rendered, ["▁good"], [user, assistant]) == " good"


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (["The", "Ġfilm", "Ġwas"], ["Ġgood", "</s>"], " good"),
        (["The", "Ġfilm", "Ġwas"], ["</s>"], ""),
        (["The", "Ã"], ["©", "Ġgood"], "� good"),
        (["The"], ["Ġgood", "Ã"], " good�"),
        (["<s>"], ["Ġgood"], " good"),
    ],
)
def test_texts_of_bytes_are_what_they_decode_to(prompt: list[str], response: list[str], expected: str) -> None:
    tokenizer = byte_level()
    assert read(tokenizer, prompt, response) == expected
    alone = tokenizer.decode(tokenizer.convert_tokens_to_ids(response), skip_special_tokens=True)
    assert alone == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, None),
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}{{ m['content'] }} </s>{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", None),  # ends a turn with nothing special
        ("{{ raise_exception('a system turn must come first') }}", None),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes(template: str | None, expected: str | None) -> None:
    tokenizer = metaspace()
    tokenizer.chat_template = template
    found = turn_end(tokenizer)
    assert found == (None if expected is None else (tokenizer.convert_tokens_to_ids(expected), expected))


def test_every_end_ends_a_turn_and_a_text_knows_none_of_turns() -> None:
    tokenizer = metaspace()
    tokenizer.chat_template = CHATML
    unk, end, turn = tokenizer.convert_tokens_to_ids(["<unk>", "</s>", "<|im_end|>"])
    endings = Endings(tokenizer, [unk])
    assert endings.of(Prompt(0, 0, "text", (1,))) == [unk, end]
    assert endings.of(Prompt(0, 0, [{"role": "user", "content": "hi"}], (1,))) == [unk, end, turn]
