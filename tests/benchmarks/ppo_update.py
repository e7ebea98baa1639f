"""A PPO learner's update against the bare passes in it: forward and backward of both models on the same packed tokens.

    python -m tests.benchmarks.ppo_update SIZE DTYPE [ROUNDS]

SIZE 1m or 6m, DTYPE float32 or bfloat16. Alternates both in one process, with two threads. The bare passes have no
losses of PPO's, no metrics, no clipping and no optimizer; what all that costs is the rest. Prints seconds a round and
the bare passes' share of the update, the median of all rounds.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytrl.config.sections.ppo import PpoSection
from raytrl.loop.protocols import Rollout
from raytrl.records.samples import Prompt, Response, Score
from raytrl.roles.learner.build import build_backend, build_networks
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.learner.sequences import Sequences
from raytrl.roles.learner.unpadded import inputs, predicting
from tests.benchmarks.ppo_workload import EOS, VOCABULARY, WORKLOAD, make


class Recorded(PpoLearner):
    """Keeps the micro-batches of its updates."""

    batches: list[Sequences]

    def _microbatches(self, sequences: Sequences, rows: Any) -> Iterator[tuple[Tensor | None, Sequences]]:
        for rows_B, batch in super()._microbatches(sequences, rows):
            self.batches.append(batch)
            yield rows_B, batch


def rollout(step: int, samples: int = 1) -> Rollout:
    """Prompts and responses of random words, as long as the workload's; `samples` responses to each prompt."""
    draw = random.Random(step)

    def words(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCABULARY) for _ in range(count))

    prompts, responses, scores = [], [], []
    for row in range(WORKLOAD["batch_size"] // samples):
        prompts.append(Prompt(step, row, "", words(draw.randint(8, 24))))
        for sample in range(samples):
            tokens = (*words(draw.randint(1, WORKLOAD["max_new_tokens"] - 1)), EOS)
            logprobs = (-6.0,) * len(tokens)
            responses.append(Response(step, row, sample, tokens, "", True, logprobs, step))
            scores.append(Score(step, row, sample, draw.random(), {}))
    return Rollout(prompts, responses, scores)


def hidden(model: Any, given: dict[str, Any]) -> Tensor:
    found: Tensor = getattr(model, model.base_model_prefix)(**given).last_hidden_state[0]
    return found


def bare(networks: Any, batches: list[Sequences]) -> None:
    for batch in batches:
        given, at = inputs(batch), predicting(batch)
        logits = networks.policy.get_output_embeddings()(hidden(networks.policy, given)[at])
        logprobs = torch.log_softmax(logits.float(), -1)
        tokens = batch.input_ids_BT[:, batch.prompt_width :][batch.response_mask_BR]
        values = networks.value.score(hidden(networks.value, given)[at].float())
        (logprobs.gather(-1, tokens.unsqueeze(-1)).sum() + values.sum()).backward()


def main(size: str, dtype: str, rounds: int) -> None:
    torch.set_num_threads(2)
    half = dtype == "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), size, ends=False)
        networks = build_networks(f"{folder}/policy", dtype=torch.bfloat16 if half else torch.float32)
    keys = ("batch_size", "epochs", "minibatches", "learning_rate")
    ppo = PpoSection(steps=rounds + 1, **{key: WORKLOAD[key] for key in keys})
    learner = Recorded(build_backend(networks, ppo), ppo, temperature=1.0, seed=0)
    shares = []
    for step in range(rounds + 1):
        learner.batches = []
        experience = learner.experience(rollout(step))
        began = time.perf_counter()
        learner.update(experience)
        update_s = time.perf_counter() - began
        began = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half, cache_enabled=False):
            bare(networks, learner.batches)
        bare_s = time.perf_counter() - began
        for parameter in networks.parameters():
            parameter.grad = None
        tokens = sum(int(batch.attention_mask_BT.sum()) for batch in learner.batches)
        if step:  # the first is for warming up
            shares.append(bare_s / update_s)
            print(
                f"update {update_s:.2f} s, bare passes {bare_s:.2f} s, {tokens} tokens in {len(learner.batches)} passes"
            )
    print(f"{size} {dtype}: bare passes are {statistics.median(shares):.2f} of an update")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 5)
