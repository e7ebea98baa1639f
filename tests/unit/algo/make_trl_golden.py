"""Writes trl_golden.json: what TRL 1.12's own PPOTrainer computes in one update of a tiny model, caught as it runs.

TRL has no function for its advantages and losses: they are lines of `PPOTrainer.train`. So the trainer runs as it is,
and its local variables are read where it calls `masked_whiten` (once a batch) and `accelerator.backward` (once a
minibatch; the last one is kept, where ratios and clipping have moved away from 1 and 0).

In an environment with `torch==2.13.0 trl==1.12`:  python make_trl_golden.py
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

VOCABULARY, PAD, EOS, WIDTH = 12, 0, 1, 6
BATCH = ("logprobs", "ref_logprobs", "values", "scores", "kl", "rewards", "sequence_lengths")
MINIBATCH = ("mb_logprobs", "mb_advantage", "mb_return", "mb_values", "new_logprobs", "vpred", "logits", "mb_responses")
RESULTS = ("pg_loss", "vf_loss")
SETTINGS: dict[str, Any] = {
    "kl_coef": 0.1,
    "gamma": 0.99,
    "lam": 0.9,
    "cliprange": 0.1,
    "cliprange_value": 0.05,
    "vf_coef": 0.1,
    "missing_eos_penalty": 1.0,
    "temperature": 0.8,
}


def tiny(kind: Any, seed: int, **more: Any) -> Any:
    torch.manual_seed(seed)
    size = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    config = GPT2Config(vocab_size=VOCABULARY, **size, **special)
    for name, value in more.items():
        setattr(config, name, value)
    return kind(config)


def caught(seed: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The locals of the first batch's and the last minibatch's computation, and the logged metrics."""
    names = {"<pad>": PAD, "<end>": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="<pad>")), pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.padding_side = "left"
    rows = [[2, 3], [4, 5, 6], [7, 8], [9, 10, 11], [3, 9], [6, 2, 4], [5, 7], [8, 10, 2]]
    batch: dict[str, Any] = {}
    minibatch: dict[str, Any] = {}
    logged: dict[str, Any] = {}
    whiten = ppo_trainer.masked_whiten

    def catch_batch(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        here = sys._getframe(1).f_locals
        white = whiten(values, mask, shift_mean)
        batch.update({name: here[name].clone() for name in (*BATCH, "responses", "returns")})
        batch.update(advantages=values.clone(), whitened=white.clone(), ended=here["contain_eos_token"].clone())
        return white

    with tempfile.TemporaryDirectory() as folder:
        set_seed(seed)
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                total_episodes=8,
                per_device_train_batch_size=8,
                num_mini_batches=2,
                num_ppo_epochs=2,
                response_length=WIDTH,
                stop_token="eos",
                learning_rate=3e-3,
                num_sample_generations=0,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                seed=seed,
                **SETTINGS,
            ),
            processing_class=tokenizer,
            model=tiny(GPT2LMHeadModel, 1),
            ref_model=tiny(GPT2LMHeadModel, 2),
            reward_model=tiny(GPT2ForSequenceClassification, 3, num_labels=1),
            value_model=tiny(GPT2ForSequenceClassification, 4, num_labels=1),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
        )
        backward = trainer.accelerator.backward

        def catch_minibatch(loss: torch.Tensor) -> None:
            here = sys._getframe(1).f_locals
            minibatch.update({name: here[name].detach().clone() for name in (*MINIBATCH, *RESULTS)})
            minibatch["lengths"] = here["sequence_lengths"][here["micro_batch_inds"]] + 1
            minibatch["loss"] = loss.detach().clone()
            # TRL takes these after the backward pass, from these very tensors.
            kept = ~here["padding_mask"][here["micro_batch_inds"]]
            kept_p1 = ~here["padding_mask_p1"][here["micro_batch_inds"]]
            minibatch["pg_clipfrac"] = ppo_trainer.masked_mean((here["pg_losses2"] > here["pg_losses"]).float(), kept)
            minibatch["vf_clipfrac"] = ppo_trainer.masked_mean(
                (here["vf_losses2"] > here["vf_losses1"]).float(), kept_p1
            )
            minibatch["approxkl"] = 0.5 * (here["logprobs_diff"].detach() ** 2).mean()
            backward(loss)

        ppo_trainer.masked_whiten = catch_batch
        trainer.accelerator.backward = catch_minibatch
        trainer.log = lambda metrics, *_, **__: logged.update(metrics)
        trainer.train()
        ppo_trainer.masked_whiten = whiten
    return batch, minibatch, logged


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def main() -> None:
    for seed in range(100):
        batch, minibatch, logged = caught(seed)
        # TRL takes the first pad id for the end, sampled or not; and both kinds of end must be there.
        ended = batch["responses"] == EOS
        whole = batch["sequence_lengths"] + 1 == torch.where(ended.any(1), ended.int().argmax(1) + 1, WIDTH)
        if whole.all() and 2 <= int(batch["ended"].sum()) <= 6 and float(minibatch["vf_clipfrac"]) > 0:
            break
    else:
        raise SystemExit("no seed gives the case that is wanted")
    metrics = {key: logged[key] for key in sorted(logged) if key.startswith("objective/")}
    golden = {"settings": SETTINGS, "batch": plain(batch), "minibatch": plain(minibatch), "metrics": metrics}
    Path(__file__).with_name("trl_golden.json").write_text(json.dumps(golden) + "\n")
    print(
        f"seed {seed}, lengths {(batch['sequence_lengths'] + 1).tolist()}, clipped {float(minibatch['pg_clipfrac']):.2f}"
    )


if __name__ == "__main__":
    main()
