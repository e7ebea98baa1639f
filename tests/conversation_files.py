"""A small model that calls tools, made by learning two conversations by heart, and run files for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.chats import encoded, tokenizer, turn
from tests.ppo_files import ppo_file
from tests.runs import write_rows

TOOLS = str(Path(__file__).parent / "user_tools.py")
QUESTION = [{"role": "user", "content": "Go."}]
STEPS = 150


def make_caller(
    folder: Path,
    name: str = "qwen2.5",
    call: tuple[str, dict[str, Any]] = ("increment", {"step": 2}),
    *,
    environment: str | None = "Counter",
    tools: Sequence[str] = ("multiply",),
) -> str:
    """Writes a policy that calls a tool of `user_tools.py`, and then says something, more often than not.

    Args:
        environment, tools: those that its prompts tell it of.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from raytrl.config.sections.rollout import RolloutSection
    from raytrl.roles.environment.tools import Tools
    from raytrl.roles.models.chat import Chat

    place = None if environment is None else f"{TOOLS}:{environment}"
    known = Tools(RolloutSection(environment=place, tools=[f"{TOOLS}:{tool}" for tool in tools]))
    (kind,) = known.toolbox.kinds.values()
    known.close()
    letters = tokenizer(name)
    chat = tokenizer(name, letters.apply_chat_template(QUESTION, tools=list(kind.tools), tokenize=False))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=chat.eos_token_id,
        pad_token_id=chat.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    said = Chat(chat, [chat.eos_token_id], 1024)
    begin = said.prompt(QUESTION, kind.tools, None if environment is None else " Begin at 0.")
    answers = (["2"], ["2", "4"]) if call[0] != "wait" else (["waited"], ["waited", "waited"])
    rows = [_row(said, chat, name, begin, call, results) for results in answers]
    width = max(len(ids) for ids, _ in rows)
    rows = [(ids + [0] * (width - len(ids)), labels + [-100] * (width - len(labels))) for ids, labels in rows]
    input_ids, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / f"caller-{name}")
    chat.save_pretrained(folder / f"caller-{name}")
    return str(folder / f"caller-{name}")


def _row(
    said: Any, chat: Any, name: str, begin: list[int], call: tuple[str, dict[str, Any]], results: list[str]
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and what is to be learned of it."""
    ids, labels = list(begin), [-100] * len(begin)
    for result in results:
        asked = encoded(chat, turn(name, "", call))
        suffix = said.suffix([{"role": "tool", "name": call[0], "content": result}])
        ids += asked + suffix
        labels += asked + [-100] * len(suffix)
    last = encoded(chat, turn(name, f"At {results[-1]}."))
    return ids + last, labels + last


def write_prompts(folder: Path, count: int = 12) -> str:
    place = folder / "questions.jsonl"
    write_rows(place, [{"prompt": QUESTION, "target": row % 4} for row in range(count)])
    return str(place)


def conversation_file(folder: Path, name: str, model: str, **sections: Any) -> str:
    """A run file of `ppo_file` whose responses are conversations, scored by their environment alone."""
    rollout = {
        "environment": f"{TOOLS}:Counter",
        "tools": [f"{TOOLS}:multiply"],
        "max_turns": 3,
        "chunk_prompts": 2,
        "max_prompt_length": 2000,
        "sampling": {"max_new_tokens": 400},
        **sections.pop("rollout", {}),
    }
    return ppo_file(
        folder,
        name,
        model={"path": model},
        data={"train": str(folder / "questions.jsonl"), **sections.pop("data", {})},
        rollout=rollout,
        reward={"sources": [], **sections.pop("reward", {})},
        **sections,
    )
