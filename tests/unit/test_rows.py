"""Rows before a run starts: what a template makes of them, how long they are, and what is refused or told."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from raytrl.config.sections.data import DataSource
from raytrl.config.sections.model import TokenizerSpec
from raytrl.data import load_data
from raytrl.errors import DataError
from raytrl.plan.checks.rows import Found, go_through
from raytrl.plan.checks.told import refuse, row_notices, row_words
from raytrl.plan.checks.training_rows import TrainingRows
from raytrl.roles.models.positions import Positions
from raytrl.roles.models.rendering import left_out
from raytrl.roles.models.tokenizer import train_tokenizer
from tests.runs import write_rows

TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CHAT = TURNS + ASKS
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT
DROPS = CHAT.replace("m['content']", "m['content'].split('</think>')[-1]")
THINKS = TURNS + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
TRACE = "<think>\nThe film was slow and the ending was weak.</think>dull."


MEASURE = TrainingRows._measure


@pytest.fixture
def tokenizer() -> Any:
    """Without merges: a token a byte, so that lengths are known."""
    spec = TokenizerSpec(vocab_size=262, special_tokens=["<|user|>", "<|assistant|>", "<|system|>", "<s>"])
    return train_tokenizer(iter(["ab"]), spec)


def check_of(tokenizer: Any, kind: str, rows: list[dict[str, Any]], template: str = CHAT, **more: Any) -> TrainingRows:
    tokenizer.chat_template = template
    columns = {"max_length": 1024, "columns": tuple(rows[0])} | more
    return TrainingRows("data.train", kind, tokenizer=tokenizer, **columns)


def tried(check: TrainingRows, rows: list[dict[str, Any]]) -> Found:
    return go_through(Dataset.from_list(rows), check.columns, check)


def told(tokenizer: Any, kind: str, rows: list[dict[str, Any]], template: str = CHAT, **more: Any) -> list[str]:
    check = check_of(tokenizer, kind, rows, template, **more)
    found = tried(check, rows)
    refuse(found, check)
    return row_notices(found, check, False)


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(turns)]


def refused(tokenizer: Any, kind: str, rows: list[dict[str, Any]], template: str = CHAT, **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        told(tokenizer, kind, rows, template, **more)
    return str(caught.value)


# ---- templates


def test_a_sound_conversation_says_nothing(tokenizer: Any) -> None:
    rows = [{"messages": talk("How was it?", " good.\n", "And\nthe end?", "dull")}] * 3
    check = check_of(tokenizer, "sft", rows)
    found = tried(check, rows)
    assert row_notices(found, check, False) == []
    assert (found.rows, found.totals["prompts tried"]) == (3, 3)
    # 4 role tokens, 4 end tokens, and the bytes
    assert found.longest[""] == (8 + 11 + 7 + 12 + 4, 1)
    assert row_words(found, check) == "3 rows of up to 42 tokens"


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_a_turn_that_the_template_forbids_is_refused_with_its_row(tokenizer: Any, kind: str) -> None:
    def row(messages: list[dict[str, str]]) -> dict[str, Any]:
        if kind == "sft":
            return {"messages": messages}
        answers = {"chosen": messages[-1:], "rejected": talk("", "bad")[1:]}
        return {"prompt": messages[:-1], **answers}

    rows = [row(talk("a", "b"))] * 6 + [row([{"role": "system", "content": "x"}, *talk("a", "b")])]
    message = refused(tokenizer, kind, rows, STRICT)
    assert message.startswith("data.train: row 7: the chat template cannot render the conversation: no system turn")
    assert "found: turns of system, user" in message


def test_a_conversation_nobody_answers_is_refused_with_its_row(tokenizer: Any) -> None:
    for rows, kind in (
        ([{"messages": talk("a", "b")}, {"messages": talk("a")}], "sft"),
        (
            [
                {"prompt": talk("a"), "completion": talk("", "b")[1:]},
                {"prompt": talk("a", "b"), "completion": talk("c")},
            ],
            "sft",
        ),
        (
            [{"chosen": talk("a", "b"), "rejected": talk("a", "c")}, {"chosen": talk("a"), "rejected": talk("a", "b")}],
            "reward",
        ),
    ):
        assert refused(tokenizer, kind, rows).startswith("data.train: row 2: the conversation has no assistant turn")
    (notice,) = told(tokenizer, "sft", [{"messages": talk("a", "b", "c")}])
    assert notice == "data.train: 1 of 1 rows end in a turn that is not the assistant's; row 1: user"


def test_what_a_template_leaves_out_is_counted(tokenizer: Any) -> None:
    plain = talk("How was it?", "dull.")
    for rows in (
        [{"messages": plain}, {"messages": talk("How was it?", TRACE)}],
        [
            {"prompt": plain[:1], "completion": plain[1:]},
            {"prompt": plain[:1], "completion": talk("", TRACE)[1:]},
        ],
    ):
        (notice,) = told(tokenizer, "sft", rows, DROPS)
        assert notice.startswith(
            "data.train: the chat template leaves out or changes what is the assistant's in 1 of 2 rows, "
        )
        assert "(48 characters); row 2: '<think>\\nThe film" in notice
    assert told(tokenizer, "sft", [{"messages": talk("a", TRACE)}]) == []


def test_reasoning_in_a_field_of_its_own_and_system_turns_are_seen_to_be_left_out(tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": "dull.", "reasoning_content": "The film was slow."}
    (notice,) = told(tokenizer, "sft", [{"messages": [*talk("How?"), answer]}])
    assert "what is the assistant's in 1 of 1 rows" in notice and "'The film was slow.'" in notice
    no_system = CHAT.replace("<|{{", "{% if m['role'] != 'system' %}<|{{").replace(
        "{{ eos_token }}", "{{ eos_token }}{% endif %}"
    )
    row = {"messages": [{"role": "system", "content": "Be short."}, *talk("How?", "dull.")]}
    (notice,) = told(tokenizer, "sft", [row], no_system)
    assert "what is the system's in 1 of 1 rows" in notice


def test_what_both_answers_of_a_preference_share_is_counted_once(tokenizer: Any) -> None:
    no_system = CHAT.replace("messages %}", "messages if m['role'] != 'system' %}")
    prompt = [{"role": "system", "content": "Be terse."}, *talk("How?")]
    row = {"prompt": prompt, "chosen": talk("", "good.")[1:], "rejected": talk("", "bad.")[1:]}
    for kind in ("dpo", "reward"):
        (notice,) = told(tokenizer, kind, [row], no_system)
        assert "what is the system's in 1 of 1 rows, 100% of its text (8 characters)" in notice


def test_left_out_counts_what_is_in_no_part_of_the_text() -> None:
    assert left_out("a b\nc", "x a  b c y") == 0  # blanks are not content
    assert left_out("<think>because of it</think>the film was dull", "user: the film was dull") == 26
    assert left_out("the film was dull and slow", "the film was dull") == 7
    assert left_out("wholly another", "text") == 13


def test_a_generation_prompt_that_training_never_saw_is_told(tokenizer: Any) -> None:
    pair = {"prompt": talk("How?"), "completion": talk("", "dull.")[1:]}
    preference = {"prompt": talk("How?"), "chosen": talk("", "dull.")[1:], "rejected": talk("", "good.")[1:]}
    for kind, row in (("sft", pair), ("sft", {"messages": talk("How?", "dull.")}), ("dpo", preference)):
        (notice,) = told(tokenizer, kind, [row], THINKS)
        assert "in 1 of 1 rows tried: a rollout's prompt ends in '<think>\\n'" in notice
    assert told(tokenizer, "sft", [pair]) == []


def test_a_text_that_begins_with_the_beginning_token_twice_is_told(tokenizer: Any) -> None:
    from tokenizers import processors

    two = train_tokenizer(iter(["ab"]), TokenizerSpec(vocab_size=262, special_tokens=["<s>", "<a>", "<b>", "<c>"]))
    two.bos_token = "<s>"
    two.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", two.bos_token_id)]
    )
    rows = [{"text": "a film"}, {"text": "<s>a film"}]
    (notice,) = told(two, "sft", rows)
    assert notice.startswith("data.train: 1 of 2 rows begin with <s> twice")
    assert "(first: row 2)" in notice
    two.chat_template = "<s>" + CHAT
    assert told(two, "sft", [{"messages": talk("a", "b")}], "<s>" + CHAT) == []


# ---- lengths


def test_rows_that_lose_their_end_are_counted_with_the_end_token_that_trl_adds(tokenizer: Any) -> None:
    rows = [{"text": "12345"}, {"text": "1234<|end|>"}, {"text": "123"}, {"text": "123456789"}]
    check = check_of(tokenizer, "sft", rows, max_length=5)
    found = tried(check, rows)
    assert row_words(found, check) == "4 rows of up to 10 tokens; 2 longer than training.max_length 5 are cut"
    (notice,) = row_notices(found, check, True)
    assert notice == (
        "data.train: 2 of 4 rows are longer than training.max_length 5, the default of TRL: they are cut and lose their "
        "end, the end token included, 6 tokens in all (longest: row 4, 10 tokens)"
    )
    assert told(tokenizer, "sft", rows, max_length=None) == told(tokenizer, "sft", rows, max_length=10) == []
    assert "lose their end" in told(tokenizer, "sft", rows, max_length=5, packing="bfd")[0]
    assert "are split: packing_strategy wrapped" in told(tokenizer, "sft", rows, max_length=5, packing="wrapped")[0]
    assert "lose their beginning" in told(tokenizer, "sft", rows, max_length=5, keeps_end=True)[0]


def test_rows_that_trl_leaves_out_are_counted_as_such(tokenizer: Any) -> None:
    pairs = [{"chosen": "123", "rejected": "1234567"}, {"chosen": "1", "rejected": "2"}]
    check = check_of(tokenizer, "reward", pairs, max_length=5)
    words = row_words(tried(check, pairs), check)
    assert words == "2 rows of up to 8 tokens; 1 longer than training.max_length 5 allows are left out"
    assert "all 1 rows are longer than training.max_length 5" in refused(tokenizer, "reward", pairs[:1], max_length=5)
    prompts = [{"prompt": "12345", "chosen": "a", "rejected": "b"}, {"prompt": "12", "chosen": "aaaa", "rejected": "b"}]
    check = check_of(tokenizer, "dpo", prompts, max_length=5)
    found = tried(check, prompts)
    assert (found.tally("dropped").first, found.tally("long").first) == (1, 2)
    completion = [{"prompt": "12345", "completion": "a"}, {"prompt": "1", "completion": "a"}]
    check = check_of(tokenizer, "sft", completion, max_length=5, completion_only=True)
    assert tried(check, completion).tally("dropped").rows == 1


def test_the_prompt_of_a_preference_is_found_as_trl_finds_it(tokenizer: Any) -> None:
    for chosen, rejected, prompt in (  # as `trl.data_utils.extract_prompt` answers
        ("The film was good", "The film was bad", "The film was"),
        ("a", "b", ""),
        ("The film", "The film was", "The fil"),
        (talk("a", "b"), talk("a", "c"), talk("a")),
    ):
        row = {"chosen": chosen, "rejected": rejected}
        check = check_of(tokenizer, "dpo", [row])
        assert [each.prompt for each in check._sequences(row)] == [prompt] * 2


def test_rows_beyond_the_positions_are_refused_only_where_they_come_to_the_model(tokenizer: Any) -> None:
    rows = [{"text": "123"}, {"text": "12345678"}]
    table, rotated = Positions(8, True), Positions(8, False)
    message = refused(tokenizer, "sft", rows, positions=table)
    assert message.startswith("data.train: row 2: the model has no positions for it; found: 9 tokens, and 1 of 2 rows")
    assert "expected: at most 8; set training.max_length to 8 or less" in message
    assert told(tokenizer, "sft", rows[:1], positions=table) == []
    assert "are cut" in told(tokenizer, "sft", rows, positions=table, max_length=8)[0]
    assert "padded to a multiple of 16" in refused(tokenizer, "sft", rows, positions=table, max_length=8, multiple=16)
    assert "1 of 2 rows have more tokens than the 8 positions" in told(tokenizer, "sft", rows, positions=rotated)[0]
    assert "packing_strategy wrapped fills rows" in refused(
        tokenizer, "sft", rows, positions=table, max_length=9, packing="wrapped"
    )
    pairs = [{"chosen": "12345678", "rejected": "1"}]
    assert "row 1: the model has no positions" in refused(tokenizer, "reward", pairs, positions=table)
    assert "row 1: the model has no positions" in refused(
        tokenizer, "dpo", [{"prompt": "1", **pairs[0]}], positions=table
    )


def test_ready_token_ids_are_counted_as_they_are(tokenizer: Any) -> None:
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [1]}]
    assert tried(check_of(tokenizer, "sft", rows), rows).longest[""] == (3, 1)


def test_rows_that_teach_nothing_are_told(tokenizer: Any) -> None:
    texts = [{"text": "a"}, {"text": ""}, {"text": " \n"}]
    assert "2 of 3 rows have no text to train on but the end token (first: row 2)" in told(tokenizer, "sft", texts)[0]
    assert "first: row 1" in told(tokenizer, "sft", [{"prompt": "a", "completion": ""}])[0]
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    for kind in ("dpo", "reward"):
        assert told(tokenizer, kind, pairs[:1]) == []
        assert "in 1 of 2 rows the chosen and the rejected answer are the same" in told(tokenizer, kind, pairs)[0]
    apart = [{"chosen": talk("a", "b"), "rejected": talk("c", "b")}]
    assert "in 1 of 1 rows chosen and rejected differ from their first turn on" in " ".join(
        told(tokenizer, "dpo", apart)
    )
    assert "differ from" not in " ".join(
        told(tokenizer, "dpo", [{"chosen": talk("a", "b"), "rejected": talk("a", "c")}])
    )
    turns = [{"chosen": talk("a", "b"), "rejected": talk("a", "b")}]
    assert "the same" in " ".join(told(tokenizer, "reward", turns))


# ---- many rows


def test_several_processes_find_the_same(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"messages": talk("How?", "dull." if i % 3 else TRACE)} for i in range(2500)]
    check = check_of(tokenizer, "sft", rows, DROPS, max_length=40)
    alone = tried(check, rows)
    monkeypatch.setattr("raytrl.plan.checks.rows._ALONE", 100)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    assert tried(check, rows) == alone  # rows that travel
    write_rows(tmp_path / "a.jsonl", rows)
    in_files = load_data(DataSource.model_validate(str(tmp_path / "a.jsonl")), "data.train")
    assert in_files.cache_files
    told: list[tuple[str, int, int]] = []
    assert (
        go_through(in_files, check.columns, check, tell=lambda *words: told.append(words)) == alone
    )  # read by each process
    assert told == [("data.train", done, 2500) for done in (1000, 2000, 2500)]


def test_what_was_found_in_many_rows_is_kept_by_all_it_follows_from(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("raytrl.plan.checks.rows._ALONE", 2)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    passes: list[int] = []
    monkeypatch.setattr(
        TrainingRows, "_measure", lambda self, number, *rest: (passes.append(number), MEASURE(self, number, *rest))
    )

    def times(rows: list[dict[str, Any]], template: str = CHAT, **more: Any) -> int:
        passes.clear()
        check = check_of(tokenizer, "sft", rows, template, **more)
        found = go_through(Dataset.from_list(rows), check.columns, check, alone=True)
        assert found == go_through(Dataset.from_list(rows), check.columns, check, alone=True)
        return len(passes)

    rows = [{"messages": talk("How?", TRACE)}] * 3
    assert times(rows) == 3
    assert times(rows) == 0
    assert times([*rows[:2], {"messages": talk("How?", "dull")}]) == 3  # other rows
    assert times(rows, DROPS) == 3  # another template
    assert times(rows, max_length=12) == 3
    assert times(rows, positions=Positions(64, True)) == 3
    tokenizer.add_tokens(["How"])
    assert times(rows) == 3  # another tokenizer
    assert times(rows, "{{ strftime_now('%d') }}" + CHAT) == 6  # what follows from the day is not kept
    assert times(rows) == 0
    monkeypatch.setattr("raytrl.plan.checks.rows._VERSION", 2)
    assert times(rows) == 3


def test_the_first_bad_row_is_named_whichever_batch_it_is_in(tokenizer: Any) -> None:
    rows = [{"messages": talk("How?", "dull.")}] * 2500
    rows[2100] = rows[2300] = {"messages": talk("How?")}
    with pytest.raises(DataError, match=r"row 2101: the conversation has no assistant turn"):
        tried(check_of(tokenizer, "sft", rows), rows)
