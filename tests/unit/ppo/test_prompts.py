"""Prompts: their order, their shares, their tokens, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from raytrl.config.runs.ppo import PpoRun
from raytrl.config.sections.model import TokenizerSpec
from raytrl.config.sections.rollout import RolloutSection
from raytrl.data import check_columns
from raytrl.errors import ConfigError, DataError
from raytrl.plan.checks.prompts import Judge, PromptRows, check_for_prompts, check_readers, judged
from raytrl.plan.checks.rows import Found, go_through
from raytrl.records.samples import chunks
from raytrl.roles.models.tokenizer import load_tokenizer, train_tokenizer
from raytrl.roles.prompts import PromptOrder, PromptTable, SharedPrompts, last_messages

RUN = PpoRun(
    name="a",
    model={"path": "a"},
    data={"train": "a.jsonl"},
    reward={"sources": [{"name": "a", "function": "a.py:a"}]},
)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if not (loop.last and continue_final_message) %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(iter([" a the film is good bad slow"] * 50), TokenizerSpec(vocab_size=270))


def table(tokenizer: Any, rows: list[dict[str, Any]], **rollout: Any) -> PromptTable:
    return PromptTable(Dataset.from_list(rows), tokenizer, RolloutSection(**rollout), "data.train")


def found_in(tokenizer: Any, rows: list[dict[str, Any]], *judges: Judge, **rollout: Any) -> Found:
    check = PromptRows("data.train", table(tokenizer, [{"prompt": "a"}], **rollout), tokenizer, judges)
    return go_through(Dataset.from_list(rows), ["prompt"], check)


def shared(tokenizer: Any, rank: int = 0, world: int = 1, **changes: Any) -> SharedPrompts:
    rows = [{"prompt": f"film {i}", "answer": i} for i in range(10)]
    options: dict[str, Any] = {"per_step": 8, "eval_rows": 5, "chunk_prompts": 2, "seed": 0} | changes
    prompts = table(tokenizer, rows)
    return SharedPrompts(prompts, prompts, rank=rank, world_size=world, **options)


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    order = PromptOrder(10, 4, seed=0)
    drawn = [order.index(step, row) for step in range(15) for row in range(4)]
    epochs = [drawn[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert [PromptOrder(10, 4, seed=0).index(7, row) for row in range(4)] == drawn[28:32]  # no cursor
    assert [PromptOrder(10, 4, seed=1).index(0, row) for row in range(4)] != drawn[:4]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shares_are_whole_chunks_and_together_the_batch(tokenizer: Any, world: int) -> None:
    whole = shared(tokenizer).next(3)
    shares = [shared(tokenizer, rank, world).next(3) for rank in range(world)]
    assert [prompt for share in shares for prompt in share] == whole
    assert [chunk for share in shares for chunk in chunks(share, 2)] == chunks(whole, 2)
    assert all(share for share in shares)
    evaluations = [p for rank in range(world) for p in shared(tokenizer, rank, world).evaluation(3)]
    assert [(p.row, p.text, p.step) for p in evaluations] == [(i, f"film {i}", 3) for i in range(5)]


def test_the_other_columns_travel(tokenizer: Any) -> None:
    for prompt in shared(tokenizer).next(0):
        assert prompt.text == f"film {prompt.columns['answer']}"
        assert set(prompt.columns) == {"answer"}


def test_a_long_prompt_loses_its_beginning_or_is_refused(tokenizer: Any) -> None:
    rows = [{"prompt": "film"}, {"prompt": "the film is good the film is bad"}]
    whole = table(tokenizer, rows)
    ids = whole.prompt(1, 0, 0).token_ids
    assert table(tokenizer, rows, max_prompt_length=4).prompt(1, 0, 0).token_ids == ids[-4:]
    found = found_in(tokenizer, rows, max_prompt_length=4)
    assert (found.longest[""], found.tally("cut").rows) == ((len(ids), 2), 1)
    with pytest.raises(DataError, match=r"data\.train: row 2: the prompt is too long; found: \d+ tokens"):
        found_in(tokenizer, rows, max_prompt_length=4, long_prompts="refuse")


def test_reward_sources_read_what_the_policy_saw_of_a_long_prompt(tokenizer: Any) -> None:
    rows = [{"prompt": "the film is good the film is bad"}, {"prompt": "the film"}]
    cut = table(tokenizer, rows, max_prompt_length=4)
    prompt = cut.prompt(0, 0, 0)
    assert rows[0]["prompt"].endswith(str(prompt.text)) and len(str(prompt.text)) < len(rows[0]["prompt"])
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert cut.prompt(1, 0, 0).text == "the film"[-len(tokenizer.decode(cut.prompt(1, 0, 0).token_ids)) :]


def test_of_a_long_conversation_reward_sources_read_the_last_messages() -> None:
    turns = [("system", "be short"), ("user", "is the film good"), ("assistant", "it is"), ("user", "is the film good")]
    messages = [{"role": role, "content": content, "extra": 1} for role, content in turns]
    whole = "".join(f"<{role}>{content}|" for role, content in turns) + "<assistant>"
    assert last_messages(messages, whole, 0) == messages
    assert last_messages(messages, whole, 1) == messages  # nothing but a part of a role is lost
    assert last_messages(messages, whole, whole.index("film")) == [
        {**messages[1], "content": "film good"},
        *messages[2:],
    ]
    assert last_messages(messages, whole, whole.index("<assistant>it")) == messages[2:]
    assert last_messages(messages, whole, whole.rindex("good")) == [{**messages[3], "content": "good"}]
    assert last_messages(messages, whole, len(whole) - 3) == []


def test_conversations_take_the_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "is the film good"}]}]
    with pytest.raises(ConfigError, match="no chat template"):
        check_for_prompts(tokenizer, rows[0]["prompt"], "data.train")
    tokenizer.save_pretrained(tmp_path)
    chat = load_tokenizer(str(tmp_path), None, False)
    chat.chat_template = TEMPLATE
    prompt = table(chat, rows).prompt(0, 0, 0)
    assert chat.decode(prompt.token_ids) == "<user>is the film good<|end|><assistant>"
    assert prompt.text == rows[0]["prompt"]
    begun = [{"prompt": [*rows[0]["prompt"], {"role": "assistant", "content": "the film is"}]}]
    assert chat.decode(table(chat, begun).prompt(0, 0, 0).token_ids).endswith("<assistant>the film is")
    chat.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(DataError, match=r"row 1: the chat template cannot render the prompt: no system turn"):
        table(chat, rows).prompt(0, 0, 0)


def test_what_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"row 2: the prompt has no tokens"):
        found_in(tokenizer, [{"prompt": "film"}, {"prompt": ""}])
    with pytest.raises(DataError, match=r"data\.train: row 2: 'prompt' is missing or null"):
        check_columns(Dataset.from_list([{"prompt": "a"}, {"prompt": None}]), RUN, "data.train")
    with pytest.raises(DataError, match=r"no columns that `raytrl ppo` can train on; found: text; expected: prompt"):
        check_columns(Dataset.from_list([{"text": "a"}]), RUN, "data.train")
    pairs = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert check_columns(pairs, RUN, "data.train") == ("prompt",)


def chat_of(tokenizer: Any, folder: Path, template: str) -> Any:
    tokenizer.save_pretrained(folder)
    chat = load_tokenizer(str(folder), None, False)
    chat.chat_template = template
    return chat


def test_a_reward_model_must_be_able_to_read_every_prompt(tokenizer: Any, tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
    policy, judge = (chat_of(tokenizer, tmp_path / str(i), t) for i, t in enumerate((TEMPLATE, strict)))
    turns = [{"role": "user", "content": "is the film good"}]
    rows = [{"prompt": turns}, {"prompt": [{"role": "system", "content": "be short"}, *turns]}]
    with pytest.raises(DataError, match=r"row 2: the chat template of rm cannot render .* no system turn"):
        found_in(policy, rows, Judge("rm", judge, 64))
    judge.chat_template = None
    with pytest.raises(DataError, match=r"^rm: its tokenizer has no chat template"):
        found_in(policy, rows, Judge("rm", judge, 64))


def test_a_reward_model_reads_cut_prompts_and_must_have_room_for_them(tokenizer: Any) -> None:
    rows = [{"prompt": "film"}, {"prompt": "the film is good " * 20}]
    tight = Judge("rm", tokenizer, 10)
    found = found_in(tokenizer, rows, tight, max_prompt_length=8)
    assert found.longest["rm"] == (8, 2)  # as many as the policy's own: the same tokenizer
    (notice,) = judged(found, [tight], RUN, "data.train")
    assert notice.startswith("data.train: row 2: the prompt has 8 tokens of rm, which takes 10")
    assert judged(found, [Judge("rm", tokenizer, 8 + 48)], RUN, "data.train") == []
    with pytest.raises(DataError, match=r"row 2: the prompt does not fit the reward model rm; found: 8 of its tokens"):
        judged(found, [Judge("rm", tokenizer, 8)], RUN, "data.train")


def test_two_beginning_tokens_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers import processors

    two = chat_of(tokenizer, tmp_path, TEMPLATE)
    two.add_special_tokens({"bos_token": "<s>"})
    two.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", two.bos_token_id)]
    )
    twice = found_in(two, [{"prompt": "film"}, {"prompt": "<s>film"}]).tally("twice")
    assert (twice.rows, twice.first) == (1, 2)


def test_models_that_read_the_policys_tokens_know_them_by_its_ids(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "policy")
    other = train_tokenizer(iter(["quite another text than that of the policy"] * 50), TokenizerSpec(vocab_size=270))
    other.save_pretrained(tmp_path / "other")
    more = load_tokenizer(str(tmp_path / "policy"), None, False)
    more.add_tokens(["<extra>"])
    more.save_pretrained(tmp_path / "more")
    (tmp_path / "none").mkdir()
    model = RUN.model.model_copy(update={"path": str(tmp_path / "policy"), "tokenizer": None})
    run = RUN.model_copy(update={"model": model})
    for same in (None, str(tmp_path / "policy"), str(tmp_path / "more"), str(tmp_path / "none")):
        check_readers(run, {"reference.path": same}, {"reference.path": 400})
    with pytest.raises(
        ConfigError, match=r"^value_model\.init: reads the policy's tokens.*found: id \d+ is .* in .*other"
    ):
        check_readers(run, {"value_model.init": str(tmp_path / "other")}, {})
    with pytest.raises(ConfigError, match=r"^reference\.path: .* no embeddings for; .* 10 embeddings"):
        check_readers(run, {"reference.path": str(tmp_path / "none")}, {"reference.path": 10})
