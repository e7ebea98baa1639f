"""Reward models: text in, the classifier's own tokens, a score that no other row changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from raytrl.config.sections.reward import SourceSection
from raytrl.errors import ConfigError
from raytrl.roles.reward.call import Failure, ask
from raytrl.roles.reward.model import ModelSource

TEXTS = ["x", " was moving, and the plot felt clumsy.", " boring", " rather charming and clever and dull and moving"]
PROMPT = "The music of this western"


def _source(path: str, **more: Any) -> ModelSource:
    return ModelSource(SourceSection(name="rm", model=path, **{"retries": 0, **more}), device="cpu")


def _direct(path: str, text: str, special: bool = True) -> float:
    """The classifier alone on one text, by transformers only."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.inference_mode():
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=special)["input_ids"]
        return float(model(input_ids=ids).logits[0, 0])


@pytest.mark.parametrize("vocab_size", [270, 330])
def test_two_tokenizers_score_as_the_text_directly(classifier: Any, pair: Any, vocab_size: int) -> None:
    path = classifier(vocab_size=vocab_size)
    pairs = [pair(PROMPT, text, row=row, ended=row % 2 == 0) for row, text in enumerate(TEXTS)]
    direct = [_direct(path, PROMPT + text + ("<eos>" if row % 2 == 0 else "")) for row, text in enumerate(TEXTS)]
    assert ask(_source(path), pairs) == pytest.approx(direct, abs=1e-6)
    assert len({round(value, 3) for value in direct}) == len(direct)


def test_the_two_tokenizers_do_differ(classifier: Any) -> None:
    one, other = (AutoTokenizer.from_pretrained(classifier(vocab_size=size)) for size in (270, 330))
    assert one(TEXTS[1])["input_ids"] != other(TEXTS[1])["input_ids"]


@pytest.mark.parametrize(
    "properties", [{}, {"pad": "<eos>"}, {"config_pad": None}, {"pad": "<eos>", "config_pad": None}]
)
def test_scores_do_not_depend_on_the_batch(classifier: Any, pair: Any, properties: dict[str, Any]) -> None:
    source = _source(classifier(**properties))
    pairs = [pair(PROMPT, text, row=row, ended=row != 2) for row, text in enumerate(TEXTS)]
    alone = [ask(source, [one])[0] for one in pairs]
    assert ask(source, pairs) == pytest.approx(alone, abs=1e-6)
    assert ask(source, pairs[::-1])[::-1] == pytest.approx(alone, abs=1e-6)
    assert ask(_source(source.section.model or "", batch_size=3), pairs) == pytest.approx(alone, abs=1e-6)


def test_without_a_padding_id_each_row_is_scored_at_its_end_token(classifier: Any, pair: Any) -> None:
    path = classifier(pad="<eos>", config_pad=None)
    scores = ask(_source(path), [pair(PROMPT, text, row=row) for row, text in enumerate(TEXTS)])
    assert scores == pytest.approx([_direct(path, PROMPT + text + "<eos>") for text in TEXTS], abs=1e-6)


def test_a_padding_token_that_is_the_end_token_is_never_scored(classifier: Any, pair: Any) -> None:
    path = classifier(pad="<eos>")
    ended, cut = ask(_source(path), [pair(PROMPT, TEXTS[1]), pair(PROMPT, TEXTS[1], ended=False)])
    # transformers, which trained such a model, skips the end token just so
    assert ended == cut == pytest.approx(_direct(path, PROMPT + TEXTS[1] + "<eos>"), abs=1e-6)


def test_chat_goes_through_the_models_own_template(classifier: Any, pair: Any) -> None:
    path = classifier()
    prompt = [{"role": "user", "content": "did you like it?"}]
    ended, cut = ask(_source(path), [pair(prompt, "I found it dull"), pair(prompt, "I found it dull", ended=False)])
    whole = "<|user|>did you like it?<eos>\n<|assistant|>I found it dull<eos>\n"
    assert ended == pytest.approx(_direct(path, whole, special=False), abs=1e-6)
    assert cut == pytest.approx(_direct(path, whole.removesuffix("<eos>\n"), special=False), abs=1e-6)
    assert ended != pytest.approx(cut, abs=1e-3)


def test_an_empty_cut_chat_response_is_scored(classifier: Any, pair: Any) -> None:
    path = classifier()
    (score,) = ask(_source(path), [pair([{"role": "user", "content": "hi"}], "", ended=False)])
    assert score == pytest.approx(_direct(path, "<|user|>hi<eos>\n<|assistant|>", special=False), abs=1e-6)


def test_chat_without_a_template_is_a_failure(classifier: Any, pair: Any) -> None:
    (outcome,) = ask(_source(classifier(template=None)), [pair([{"role": "user", "content": "hi"}], "ho")])
    assert isinstance(outcome, Failure)
    assert "no chat template" in outcome.reason


DROPS_THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] | trim }}<eos>\n{% endfor %}"
)


def test_a_cut_response_that_the_template_changes_is_scored_as_rendered(classifier: Any, pair: Any) -> None:
    path, prompt = classifier(template=DROPS_THINKING), [{"role": "user", "content": "hi"}]
    said = ["I found it dull", "<think>\nwell</think> dull "]
    scores = ask(_source(path), [pair(prompt, text, row=row, ended=False) for row, text in enumerate(said)])
    read = ["<|user|>hi<eos>\n<|assistant|>I found it dull", "<|user|>hi<eos>\n<|assistant|>dull "]
    assert scores == pytest.approx([_direct(path, text, special=False) for text in read], abs=1e-6)


def test_a_response_that_the_template_cannot_render_fails_alone(classifier: Any, pair: Any) -> None:
    raises = "{% if 'dull' in messages[-1]['content'] %}{{ raise_exception('no such word') }}{% endif %}ok"
    drops = "{% for m in messages %}{{ m['content'].split('</think>')[0] }}{% endfor %}"
    prompt = [{"role": "user", "content": "hi"}]
    first, second = ask(_source(classifier(template=raises)), [pair(prompt, "dull"), pair(prompt, "good", row=1)])
    assert first == Failure("its chat template cannot render the response: no such word", retry=False)
    assert isinstance(second, float)
    first, second = ask(
        _source(classifier(template=drops)),
        [pair(prompt, "a</think>b", ended=False), pair(prompt, "good", row=1, ended=False)],
    )
    assert isinstance(first, Failure) and "leaves out the end of a response" in first.reason
    assert isinstance(second, float)


def test_a_text_too_long_is_a_failure_of_its_row_only(classifier: Any, pair: Any) -> None:
    source = _source(classifier(), retries=2)
    long, short = ask(source, [pair(PROMPT, " moving" * 80), pair(PROMPT, "x", row=1)])
    assert isinstance(long, Failure)
    assert "the model takes 64" in long.reason
    assert not long.retry
    assert short == ask(source, [pair(PROMPT, "x", row=1)])[0]


def test_label_picks_an_output(classifier: Any, pair: Any) -> None:
    path = classifier(num_labels=2, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})
    one = [pair(PROMPT, TEXTS[1])]
    by_name, by_index = ask(_source(path, label="POSITIVE"), one), ask(_source(path, label=1), one)
    assert by_name == by_index
    assert ask(_source(path, label=0), one) == pytest.approx([_direct(path, PROMPT + TEXTS[1] + "<eos>")], abs=1e-6)
    assert by_name != ask(_source(path, label="NEGATIVE"), one)
    for label in (None, "GOOD", 2):
        with pytest.raises(ConfigError, match=r"expected: one of 0 \(NEGATIVE\), 1 \(POSITIVE\)"):
            _source(path, label=label)


def test_a_non_finite_output_is_a_failure(classifier: Any, pair: Any) -> None:
    source = _source(classifier())
    source._model.score.weight.data.fill_(float("nan"))
    assert ask(source, [pair(PROMPT, "x")]) == [Failure("returned nan, not a finite number")]


def test_a_model_that_was_never_a_classifier_is_refused(tmp_path: Path, classifier: Any) -> None:
    AutoTokenizer.from_pretrained(classifier()).save_pretrained(tmp_path)
    config = GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no weights for score\.weight"):
        _source(str(tmp_path), label=0)


def test_a_missing_folder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward\.sources\.rm\.model.*cannot be loaded"):
        _source(str(tmp_path / "nothing"))


def test_an_adapter_folder_stands_for_the_merged_model_beside_it(tmp_path: Path, classifier: Any, pair: Any) -> None:
    adapter = tmp_path / "model"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a LoRA adapter; found: no merged model"):
        _source(str(adapter))
    (adapter / "merged").symlink_to(classifier())
    one = [pair(PROMPT, "x")]
    assert ask(_source(str(adapter)), one) == ask(_source(classifier()), one)


def test_a_bidirectional_classifier_with_its_own_end_token(tmp_path: Path, pair: Any) -> None:
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.intermediate_size, config.num_labels, config.initializer_range = 16, 1, 0.3
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    scores = ask(_source(str(tmp_path)), [pair("ab ", "c"), pair("ab ", "c def ghi", row=1)])
    assert scores == pytest.approx([_direct(str(tmp_path), "ab c"), _direct(str(tmp_path), "ab c def ghi")], abs=1e-6)


def test_a_forward_pass_that_hangs_costs_the_limit(classifier: Any, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    source = _source(classifier(), timeout_s=0.2)
    sleep: Callable[..., Any] = lambda **_: time.sleep(1)  # noqa: E731
    monkeypatch.setattr(source._model, "forward", sleep)
    assert ask(source, [pair(PROMPT, "x")]) == [Failure("gave no answer within 0.2 s")]


def test_nothing_is_kept_for_tokens_that_never_come(classifier: Any, pair: Any) -> None:
    """Keys and values of all layers would be more than all else of a batch."""
    source, kept = _source(classifier()), []
    source._model.register_forward_hook(
        lambda _, __, out: kept.append(out.get("cache", out.get("past_key_values"))),
    )
    ask(source, [pair(PROMPT, TEXTS[1])])
    assert kept == [None]


def test_close_scores_stay_apart_in_bfloat16(classifier: Any, pair: Any) -> None:
    path = classifier()
    model = AutoModelForSequenceClassification.from_pretrained(path)
    model.score.weight.data *= 200
    model.save_pretrained(path)
    pairs = [pair(PROMPT, TEXTS[row % 4] + "abcdefgh"[row % 8] * (row % 5), row=row) for row in range(32)]
    whole, half = (torch.tensor(ask(_source(path, dtype=dtype), pairs)) for dtype in ("float32", "bfloat16"))
    assert len(set(half.tolist())) == len(set(whole.tolist()))
    assert float((half - whole).std() / whole.std()) < 0.05
    assert not torch.equal(half, half.to(torch.bfloat16).float())
