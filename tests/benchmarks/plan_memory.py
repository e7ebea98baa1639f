"""What `raytrl plan` says of memory against what real runs took at their peak, on a CPU.

    python -m tests.benchmarks.plan_memory FOLDER [CASE ...]

Each case is a short run of a model that is large beside its libraries. A process's peak is the kernel's VmHWM of it, the
largest of its role, taken apart by the kernel's own reset: until the first step is done (loading included), in the steps
after it, and from the last one to the end (saving). The plan counts the worst of them. Exit status 1 where an estimate is
more than 25 % off.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import yaml

from raytrl.config.load import load_run
from raytrl.config.runs.serve import ServeRun
from raytrl.config.sections.serve import BATCH_ROWS
from raytrl.plan.memory import GIB, estimates
from raytrl.plan.shapes import read_shapes
from tests.ppo_files import RULE, ppo_file
from tests.runs import WORDS, last_step, run_file, start, write_rows
from tests.served import Server, served

LIMIT = 1.25
ROLES = {
    "learner.workers": "RayTrainWorker",
    "rollout.actors": "RolloutActor",
    "reward.actors": "RewardActor",
    "serve.replicas": "ServeReplica",
    "benchmark.actors": "MeasuringActor",
    "pairs.actors": "MeasuringActor",
}
ROW_TOKENS = 160  # of every row and prompt: cut to max_length
MODEL = {
    "model_type": "llama",
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 10,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "max_position_embeddings": 1024,
    "vocab_size": 16000,
}
# The same family at other sizes; in the name of a case behind `@`: `ppo-lora@300m`.
SIZES = {
    "70m": MODEL,
    "300m": MODEL
    | {
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "1b": MODEL
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
}
STEPS = 3
PHASES = ("first", "steps", "end")
GPT2 = {"model_type": "gpt2", "n_embd": 640, "n_layer": 10, "n_head": 10, "n_positions": 1024, "vocab_size": 16000}
ROLLOUT = {
    "actors": 1,
    "resources": {"CPU": 0.5},
    "sampling": {"max_new_tokens": 32},
    "max_prompt_length": 128,
    "chunk_prompts": 4,
}
HALF = {"resources": {"CPU": 0.5}}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def supervised(folder: Path, name: str, **sections: Any) -> str:
    """An SFT file of a few steps without recomputation; sections extend it."""
    training = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "max_length": 128,
        "gradient_checkpointing": False,
    }
    base: dict[str, Any] = {
        "model": {"config": SIZES[folder.name], "tokenizer": {"vocab_size": 300}},
        "training": training | sections.pop("training", {}),
        "learner": {"workers": 1},
        "checkpoint": {"every": 100},
    }
    return run_file(folder, name, **(base | sections))


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"workers": 2, "deepspeed": {"zero_optimization": {"stage": stage, **more}, "train_batch_size": "auto"}}


def bf16(folder: Path) -> dict[str, Any]:
    return {"path": str(folder / "policy"), "dtype": "bfloat16"}


def ppo(folder: Path, name: str, **sections: Any) -> str:
    settings = sections.pop("ppo", {})
    base: dict[str, Any] = {
        "model": {"path": str(folder / "policy")},
        "learner": {"workers": 1, "resources": {"CPU": 0.5}},
        "rollout": ROLLOUT,
        "reward": {
            "resources": {"CPU": 0.5},
            "sources": [{"name": "judge", "model": str(folder / "judge"), "batch_size": 4}],
        },
        "ppo": {
            "steps": STEPS,
            "batch_size": 8,
            "epochs": 1,
            "minibatches": 2,
            "learning_rate": 1e-5,
            "max_tokens_per_microbatch": 640,
            **settings,
        },
        "checkpoint": {"every": 100},
    }
    return ppo_file(folder, name, **(base | sections))


def written(folder: Path, name: str, **values: Any) -> str:
    """The run file of these values; its path."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "output_dir": str(folder / "runs")} | values))
    return str(path)


def serve(folder: Path, name: str, model: str = "policy", **section: Any) -> str:
    return written(folder, name, kind="serve", run=str(folder / model), serve=section)


def measure(folder: Path, name: str, model: str = "policy", **section: Any) -> str:
    return written(folder, name, kind="eval", model={"path": str(folder / model)}, **section)


def benchmark(folder: Path, name: str, **section: Any) -> str:
    """Long documents of two choices each."""
    task = {
        "task": "long",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": 0,
        "doc_to_choice": [" good", " bad"],
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "long.yaml").write_text(yaml.safe_dump(task))
    return measure(folder, name, benchmark={"tasks": [str(folder / "long.yaml")]} | section)


CASES: dict[str, Any] = {
    "serve-transformers": lambda f: serve(f, "serve-transformers", engine="transformers"),
    "serve-bf16": lambda f: serve(f, "serve-bf16", engine="transformers", dtype="bfloat16"),
    "serve-vllm": lambda f: serve(f, "serve-vllm", engine="vllm"),
    "serve-score": lambda f: serve(f, "serve-score", "judge"),
    "benchmark": lambda f: benchmark(f, "benchmark", engine="transformers"),
    "benchmark-vllm": lambda f: benchmark(f, "benchmark-vllm", engine="vllm"),
    "pairs": lambda f: measure(f, "pairs", "judge", pairs={"data": str(f / "documents.jsonl")}),
    "sft": lambda f: supervised(f, "sft"),
    "sft-gpt2": lambda f: supervised(f, "sft-gpt2", model={"config": GPT2, "tokenizer": {"vocab_size": 300}}),
    "sft-recompute": lambda f: supervised(
        f, "sft-recompute", training={"gradient_checkpointing": True, "per_device_train_batch_size": 8}
    ),
    "sft-long": lambda f: supervised(f, "sft-long", training={"per_device_train_batch_size": 16}),
    "sft-ddp": lambda f: supervised(f, "sft-ddp", learner={"workers": 2}),
    "sft-lora": lambda f: supervised(f, "sft-lora", lora=LORA),
    "sft-zero2": lambda f: supervised(f, "sft-zero2", learner=zero(2)),
    "sft-zero3": lambda f: supervised(f, "sft-zero3", learner=zero(3)),
    "dpo": lambda f: supervised(f, "dpo", kind="dpo", data={"train": str(f / "pairs.jsonl")}),
    "reward": lambda f: supervised(f, "reward", kind="reward", data={"train": str(f / "pairs.jsonl")}),
    "ppo": lambda f: ppo(f, "ppo"),
    "ppo-lora": lambda f: ppo(f, "ppo-lora", lora=LORA),
    "ppo-bf16": lambda f: ppo(f, "ppo-bf16", model=bf16(f)),
    "ppo-lora-bf16": lambda f: ppo(f, "ppo-lora-bf16", model=bf16(f), lora=LORA),
    "ppo-recompute": lambda f: ppo(
        f, "ppo-recompute", ppo={"gradient_checkpointing": True, "max_tokens_per_microbatch": None}
    ),
    "ppo-zero2": lambda f: ppo(f, "ppo-zero2", learner=zero(2) | HALF),
    "ppo-offload": lambda f: ppo(f, "ppo-offload", learner=zero(2, offload_optimizer={"device": "cpu"}) | HALF),
    "ppo-zero3": lambda f: ppo(f, "ppo-zero3", learner=zero(3) | HALF),
    "ppo-lora-zero3": lambda f: ppo(f, "ppo-lora-zero3", learner=zero(3) | HALF, lora=LORA),
    "ppo-vllm": lambda f: ppo(f, "ppo-vllm", rollout=ROLLOUT | {"engine": "vllm"}),
}


def make_files(folder: Path, model: dict[str, Any], judge: dict[str, Any] = MODEL) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from raytrl.config.sections.model import TokenizerSpec
    from raytrl.roles.models.tokenizer import train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = [f" {WORDS[(i * 7 + j) % len(WORDS)]}" for i in range(32) for j in range(ROW_TOKENS)]
    rows = ["".join(words[i : i + ROW_TOKENS]) for i in range(0, len(words), ROW_TOKENS)]
    write_rows(folder / "train.jsonl", [{"text": row} for row in rows])
    # Pairs longer than max_length are left out, not cut; a word is 2.3 tokens.
    part = ["".join(words[i : i + 27]) for i in range(0, len(words), 27)][:32]
    write_rows(folder / "pairs.jsonl", [{"prompt": row, "chosen": row, "rejected": row} for row in part])
    # The policy's prompts would be cut, what the reward model reads is not: both see the same 124 tokens.
    prompts = ["".join(words[i : i + 54]) for i in range(0, len(words), 54)][:32]
    write_rows(folder / "prompts.jsonl", [{"prompt": row} for row in prompts])
    # Nearly 512 tokens, for which the plan takes texts that nobody has counted; a word is 2.3.
    long = ["".join(words[i : i + 215]) for i in range(0, len(words), 40)][:32]
    documents = [{"text": each, "prompt": each, "chosen": " good", "rejected": " bad"} for each in long]
    write_rows(folder / "documents.jsonl", documents)
    (folder / "rule.py").write_text(RULE)
    tokenizer = train_tokenizer(iter(rows), TokenizerSpec(vocab_size=300))
    torch.manual_seed(0)
    if (folder / "judge/config.json").exists():
        return
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name, auto, shape in (("policy", LlamaForCausalLM, model), ("judge", LlamaForSequenceClassification, judge)):
        values = {key: value for key, value in shape.items() if key != "model_type"}
        auto(LlamaConfig(**values, **ids, num_labels=1)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def peaks(file: str, kind: str, run_dir: Path) -> dict[str, dict[str, float]]:
    """GiB of the largest process of each role in each of `PHASES`; runs the file to its end."""
    process = start(kind, file, "--fresh")
    found: dict[str, dict[str, float]] = {}
    phase = PHASES[0]
    while process.poll() is None:
        for role, pid in _role_pids(process.pid):
            known = found.setdefault(role, dict.fromkeys(PHASES, 0.0))
            known[phase] = max(known[phase], _peak_gib(pid))
        done = last_step(run_dir)
        now = PHASES[2 if done >= STEPS else 1 if done else 0]
        if now != phase:
            phase = now
            for _, pid in _role_pids(process.pid):
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak so far is forgotten
        time.sleep(0.05)
    assert process.returncode == 0, process.communicate()[0]
    return found


def served_peaks(file: str, run: ServeRun) -> dict[str, dict[str, float]]:
    """GiB of a replica and its engine: until it is ready, and under as much as it takes at a time."""
    found = dict.fromkeys(PHASES, 0.0)
    rows = [json.loads(line)["text"] for line in (Path(file).parent / "documents.jsonl").read_text().splitlines()]
    with served(Path(file).parent, file) as server:
        processes = [*server.below("ServeReplica"), *server.below("VLLM::")]
        for phase in PHASES[:2]:
            if phase == PHASES[1]:
                for process in processes:
                    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
                asked = rows[: 1 if run.scores else BATCH_ROWS]
                with ThreadPoolExecutor(len(asked)) as pool:
                    answers = list(pool.map(lambda text: _ask(server, run, text), asked))
                assert answers == [200] * len(asked), answers
            found[phase] = sum(_peak_gib(process.pid) for process in processes)
    return {ROLES["serve.replicas"]: found}


def _ask(server: Server, run: ServeRun, text: str) -> int:
    if run.scores:
        return server.ask("/score", {"prompts": [text] * 32, "completions": [" good"] * 32})[0]
    # As long as the model takes: so much a server has to have room for.
    return server.ask("/v1/completions", {"model": run.served_name, "prompt": text + text, "max_tokens": 24})[0]


def _role_pids(driver: int) -> Iterator[tuple[str, int]]:
    for child in psutil.Process(driver).children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue
        yield from ((name, child.pid) for name in ROLES.values() if name in title)


def _peak_gib(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 2**20 if found else 0.0


def main(folder: Path, names: list[str]) -> int:
    worst = 1.0
    print(
        f"{'case':<22}{'process':<18}{'estimate':>9}{'measured':>9}{'ratio':>7}{''.join(f'{p:>7}' for p in PHASES)}",
        flush=True,
    )
    for name in names or list(CASES):
        case, _, size = name.partition("@")
        home = folder / (size or "70m")
        make_files(home, SIZES[size or "70m"])
        file = CASES[case](home)
        run = load_run(file, []).run
        said = estimates(run, read_shapes(run)[0])
        if isinstance(run, ServeRun):
            measured = served_peaks(file, run)
        else:
            measured = peaks(file, run.kind, Path(run.output_dir) / run.name)
        for role, estimate in said.items():
            by_phase = measured[ROLES[role]]
            peak = max(by_phase.values())
            ratio = estimate.total / GIB / peak
            worst = max(worst, ratio, 1 / ratio)
            parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in estimate.parts.items())
            apart = "".join(f"{by_phase[phase]:>7.2f}" for phase in PHASES)
            print(
                f"{name:<22}{role:<18}{estimate.total / GIB:>9.2f}{peak:>9.2f}{ratio:>7.2f}{apart}  {parts}", flush=True
            )
    print(f"worst: {worst:.2f}; limit: {LIMIT}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
