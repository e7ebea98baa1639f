"""Tokenizers: what is trained, and what is refused because it would train silently wrong."""

from pathlib import Path
from typing import Any

import pytest

from raytrl.config.kinds import RUNS
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.sections.model import TokenizerSpec
from raytrl.errors import ConfigError
from raytrl.roles.models.tokenizer import check_tokenizer, load_tokenizer, train_tokenizer
from tests.runs import text_rows

CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
TURN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}END{% endif %}\n{% endfor %}"
)
ENDS = TURN.replace("END", "<|end|>")
NEVER_ENDS = TURN.replace("END", "")
ENDS_OTHERWISE = TURN.replace("END", "<|im_end|>")


@pytest.fixture(scope="module")
def trained() -> Any:
    texts = (row["text"] for row in text_rows(50))
    return train_tokenizer(texts, TokenizerSpec(vocab_size=300, special_tokens=["<|im_end|>"]))


def run_of(kind: str = "sft", model: dict[str, Any] | None = None, **training: Any) -> SupervisedRun:
    sections = {"model": {"path": "m"} | (model or {}), "data": {"train": "a.jsonl"}, "training": training}
    run = RUNS[kind].model_validate({"name": "a", **sections})
    assert isinstance(run, SupervisedRun)
    return run


def with_template(tokenizer: Any, template: str | None) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def refused(tokenizer: Any, run: SupervisedRun, conversation: list[dict[str, Any]] | None) -> str:
    with pytest.raises(ConfigError) as caught:
        check_tokenizer(tokenizer, run, conversation)
    return str(caught.value)


def test_a_trained_tokenizer_returns_any_text_unchanged(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), None, False)
    for text in ("the film is good .", "Zürich 日本 🙂\n\tx"):
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded) == 300
    assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|pad|>")
    assert loaded.eos_token_id != loaded.pad_token_id
    assert loaded("<|im_end|>")["input_ids"] == [loaded.convert_tokens_to_ids("<|im_end|>")]


def test_a_vocabulary_larger_than_the_text_gives_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size: the training text gives only (2\d\d) entries; found: 5000"):
        train_tokenizer(iter(["a film"]), TokenizerSpec(vocab_size=5000))


@pytest.mark.parametrize("content", ["hello there", "  hello there\n", ""])
def test_a_template_that_ends_its_turns_is_accepted(trained: Any, content: str) -> None:
    conversation = [CONVERSATION[0], {"role": "assistant", "content": content}]
    check_tokenizer(with_template(trained, ENDS), run_of(), conversation)


@pytest.mark.parametrize("content", ["hello there", "hello there <|end|>\n", "  hello there\n"])
def test_a_template_that_ends_no_turn_is_refused(trained: Any, content: str) -> None:
    conversation = [CONVERSATION[0], {"role": "assistant", "content": content}]
    message = refused(with_template(trained, NEVER_ENDS), run_of(), conversation)
    assert message.startswith("training.chat_template_path: the template ends no turn")
    assert "'<|end|>'" in message


def test_the_end_token_of_the_run_file_is_what_must_end_the_turn(trained: Any) -> None:
    tokenizer = with_template(trained, ENDS_OTHERWISE)
    assert "the template ends no turn" in refused(tokenizer, run_of(), CONVERSATION)
    check_tokenizer(tokenizer, run_of(eos_token="<|im_end|>"), CONVERSATION)
    assert refused(tokenizer, run_of(eos_token="<eos>"), CONVERSATION).startswith("training.eos_token: found: '<eos>'")


def test_conversations_without_a_template_are_refused_and_plain_text_is_not(trained: Any) -> None:
    tokenizer = with_template(trained, None)
    assert "has no chat template" in refused(tokenizer, run_of(), CONVERSATION)
    check_tokenizer(tokenizer, run_of(), None)


def test_remedies_are_keys_that_the_kind_has(trained: Any) -> None:
    tokenizer = with_template(trained, None)
    assert "set training.chat_template_path" in refused(tokenizer, run_of("reward"), CONVERSATION)
    message = refused(tokenizer, run_of("dpo"), CONVERSATION)
    assert message.startswith("model.tokenizer: the rows are conversations")
    assert "choose a model.tokenizer that has one" in message


def test_a_template_file_takes_the_place_of_the_tokenizers_own(trained: Any, tmp_path: Path) -> None:
    tokenizer, file = with_template(trained, NEVER_ENDS), tmp_path / "chat.jinja"
    assert "no such file" in refused(tokenizer, run_of(chat_template_path=str(file)), CONVERSATION)
    file.write_text(ENDS)
    check_tokenizer(tokenizer, run_of(chat_template_path=str(file)), CONVERSATION)
    file.write_text("{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in refused(tokenizer, run_of(chat_template_path=str(file)), CONVERSATION)


def test_a_conversation_nobody_answers_is_refused(trained: Any) -> None:
    assert "no assistant turn" in refused(with_template(trained, ENDS), run_of(), CONVERSATION[:1])


def test_padding_with_the_end_token_is_refused_for_a_reward_model_only(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), None, False)
    check_tokenizer(tokenizer, run_of("reward"), None)
    for pad in (tokenizer.eos_token, None):
        tokenizer.pad_token = pad
        check_tokenizer(tokenizer, run_of("sft"), None)
        message = refused(tokenizer, run_of("reward"), None)
        assert message.startswith("model.pad_token: ")
        assert f"found: pad {pad!r}, end '<|end|>'" in message
    check_tokenizer(tokenizer, run_of("reward", {"pad_token": "<|pad|>"}), None)
    check_tokenizer(tokenizer, run_of("reward", pad_token="<|pad|>"), None)
    assert "found: pad '<|end|>'" in refused(tokenizer, run_of("reward", pad_token="<|end|>"), None)


def test_a_tokenizer_without_end_token_is_refused(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), None, False)
    tokenizer.eos_token = None
    assert refused(tokenizer, run_of(), None).startswith("model.tokenizer: has no end token")
    check_tokenizer(tokenizer, run_of(eos_token="<|im_end|>"), None)


def test_training_on_answers_alone_needs_a_template_that_tells_them_apart(trained: Any) -> None:
    run = run_of(assistant_only_loss=True)
    assert "rows that are no conversations" in refused(trained, run, None)
    assert refused(with_template(trained, ENDS), run, CONVERSATION).startswith("training.assistant_only_loss: The chat")
    answer = "{% generation %}{{ m['content'] }}END{% endgeneration %}"
    others = "{{ m['content'] }}{{ eos_token }}"
    turn = f"{{% if m['role'] == 'assistant' %}}ANSWER{{% else %}}{others}{{% endif %}}"
    marked = f"{{% for m in messages %}}<{{{{ m['role'] }}}}>{turn}{{% endfor %}}"
    inside = marked.replace("ANSWER", answer.replace("END", "{{ eos_token }}"))
    check_tokenizer(with_template(trained, inside), run, CONVERSATION)
    assert trained.chat_template == inside
    outside = marked.replace("ANSWER", answer.replace("END", "") + "{{ eos_token }}")
    assert "never learns to stop" in refused(with_template(trained, outside), run, CONVERSATION)
