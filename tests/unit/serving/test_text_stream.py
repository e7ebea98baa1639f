"""Text token by token: joined it is what the tokenizer makes of all tokens, and no character is said in parts."""

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from raytrl.records.samples import Prompt
from raytrl.roles.rollout.engine import continued_text
from raytrl.roles.serving.text_stream import UNKNOWN, StopStrings, TextStream, TokenTexts
from tests.chats import tokenizer as bytes_tokenizer

TEXT = "the film 日本語 was 👍🏽 ünd gut — ok. 😀😀😀"


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: ▁ for spaces, bytes for characters that it lacks."""
    words = ["<unk>", "</s>", "▁the", "▁film", "▁", "s", "▁is", "."] + [f"<0x{byte:02X}>" for byte in range(256)]
    made = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def pieces(tokenizer: Any, before: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, before)
    return [*(stream.add(token) for token in ids), stream.rest()]


def test_characters_of_several_tokens_are_said_whole() -> None:
    tokenizer = bytes_tokenizer()  # a token a byte
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(TEXT.encode())
    found = pieces(tokenizer, [], ids)
    assert "".join(found) == TEXT and UNKNOWN not in "".join(found)
    assert max(map(len, found)) == 1  # as soon as it is whole
    for cut in range(len(ids)):  # cut within a character: told as what it is, at the end alone
        assert "".join(pieces(tokenizer, [], ids[:cut])) == tokenizer.decode(ids[:cut])


def test_bytes_of_no_character_are_said_at_last() -> None:
    tokenizer = bytes_tokenizer()
    (byte,) = (i for i in range(256) if tokenizer.convert_ids_to_tokens(i) == "ÿ")  # 0xFF
    found = pieces(tokenizer, [], [byte] * 100)
    assert "".join(found) == UNKNOWN * 100
    assert sum(map(bool, found)) > 3  # and not all at the end


def test_a_first_space_is_kept_where_a_text_goes_on() -> None:
    tokenizer = sentencepiece()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("▁film", "s", "▁is", "▁the", "▁film", ".")]
    (the,) = (tokenizer.convert_tokens_to_ids("▁the"),)
    assert "".join(pieces(tokenizer, [the], ids)) == " films is the film."
    assert "".join(pieces(tokenizer, [], ids)) == "films is the film."
    emoji = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "😀".encode()]
    found = pieces(tokenizer, [the], [*emoji, *emoji, *ids * 20, *emoji])
    assert "".join(found) == "😀😀" + " films is the film." * 20 + "😀" and UNKNOWN not in "".join(found)
    assert "".join(pieces(tokenizer, [the, *emoji[:2]], ids)) == "films is the film."  # before it, half a character


@pytest.mark.parametrize("make", [bytes_tokenizer, sentencepiece])
def test_joined_it_is_the_text_of_training(make: Any) -> None:
    tokenizer, rng = make(), random.Random(0)
    ids = tokenizer.convert_tokens_to_ids
    letters = [ids(t) for t in (("▁the", "▁film", "s", "▁is", ".") if make is sentencepiece else "abcĠ")]
    for _ in range(100):
        before, made = rng.choices(letters, k=rng.randint(1, 20)), rng.choices(letters, k=rng.randint(0, 90))
        prompt = Prompt(step=0, row=0, text="", token_ids=tuple(before), columns={})
        assert "".join(pieces(tokenizer, before[-16:], made)) == continued_text(tokenizer, prompt, made)


def test_texts_of_tokens() -> None:
    tokenizer = sentencepiece()
    texts = TokenTexts(tokenizer)
    words = ("▁the", "s", "</s>", "<0xFF>")
    assert [texts.of(tokenizer.convert_tokens_to_ids(word)) for word in words] == [" the", "s", "</s>", UNKNOWN]


def test_stop_strings_are_never_begun() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        words = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
        text = "".join(rng.choices("abc", k=30))
        stop, said, stopped, rest = StopStrings(words), "", False, text
        while rest and not stopped:
            size = rng.randint(1, 4)
            new, stopped = stop.add(rest[:size])
            said, rest = said + new, rest[size:]
            assert not any(word in said for word in words)
        said += "" if stopped else stop.rest()
        seen = text[: len(text) - len(rest)]
        cuts = [seen.index(word) for word in words if word in seen]
        assert stopped == bool(cuts) and said == (text[: min(cuts)] if cuts else text)
