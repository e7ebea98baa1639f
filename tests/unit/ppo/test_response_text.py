"""What reward sources read of a response, and which tokens end it, with the tokenizers that people have."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from raytrl.records.samples import Prompt, PromptText
from raytrl.roles.models.tokenizer import turn_end
from raytrl.roles.rollout.engine import Endings, StopStrings, continued_text, response_text

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["▁The", "▁film", "▁was", "▁good", "ness", "▁"]
BYTES = bytes_to_unicode()
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


@pytest.mark.parametrize("stop", [" good", "é", " film was", "m good"])
@pytest.mark.parametrize("makes", [metaspace, byte_level])
def test_a_stop_string_is_seen_at_the_very_token_that_ends_it(makes: Any, stop: str) -> None:
    """As by decoding the whole response after each token, however long it is, and with characters of several tokens."""
    tokenizer, draw = makes(), random.Random(stop)
    of = tokenizer.convert_tokens_to_ids
    pieces = [
        t
        for t in (*WORDS, "Ġfilm", "Ġgood", "Ġwas", "n", "e", "s", "d", "<|im_end|>")
        if of(t) not in (None, of("<unk>"))
    ]
    letters = "<0x{:02X}>".format if makes is metaspace else (lambda byte: BYTES[byte])
    pieces += [letters(byte) for byte in "é☂".encode()] * 2
    strings = StopStrings(tokenizer, ["never there", stop])
    prompt, seen = Prompt(0, 0, "…", tuple(of(["<s>", pieces[0]]))), 0
    for _ in range(40):
        ids = of(draw.choices(pieces, k=120))
        ends = next((n for n in range(1, 121) if stop in continued_text(tokenizer, prompt, ids[:n])), None)
        found = (n for n in range(1, 121) if strings.may_end(ids[max(0, n - strings.window) : n]))
        assert next((n for n in found if strings.are_in(prompt, ids[:n])), None) == ends
        seen += ends is not None and ends > strings.window
    assert seen or stop == " good"  # which comes early


def test_looking_for_stop_strings_costs_the_same_at_every_token() -> None:
    tokenizer = metaspace()
    ids, decoded = [tokenizer.convert_tokens_to_ids("▁film")] * 4000, 0
    decode = tokenizer.decode

    def counted(token_ids: list[int], **more: Any) -> Any:
        nonlocal decoded
        decoded += len(token_ids)
        return decode(token_ids, **more)

    strings = StopStrings(SimpleNamespace(decode=counted), ["good"])
    for n in range(strings.window, 4001):
        assert not strings.may_end(ids[n - strings.window : n])
    assert decoded <= 4000 * strings.window
