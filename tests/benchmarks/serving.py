"""`raytrl serve` against the same model without Ray Serve, alternating.

    python -m tests.benchmarks.serving MODEL [--rounds 3] [--haproxy] [--tokens 32]
    python -m tests.benchmarks.serving --large             # a llama of 105 million parameters, made for it
    python -m tests.benchmarks.serving REWARD_MODEL        # a classifier: scores over HTTP against those of this process

A policy's peer is vLLM's serving classes under uvicorn, in one process as `vllm serve` is; a reward model's is the reward
source that a reward actor holds. Closed loops of 1 and 32 clients; each number is a median over the rounds, whose order
alternates. On a machine with few cores the clients take theirs, of both sides alike.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp

from tests.runs import free_port, text_rows
from tests.served import served

_BARE = """
import asyncio, sys, uvicorn
from raytrl.config.load import load_run
from raytrl.roles.serving.servers import make_server

async def main():
    server = make_server(load_run(sys.argv[1], sys.argv[3:], "serve").run)
    app = await server.application()
    await uvicorn.Server(uvicorn.Config(app, port=int(sys.argv[2]), log_level="error")).serve()

asyncio.run(main())
"""
PROMPTS = [row["text"][:30] for row in text_rows(64)]


@contextmanager
def bare(model: str, *words: str) -> Iterator[str]:
    """The address of the peer."""
    port = free_port()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", _BARE, model, str(port), *words]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    base = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "the peer ended"
            try:
                urllib.request.urlopen(f"{base}/v1/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield base
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its engine, too, which is a process of its own
        process.wait()


async def load(base: str, name: str, clients: int, count: int, tokens: int, stream: bool) -> tuple[float, float]:
    """Requests a second, and the median seconds to the first token (streamed) or to the answer."""
    numbers, firsts = iter(range(count)), list[float]()
    limit = aiohttp.TCPConnector(limit=0)

    async with aiohttp.ClientSession(connector=limit, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def ask(number: int) -> None:
            body = {"model": name, "prompt": PROMPTS[number % 64], "max_tokens": tokens, "seed": number}
            begun = time.perf_counter()
            async with session.post(
                f"{base}/v1/completions", json=body | {"stream": stream, "ignore_eos": True}
            ) as answer:
                assert answer.status == 200, await answer.text()
                await answer.content.readany()
                firsts.append(time.perf_counter() - begun)
                await answer.read()

        async def client() -> None:
            for number in numbers:
                await ask(number)

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return count / (time.perf_counter() - begun), statistics.median(firsts)


def policy(model: str, rounds: int, tokens: int, haproxy: bool, words: list[str], requests: int) -> None:
    environment = {"RAY_SERVE_ENABLE_HA_PROXY": "1"} if haproxy else {}
    words = ["serve.name=m", "serve.engine=vllm", *words]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        began = time.perf_counter()
        ours = stack.enter_context(
            served(folder, model, *words, f"output_dir={folder}", PYTHONPATH=os.getcwd(), **environment)
        ).base
        print(f"ready after {time.perf_counter() - began:.0f} s", flush=True)
        peer = stack.enter_context(bare(model, *words))
        for clients, stream in ((1, True), (32, True), (32, False)):
            count = requests if clients > 1 else max(8, requests // 8)
            found: dict[str, list[tuple[float, float]]] = {ours: [], peer: []}
            for number in range(rounds + 1):
                for base in (ours, peer) if number % 2 else (peer, ours):
                    one = asyncio.run(load(base, "m", clients, count, tokens, stream))
                    if number:  # the first warms up
                        found[base].append(one)
            rates = {base: statistics.median(rate for rate, _ in each) for base, each in found.items()}
            firsts = {base: statistics.median(first for _, first in each) for base, each in found.items()}
            pairs = [a[0] / b[0] for a, b in zip(found[ours], found[peer], strict=True)]
            print(
                f"{clients:>2} clients, {'streamed' if stream else 'plain':<8}  {rates[ours]:7.1f} requests/s, bare "
                f"{rates[peer]:7.1f}: {rates[ours] / rates[peer]:.2f} (pairs {min(pairs):.2f} to {max(pairs):.2f}); first "
                f"answer after {firsts[ours] * 1e3:.0f} ms, bare {firsts[peer] * 1e3:.0f} ms",
                flush=True,
            )


def reward(model: str, rounds: int, calls_of_256: int) -> None:
    import torch

    torch.set_num_threads(1)
    from raytrl.config.sections.reward import SourceSection
    from raytrl.records.samples import Prompt, Response
    from raytrl.roles.reward.call import RewardSource, ask
    from raytrl.roles.reward.endpoint import EndpointSource
    from raytrl.roles.reward.model import ModelSource

    rows = text_rows(256)
    pairs = [
        (Prompt(0, i, row["text"][:20], ()), Response(0, i, 0, (), row["text"][20:], i % 3 > 0, (), 0))
        for i, row in enumerate(rows)
    ]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(served(folder, model, f"output_dir={folder}", PYTHONPATH=os.getcwd()))
        sources: dict[str, RewardSource] = {
            "here": ModelSource(SourceSection(name="here", model=model)),
            "served": EndpointSource(SourceSection(name="served", url=f"{server.base}/score")),
        }
        assert ask(sources["here"], pairs) == ask(sources["served"], pairs), "other scores"
        for size in (256, 1):
            calls = calls_of_256 if size > 1 else 8 * calls_of_256
            found: dict[str, list[float]] = {name: [] for name in sources}
            for number in range(rounds + 1):
                for name in sorted(sources, reverse=bool(number % 2)):
                    begun = time.perf_counter()
                    for call in range(calls):
                        ask(sources[name], pairs[call % 64 :][:1] if size == 1 else pairs)
                    if number:
                        found[name].append(calls * size / (time.perf_counter() - begun))
            rate = {name: statistics.median(each) for name, each in found.items()}
            more = size * (1 / rate["served"] - 1 / rate["here"]) * 1e3
            print(
                f"{size:>3} rows a call  {rate['served']:8.0f} rows/s, here {rate['here']:8.0f}: "
                f"{rate['served'] / rate['here']:.2f}; {more:.1f} ms more a call",
                flush=True,
            )


def large(folder: Path, classifier: bool) -> str:
    """105 million parameters, random weights, with the tokenizer of the tests' policy."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

    from tests.ppo_files import make_policy

    tokenizer = AutoTokenizer.from_pretrained(make_policy(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=11,
        num_attention_heads=12,
        max_position_embeddings=256,
        num_labels=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = auto.from_config(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters", flush=True)
    model.save_pretrained(folder / "large")
    tokenizer.save_pretrained(folder / "large")
    return str(folder / "large")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--classifier", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--calls", type=int, default=8, help="of 256 rows to a reward model, a round")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--haproxy", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = os.path.abspath(given.model) if given.model else large(Path(folder), given.classifier)
        place = Path(model, "model") if Path(model, "manifest.json").exists() else Path(model)
        names = json.loads((place / "config.json").read_text())["architectures"]
        if "SequenceClassification" in names[0]:
            reward(str(place), given.rounds, given.calls)
        else:
            policy(model, given.rounds, given.tokens, given.haproxy, given.words, given.requests)


if __name__ == "__main__":
    main()
