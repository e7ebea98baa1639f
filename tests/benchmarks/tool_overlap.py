"""Conversations whose tools take 0, 10 and 500 ms: how long the engine idles, and TRL's GRPOTrainer with the same tools.

    python -m tests.benchmarks.tool_overlap [ROUNDS]

One model that calls `wait` of tests/user_tools.py once or twice, then answers; 4 prompts, 8 responses each. raytrl:
transformers and vLLM in this process. TRL: `GRPOTrainer._generate` with `tools=[wait]`, transformers, in this process, too;
alternating. Prints seconds of a batch of 32 conversations, their number a second, and the share of the time in which the
engine computes nothing.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from raytrl.config.sections.rollout import RolloutSection
from raytrl.records.samples import Prompt
from raytrl.roles.environment.tools import Tools
from raytrl.roles.models.adapters import policy_parameters
from raytrl.roles.models.chat import Chat
from raytrl.roles.models.tokenizer import load_tokenizer
from raytrl.roles.rollout.engines import engine_class
from raytrl.roles.rollout.episodes import Episodes
from raytrl.roles.weights.buckets import Weights
from tests import user_tools
from tests.conversation_files import QUESTION, TOOLS, make_caller

DELAYS_S = (0.0, 0.01, 0.5)
PROMPTS, SAMPLES, BUDGET, ROUNDS = 4, 8, 300, 3
Timed = tuple[float, float]  # seconds of a batch, and of them those in which the engine computed


def ours(path: str, name: str) -> tuple[Callable[[], Timed], Callable[[], None]]:
    """What samples a batch, and what ends it."""
    rollout = RolloutSection(
        engine=name,  # type: ignore[arg-type]
        tools=[f"{TOOLS}:wait"],
        max_prompt_length=2000,
        sampling={"max_new_tokens": BUDGET},
    )
    engine = engine_class(name).from_pretrained(path, path, rollout, seed=0)
    tools = Tools(rollout)
    chat = Chat(load_tokenizer(path, None, False), engine.turn_end_ids, 1024)
    engine.conversations = Episodes(tools, chat, rollout, 0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine.load_weights(Weights.of(0, policy_parameters(model).items(), torch.float32))
    busy = [0.0]
    owner: Any = engine if name == "transformers" else engine._batch  # type: ignore[union-attr]
    attribute = "submit" if name == "transformers" else "_step"
    computed = getattr(owner, attribute)

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return computed(*arguments)
        finally:
            busy[0] += time.perf_counter() - began

    setattr(owner, attribute, timed)
    steps = iter(range(1000))

    def batch() -> Timed:
        step, began, before = next(steps), time.perf_counter(), busy[0]
        prompts = [Prompt(step, row, QUESTION, (), {"prompt": QUESTION}) for row in range(PROMPTS)]
        found = engine.generate(prompts, 0, samples=SAMPLES)
        assert sum(response.episode.calls for response in found if response.episode) > len(found) / 2
        return time.perf_counter() - began, busy[0] - before

    def close() -> None:
        tools.close()
        engine.close()

    return batch, close


def theirs(path: str, folder: Path) -> Callable[[], Timed]:
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_completion_length=BUDGET,
        num_generations=SAMPLES,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": QUESTION}] * PROMPTS),
        processing_class=load_tokenizer(path, None, False),
        tools=[user_tools.wait],
    )
    busy = [0.0]
    computed = trainer._generate_single_turn

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = computed(*arguments, **options)
        busy[0] += time.perf_counter() - began
        return found

    trainer._generate_single_turn = timed
    trainer._sync_tool_dicts = [{}] * (PROMPTS * SAMPLES)
    trainer._async_tool_dicts = [{"wait": user_tools.wait}] * (PROMPTS * SAMPLES)

    def batch() -> Timed:
        began, before = time.perf_counter(), busy[0]
        trainer._generate([QUESTION] * (PROMPTS * SAMPLES))
        return time.perf_counter() - began, busy[0] - before

    return batch


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for delay in DELAYS_S:
            path = make_caller(folder / str(delay), call=("wait", {"seconds": delay}), environment=None, tools=["wait"])
            vllm, close_vllm = ours(path, "vllm")
            transformers, close = ours(path, "transformers")
            who = {"vllm": vllm, "transformers": transformers, "TRL": theirs(path, folder)}
            times: dict[str, list[Timed]] = {name: [] for name in who}
            for number in range(rounds + 1):
                for name, batch in who.items():
                    found = batch()
                    if number:  # the first warms up
                        times[name].append(found)
            close()
            close_vllm()
            for name, found in times.items():
                seconds = statistics.median(whole for whole, _ in found)
                idle = statistics.median(1 - busy / whole for whole, busy in found)
                rate = PROMPTS * SAMPLES / seconds
                print(
                    f"{delay * 1000:.0f} ms  {name:12s} {seconds:.2f} s a batch, {rate:.1f} a second, idle {idle:.0%}"
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
