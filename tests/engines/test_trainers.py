"""Every dataset format and kind through TRL's real trainers, in this process; what is stored loads with transformers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from raytrl.errors import DataError, NonFiniteError
from raytrl.roles.models.finite import not_finite
from tests.plain import forget_engines, train_alone
from tests.runs import pair_rows, run_file, sentence, text_rows, weights_hash, write_rows

MARKERS = ["<|user|>", "<|assistant|>"]
CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(autouse=True)
def _one_training_after_another() -> Any:
    yield
    forget_engines()


def chat_rows(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {"messages": [{"role": "user", "content": sentence(rng)}, {"role": "assistant", "content": sentence(rng)}]}
        for _ in range(count)
    ]


def one_worker(tmp_path: Path, rows: list[dict[str, Any]], name: str = "run", **sections: Any) -> str:
    write_rows(tmp_path / "train.jsonl", rows)
    sections.setdefault("checkpoint", {"every": 100})
    return run_file(tmp_path, name, learner={"workers": 1}, **sections)


def chat_file(tmp_path: Path, name: str, **training: Any) -> str:
    (tmp_path / "chat.jinja").write_text(CHAT)
    model = {"tokenizer": {"vocab_size": 300, "special_tokens": MARKERS}}
    training = {"max_steps": 4, "max_length": 64, "chat_template_path": str(tmp_path / "chat.jinja")} | training
    return one_worker(tmp_path, chat_rows(16), name, model=model, training=training)


def test_text_makes_a_model_that_loads_and_generates(tmp_path: Path) -> None:
    context, run = train_alone(one_worker(tmp_path, text_rows(32)))
    assert len(context.losses) == 8
    assert context.losses[-1] < context.losses[0] - 0.1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    inputs = tokenizer("the film", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    card = (run / "model/README.md").read_text()
    assert "supervised fine-tuning" in card
    assert "learning_rate: 0.01" in card


def test_prompt_completion_trains_on_completions_only(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"prompt": sentence(rng) * 3, "completion": " good"} for _ in range(16)]
    only, _ = train_alone(one_worker(tmp_path, rows, training={"max_steps": 2, "max_length": 100}))
    forget_engines()
    both, _ = train_alone(
        one_worker(tmp_path, rows, "both", training={"max_steps": 2, "max_length": 100, "completion_only_loss": False})
    )
    assert abs(only.losses[0] - both.losses[0]) > 1e-3


def test_conversations_and_assistant_only_loss(tmp_path: Path) -> None:
    every, run = train_alone(chat_file(tmp_path, "every"))
    template = AutoTokenizer.from_pretrained(run / "model").chat_template
    assert template == CHAT
    forget_engines()
    only, _ = train_alone(chat_file(tmp_path, "only", assistant_only_loss=True))
    assert abs(only.losses[0] - every.losses[0]) > 1e-3


def test_packing_takes_fewer_steps(tmp_path: Path) -> None:
    training = {"max_steps": -1, "num_train_epochs": 1, "max_length": 64}
    plain, _ = train_alone(one_worker(tmp_path, text_rows(64), training=training))
    forget_engines()
    packed, _ = train_alone(one_worker(tmp_path, text_rows(64), "packed", training=training | {"packing": True}))
    assert len(packed.losses) < len(plain.losses)


def test_reward_model_scores_chosen_above_rejected(tmp_path: Path) -> None:
    write_rows(tmp_path / "held-out.jsonl", pair_rows(16, seed=1))
    file = one_worker(
        tmp_path,
        pair_rows(64),
        kind="reward",
        data={"eval": str(tmp_path / "held-out.jsonl")},
        training={"max_steps": 20, "learning_rate": 1e-2},
    )
    context, run = train_alone(file)
    assert context.events[-1].text == "saving model"
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = [
        "the plot is true . the film is good ." + tokenizer.eos_token,
        "the plot is true . the film is bad ." + tokenizer.eos_token,
    ]
    with torch.no_grad():
        good, bad = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
    assert good > bad


def test_reward_model_of_a_base_without_padding_token(tmp_path: Path) -> None:
    """GPT-2 pads with its end token; `model.pad_token` gives it one of its own, and the embeddings grow by it."""
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    _, base = train_alone(
        one_worker(tmp_path, pair_rows(8), "base", kind="reward", model={"config": config}, training={"max_steps": 1})
    )
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base / "model")
    forget_engines()
    size = len(tokenizer)
    model = {"config": None, "tokenizer": None, "path": str(base / "model"), "pad_token": "<|fill|>"}
    _, run = train_alone(
        one_worker(tmp_path, pair_rows(8), "padded", kind="reward", model=model, training={"max_steps": 1})
    )
    made = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert AutoTokenizer.from_pretrained(run / "model").pad_token == "<|fill|>"
    assert made.config.pad_token_id == size
    assert made.get_input_embeddings().num_embeddings == size + 1


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_dpo_prefers_the_chosen(tmp_path: Path, lora: Any) -> None:
    training = {"max_steps": 10, "learning_rate": 5e-3, "beta": 0.5}
    context, run = train_alone(one_worker(tmp_path, pair_rows(32), kind="dpo", lora=lora, training=training))
    assert context.losses[0] == pytest.approx(0.6931, abs=1e-3)  # policy equals reference before the first update
    assert context.losses[-1] < 0.5
    assert (run / "model/merged/model.safetensors").exists() == (lora is not None)


def test_adapter_and_merged_model_agree(tmp_path: Path) -> None:
    from peft import PeftModel

    _, run = train_alone(one_worker(tmp_path, text_rows(32), lora=LORA))
    settings = json.loads((run / "model/adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(run / "model/merged")
    inputs = tokenizer("the film is", return_tensors="pt")
    with torch.no_grad():
        before = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, run / "model")(**inputs).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "model/merged")(**inputs).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert (before - merged).abs().max() > 1e-2


@pytest.mark.parametrize("sections", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_cut_off_and_resumed_ends_with_equal_weights(tmp_path: Path, sections: dict[str, Any]) -> None:
    model = {
        "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    }  # has dropout
    sections = {"model": model, "checkpoint": {"every": 3}, **sections}
    _, whole = train_alone(one_worker(tmp_path, text_rows(40), "whole", **sections))
    forget_engines()
    file = one_worker(tmp_path, text_rows(40), "cut", **sections)
    first, cut = train_alone(file, die_after=3)
    assert not (cut / "model").exists()
    forget_engines()
    second, _ = train_alone(file)
    assert len(first.losses) == 3
    assert len(second.losses) == 5
    assert weights_hash(cut / "model") == weights_hash(whole / "model")


@pytest.mark.parametrize("rows", [32, 40], ids=["end of an epoch", "within an epoch"])
def test_killed_between_the_last_checkpoint_and_the_model(tmp_path: Path, rows: int) -> None:
    settings: dict[str, Any] = {"checkpoint": {"every": 4}, "training": {"lr_scheduler_type": "constant"}}
    _, whole = train_alone(one_worker(tmp_path, text_rows(rows), "whole", **settings))
    forget_engines()
    file = one_worker(tmp_path, text_rows(rows), **settings)
    first, _ = train_alone(file, die_after=8)
    forget_engines()
    again, run = train_alone(file)
    assert len(first.losses) == 8
    assert again.losses == []
    assert weights_hash(run / "model") == weights_hash(whole / "model")


def test_steps_that_are_not_logged_are_work(tmp_path: Path) -> None:
    """So that the driver does not take the run for stalled: steps, parts of them, and batches of an evaluation."""
    training = {"max_steps": 3, "logging_steps": 50, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4}
    write_rows(tmp_path / "eval.jsonl", text_rows(8))
    file = one_worker(tmp_path, text_rows(32), training=training, data={"eval": str(tmp_path / "eval.jsonl")})
    context, _ = train_alone(file)
    assert not context.losses
    # 3 steps of 2 parts, 2 batches at the end; and two whole calls: preparing and saving
    assert context.beats == 3 * 2 + 2 + 2


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step \d+: the loss or its gradient is not finite"):
        train_alone(one_worker(tmp_path, text_rows(32), training={"learning_rate": 1e30, "max_grad_norm": 0.0}))


def test_weights_that_are_not_finite_are_never_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is logged before the last step; the good checkpoint is of the step before the first bad weight."""
    adam = torch.optim.AdamW.step

    def step(self: Any, *arguments: Any, **more: Any) -> Any:
        loss = adam(self, *arguments, **more)
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken == 3:
            self.param_groups[0]["params"][1].data.flatten()[5] = float("nan")
        return loss

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    training = {"logging_steps": 8, "max_steps": 8, "max_grad_norm": 0.0}
    file = one_worker(tmp_path, text_rows(32), training=training, checkpoint={"every": 2})
    with pytest.raises(
        NonFiniteError, match=r"^step 4: not finite: model\..*weight.* and \d+ more; the checkpoint before"
    ):
        train_alone(file)
    (kept,) = (tmp_path / "runs/run/plain-checkpoints").iterdir()
    assert all(value.isfinite().all() for value in load_file(kept / "model.safetensors").values())


def test_an_optimizer_whose_state_is_not_finite_is_never_a_checkpoint() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not_finite(model, optimizer) == []
    optimizer.state[model.bias]["exp_avg"][1] = float("inf")
    assert not_finite(model, optimizer) == ["the optimizer's state"]
    model.weight.data[0, 1] = float("-inf")
    assert not_finite(model, optimizer) == ["weight", "the optimizer's state"]


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "training.learning_rate=1e-3",
        "training.max_length=8",
        "training.per_device_train_batch_size=2",
        "model.config.hidden_size=16",
        "model.tokenizer.vocab_size=280",
    ],
)
def test_options_change_the_result(tmp_path: Path, override: str) -> None:
    file = one_worker(tmp_path, text_rows(32), training={"max_steps": 2})
    _, run = train_alone(file)
    before = weights_hash(run / "model")
    forget_engines()
    _, changed = train_alone(file, override, "name=changed")
    assert weights_hash(changed / "model") != before


def test_rows_that_trl_leaves_out_are_told(tmp_path: Path) -> None:
    long = [{**row, "chosen": row["chosen"] * 40} for row in pair_rows(4, seed=2)]
    training = {"max_steps": 1, "max_length": 64}
    context, _ = train_alone(one_worker(tmp_path, pair_rows(16) + long, kind="reward", training=training))
    notices = [event.text for event in context.events if event.kind == "notice"]
    assert notices == ["data.train: 4 of 20 rows are left out: longer than training.max_length 64 allows"]
    with pytest.raises(DataError, match=r"data.train: all 4 rows are longer than training.max_length 64 allows"):
        train_alone(one_worker(tmp_path, long, "nothing", kind="reward", training=training))


@pytest.mark.parametrize(("kind", "learning_rate"), [("sft", 1e-5), ("sft", 1e-6), ("dpo", 1e-6), ("reward", 1e-5)])
def test_as_many_weights_move_in_bfloat16_as_in_float32(tmp_path: Path, kind: str, learning_rate: float) -> None:
    """On a processor without bfloat16 torch emulates it."""
    rows = text_rows(16) if kind == "sft" else pair_rows(16)
    training = {"max_steps": 3, "max_length": 64, "learning_rate": learning_rate, "lr_scheduler_type": "constant"}
    shares, losses = [], []
    for dtype in ("float32", "bfloat16"):
        file = one_worker(tmp_path, rows, dtype, kind=kind, training=training)
        context, run = train_alone(file, f"model.dtype={dtype}")
        forget_engines()
        before, after = (load_file(folder / "model.safetensors") for folder in (run / "base", run / "model"))
        moved = sum(int((before[name].float() != after[name].float()).sum()) for name in after)
        shares.append(moved / sum(value.numel() for value in after.values()))
        losses.append(context.losses)
    assert shares[0] > 0.3
    assert shares[1] == pytest.approx(shares[0], abs=0.05), shares
    assert losses[0] != losses[1]  # it did compute in bfloat16
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
