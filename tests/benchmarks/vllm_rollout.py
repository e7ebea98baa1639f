"""vLLM in rollout actors against vLLM alone and against transformers: tokens a second, idle share, weight updates.

    python -m tests.benchmarks.vllm_rollout bare|actors|transformers|update|kill [--params 5|300] [--actors N] ...

One thread a process. Every line printed is a measurement; run them one after the other on a quiet machine.
"""

import argparse
import functools
import hashlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from raytrl.config.sections.rollout import RolloutSection
from raytrl.launch.session.session import prepare_environment
from raytrl.records.samples import Attempt, Prompt
from raytrl.roles.models.adapters import add_policy_adapter, policy_parameters
from raytrl.roles.weights.buckets import Weights
from tests.ppo_files import make_policy

LAYERWISE = "RAYTRL_BENCHMARK_LAYERWISE"
SHAPES = {
    5: {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4},
    300: {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20},
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def say(**found: Any) -> None:
    print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in found.items()}), flush=True)


def make_model(folder: Path, params: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(make_policy(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        num_attention_heads=8,
        num_key_value_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        **SHAPES[params],
    )
    model = LlamaForCausalLM(config)
    say(parameters=sum(p.numel() for p in model.parameters()))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def some_prompts(rows: int, step: int = 0) -> list[Prompt]:
    draw = torch.Generator().manual_seed(step)
    ids = [tuple(torch.randint(4, 290, (4 + row % 13,), generator=draw).tolist()) for row in range(rows)]
    return [Prompt(step=step, row=row, text="", token_ids=ids[row]) for row in range(rows)]


def rollout_config(options: argparse.Namespace, engine: str) -> RolloutSection:
    return RolloutSection(
        engine=engine,
        max_prompt_length=32,
        sampling={
            "max_new_tokens": options.tokens,
            "stop": list("abcdefghijklmnopqrstuvwxyz") if options.uneven else None,
        },
        actors=options.actors,
        engine_args={"max_num_seqs": options.sequences} if engine == "vllm" else {},
        weight_transfer=options.transfer,
    )


def bare(path: str, options: argparse.Namespace) -> None:
    """`vllm.LLM.generate`, as vLLM's own documentation uses it, with a seed and log-probs for each response."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        path,
        dtype="float32",
        enforce_eager=True,
        distributed_executor_backend="uni",
        max_num_seqs=options.sequences,
        max_model_len=33 + options.tokens,
        kv_cache_memory_bytes=2**30,
        logprobs_mode="processed_logprobs",
    )
    for step in range(options.steps):
        prompts = [{"prompt_token_ids": list(p.token_ids)} for p in some_prompts(options.rows, step)]
        params = [
            SamplingParams(max_tokens=options.tokens, seed=row, logprobs=0, detokenize=False)
            for row in range(options.rows)
        ]
        began = time.perf_counter()
        made = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        tokens = sum(len(output.outputs[0].token_ids) for output in made)
        say(what="bare vllm", tokens=tokens, seconds=seconds, tokens_per_s=tokens / seconds)


class Timed:
    """A rollout engine that notes when it has work: [begin, end] of every time that any call was in it."""

    def __init__(self, make: Any) -> None:
        self._engine = make()
        self._lock, self._inside, self._since = threading.Lock(), 0, 0.0
        self.busy_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *arguments: Any, **named: Any) -> Any:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._since = time.perf_counter()
        try:
            return self._engine.generate(*arguments, **named)
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self.busy_s += time.perf_counter() - self._since

    def doing(self) -> float:
        return self.busy_s


def make_timed(path: str, rollout: RolloutSection, lora: Any) -> Any:
    from raytrl.roles.rollout.engines import engine_class

    if LAYERWISE in os.environ:
        from raytrl.roles.rollout.vllm import worker

        worker._keeps_more = lambda model: "as asked for"
    return Timed(
        lambda: engine_class(rollout.engine).from_pretrained(path, path, rollout, seed=0, lora=lora)  # type: ignore[arg-type]
    )


class OnlyWorker:
    """What `WeightSender` asks of a learner worker's context."""

    rank, world_size = 0, 1

    def progress(self, event: Any) -> None:
        say(notice=event.text)


@contextmanager
def pool_of(path: str, rollout: RolloutSection, lora: Any) -> Iterator[tuple[Any, list[Any]]]:
    """A `PoolGenerator` on real Ray actors, as the only learner worker has it."""
    prepare_environment()
    import ray

    from raytrl.launch.actors.calls import RayCalls
    from raytrl.launch.actors.generator import PoolGenerator, requests_in_flight
    from raytrl.launch.actors.pool import Pool
    from raytrl.launch.actors.rollout import RolloutActor
    from raytrl.launch.actors.send_weights import WeightSender
    from raytrl.launch.actors.shelf import Shelf
    from raytrl.launch.actors.start import _make
    from raytrl.launch.session.gauges import RoleGauges

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=3 * 2**30)
    group = ray.util.placement_group([{"CPU": 1}] * rollout.actors)
    ray.get(group.ready())

    class Actor(RolloutActor):
        def busy_s(self) -> float:
            assert isinstance(self._engine, Timed)
            return self._engine.busy_s

        def pid(self) -> int:
            return os.getpid()

    threads = 128 if rollout.engine == "vllm" else 1
    make = functools.partial(make_timed, path, rollout, lora)
    actors = [_make(group, i, Actor, {"CPU": 1}, make, threads) for i in range(rollout.actors)]
    pool = Pool(
        RayCalls(actors, RoleGauges("benchmark", "rollout").part()),
        "rollout actors",
        "benchmark",
        300.0,
        window=requests_in_flight(rollout, 1),
    )
    try:
        by_broadcast = rollout.weight_transfer == "broadcast"
        worker: Any = OnlyWorker()
        shelf = ray.remote(num_cpus=0)(Shelf).remote()
        share = WeightSender(worker, torch.device("cpu"), broadcasts=by_broadcast, shelf=shelf)
        yield PoolGenerator([pool], rollout, samples=1, attempt=Attempt("run", 1), send_weights=share), actors
    finally:
        ray.shutdown()


def learner_model(path: str, lora: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return add_policy_adapter(model, LORA) if lora else model


def actors(path: str, options: argparse.Namespace, engine: str) -> None:
    """Prompts sent to actors and responses back, everything included; idle: of the engines, while prompts are out."""
    import ray

    rollout = rollout_config(options, engine)
    with pool_of(path, rollout, None) as (pool, handles):
        weights = Weights.of(0, policy_parameters(learner_model(path, False)).items(), torch.float32)
        pool.load_weights(weights)
        busy = ray.get([handle.busy_s.remote() for handle in handles])
        for step in range(options.steps):
            began = time.perf_counter()
            first = None
            responses = []
            for chunk in pool.generate(some_prompts(options.rows, step), 0, greedy=False):
                first = first or time.perf_counter() - began
                responses += chunk
            seconds = time.perf_counter() - began
            after = ray.get([handle.busy_s.remote() for handle in handles])
            idle = [1 - (b - a) / seconds for a, b in zip(busy, after, strict=True)]
            busy = after
            lengths = sorted(len(r.token_ids) for r in responses)
            say(
                what=f"{engine}, {options.actors} actors",
                tokens=sum(lengths),
                seconds=seconds,
                tokens_per_s=sum(lengths) / seconds,
                first_chunk_s=first,
                idle_share=[round(share, 3) for share in idle],
                lengths=[lengths[0], lengths[len(lengths) // 2], lengths[-1]],
            )


def update(path: str, options: argparse.Namespace) -> None:
    """New weights from a learner's model into every engine, proven; against plain copies of the same tensors.

    `of_clone`: speed over that of copies into new memory (`Tensor.clone`), `of_copy`: into memory that was used before.
    With LoRA the adapter travels and is merged into the model's weights, of which the engine needs new packed ones: there
    the copies are of these, `model_bytes`. The first few updates are slower (no `warm`): the object store's memory is new.
    """
    rollout = rollout_config(options, "vllm")
    with pool_of(path, rollout, LORA if options.lora else None) as (pool, _):
        tensors = policy_parameters(learner_model(path, options.lora))
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        base = dict(learner_model(path, False).named_parameters())
        changed = {name: value for name, value in base.items() if ".layers." in name} if options.lora else tensors
        whole = sum(t.numel() * t.element_size() for t in changed.values())
        again = {name: tensor.detach().clone() for name, tensor in changed.items()}
        for version in range(options.steps + 1):
            with torch.no_grad():
                for tensor in tensors.values():
                    tensor += 1e-3
            began = time.perf_counter()
            copied = {name: tensor.detach().clone() for name, tensor in changed.items()}
            clone_s = time.perf_counter() - began
            del copied
            began = time.perf_counter()
            with torch.no_grad():
                for name, tensor in changed.items():
                    again[name].copy_(tensor)
            copy_s = time.perf_counter() - began
            began = time.perf_counter()
            pool.load_weights(Weights.of(version, tensors.items(), torch.float32))
            seconds = time.perf_counter() - began
            if version:
                say(
                    what=f"update by {options.transfer}, {'lora' if options.lora else 'full'}, {options.actors} actors",
                    warm=version > 4,
                    bytes=size,
                    model_bytes=whole,
                    seconds=seconds,
                    gb_per_s=whole / seconds / 1e9,
                    clone_gb_per_s=whole / clone_s / 1e9,
                    copy_gb_per_s=whole / copy_s / 1e9,
                    of_clone=clone_s / seconds,
                    of_copy=copy_s / seconds,
                )


def kill(path: str, options: argparse.Namespace) -> None:
    """An engine killed in the middle of a step, and of an update: nothing is lost, and the responses are those of an
    undisturbed step."""
    import ray

    rollout = rollout_config(options, "vllm")
    prompts = some_prompts(options.rows)
    with pool_of(path, rollout, None) as (pool, handles):
        model = learner_model(path, False)
        for death in ("none", "none", "in mid-generation", "in mid-update", "none"):
            version = 0 if pool._version is None else pool._version + 1
            if death == "in mid-update":
                with torch.no_grad():
                    for tensor in model.parameters():
                        tensor += 1e-2 * tensor.roll(1)
            weights = Weights.of(version, policy_parameters(model).items(), torch.float32)
            victim = ray.get(handles[0].pid.remote())
            share, buckets = pool._send_weights, len(list(weights.buckets))
            if death == "in mid-update":

                def halfway(sent: Weights, receivers: Any, victim: int = victim, half: int = buckets // 2) -> Any:
                    def told(method: str, of: int, number: int, bucket: Any) -> None:
                        receivers.tell(method, of, number, bucket)
                        if number == half:
                            os.kill(victim, signal.SIGKILL)

                    return share(sent, replace(receivers, tell=told))  # noqa: B023 (of this round)

                pool._send_weights = halfway
            began = time.perf_counter()
            pool.load_weights(weights)
            update_s, up, pool._send_weights = time.perf_counter() - began, pool.num_up, share
            began = time.perf_counter()
            chunks = pool.generate(prompts, version, greedy=False)
            if death == "in mid-generation":
                time.sleep(0.5)  # all are being sampled by now, none is done
                os.kill(victim, signal.SIGKILL)
            responses = [response for chunk in chunks for response in chunk]
            made = sorted((r.row, r.token_ids, r.sampling_logprobs) for r in responses)
            say(
                killed=death,
                buckets=buckets,
                update_s=update_s,
                up=up,
                generate_s=time.perf_counter() - began,
                up_after=pool.num_up,
                responses=len(made),
                digest=hashlib.sha256(repr(made).encode()).hexdigest()[:16],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["bare", "actors", "transformers", "update", "kill"])
    for name, default in (("params", 5), ("actors", 1), ("rows", 128), ("tokens", 64), ("steps", 4), ("sequences", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument(
        "--layerwise", action="store_true", help="vLLM's own way to take weights, not straight to places"
    )
    parser.add_argument("--transfer", choices=["object_store", "broadcast"], default="object_store")
    parser.add_argument(
        "--uneven", action="store_true", help="responses end at the first letter, at very different lengths"
    )
    options = parser.parse_args()
    if options.layerwise:
        os.environ[LAYERWISE] = "1"  # actors have this process' environment
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder), options.params)
        if options.what == "bare":
            bare(path, options)
        elif options.what in ("actors", "transformers"):
            actors(path, options, "vllm" if options.what == "actors" else "transformers")
        else:
            {"update": update, "kill": kill}[options.what](path, options)


if __name__ == "__main__":
    main()
