"""Tokenizers with the chat templates of real models, and what models say in them."""

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils as templates

_SPECIAL = {
    "qwen": ("<|im_end|>", ["<|im_start|>", "<|endoftext|>"], ["<tool_call>", "</tool_call>", "<think>", "</think>"]),
    "llama": ("<|eot_id|>", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"], []),
}
TEMPLATES = {
    "qwen2.5": ("qwen", templates.qwen2_5_chat_template),
    "qwen3": ("qwen", templates.qwen3_chat_template),
    "llama3.1": ("llama", templates.llama3_1_chat_template),
}


def tokenizer(name: str = "qwen2.5", text: str = "") -> PreTrainedTokenizerFast:
    """Bytes and special tokens, and the words of a text."""
    family, template = TEMPLATES[name]
    end, special, added = _SPECIAL[family]
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if text:
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=letters, show_progress=False)
        made.train_from_iterator([text], trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=end,
        pad_token="<|pad|>",
        extra_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )
    found.add_tokens(added)
    found.chat_template = template
    return found


def turn(name: str, content: str, *calls: tuple[str, dict[str, Any]], ended: bool = True) -> str:
    """What a model writes."""
    if TEMPLATES[name][0] == "llama":
        texts = [json.dumps({"name": tool, "parameters": arguments}) for tool, arguments in calls]
    else:
        texts = [
            f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"
            for tool, arguments in calls
        ]
    return content + "\n".join(texts) + (_SPECIAL[TEMPLATES[name][0]][0] if ended else "")


def encoded(chat: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = chat(text, add_special_tokens=False)["input_ids"]
    return ids
