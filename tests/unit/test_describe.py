"""What each key of a run file means, looked up by its dotted name."""

import pytest

from raytrl.config.describe import meaning
from raytrl.config.kinds import RUNS, forms_of
from raytrl.config.load import flatten
from raytrl.config.runs.base import Run


@pytest.mark.parametrize(
    ("kind", "key", "words"),
    [
        ("sft", "kind", "TRL's SFTTrainer"),
        ("dpo", "kind", "TRL's DPOTrainer"),
        ("sft", "model", "network to train"),
        ("ppo", "ppo.clip_range", "clipped to 1 ± this"),
        ("ppo", "ppo.kl.target", "nats a response"),
        ("ppo", "eval.every", "between two evaluations"),  # of a section that may be off
        ("eval", "data.eval.path", "builder"),
        ("sft", "data.train.path", "builder"),
        ("sft", "model.tokenizer.vocab_size", "special tokens included"),  # of one choice of several
        ("ppo", "reward.sources.0.weight", "in the sum of all"),
        ("ppo", "reward.sources.12.label", "which output is the score"),
        ("tune", "limit_patience", "in a row"),
        # What another library means by its keys, its help says.
        ("sft", "training.learning_rate", "AdamW"),
        ("sft", "lora.r", "attention dimension"),
        # A part of a value is told with the value.
        ("ppo", "learner.resources.CPU", "each process takes"),
        ("ppo", "reward.resources.CPU", "Amounts may be 0"),
        ("sft", "learner.deepspeed.zero_optimization.stage", "DeepSpeed JSON file"),
        ("sft", "data.train.sep", "rows to train on"),
        ("ppo", "reward.sources.0", "What scores a response"),
        ("sft", "lora.target_modules.0", "replace with LoRA"),
        ("tune", "search.ppo.kl.coef.grid", "distribution"),
        ("tune", "scheduler.grace_period", "stops bad trials"),
    ],
)
def test_the_meaning_of_a_key(kind: str, key: str, words: str) -> None:
    assert words in meaning(RUNS[kind], key)


@pytest.mark.parametrize(
    ("kind", "key"), [("sft", "rollout.actors"), ("sft", "nothing"), ("ppo", "training.max_steps")]
)
def test_what_a_kind_does_not_have_means_nothing(kind: str, key: str) -> None:
    assert meaning(RUNS[kind], key) == ""


def test_a_meaning_is_one_line() -> None:
    assert "\n" not in meaning(RUNS["ppo"], "rollout.weight_transfer")
    assert "~20% slower" in meaning(RUNS["sft"], "training.gradient_checkpointing")  # %% in TRL's source


@pytest.mark.parametrize("run", [run for kind in RUNS for run in forms_of(kind)])
def test_every_default_has_a_meaning(run: type[Run]) -> None:
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in run.model_fields.items()
        if not field.is_required()
    }
    values = {name: value.model_dump() if hasattr(value, "model_dump") else value for name, value in defaults.items()}
    assert [key for key, _ in flatten(values) if not meaning(run, key)] == []
