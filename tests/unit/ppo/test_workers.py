"""The number of learner workers changes nothing: same global batch, same result."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from toy import LocalGenerator, LocalScorer, Log, Prompts, config, gpt2, make_engine, make_learner, tensors_of

from raytrl.errors import NonFiniteError
from raytrl.loop.loop import Schedule, run
from raytrl.loop.protocols import Rollout
from raytrl.records.samples import Prompt, Response
from raytrl.roles.learner.collectives import add_over_workers
from tests.runs import free_port


def one_dropped(prompt: Prompt, response: Response) -> float | None:
    """Worker 0 loses all but one of its rows of the first step, so shares are uneven."""
    return None if response.step == 0 and response.row < 7 else float(sum(response.token_ids)) / 10


def uneven(prompt: Prompt, response: Response) -> float | None:
    """Worker 0 keeps one response of its first group, so groups are of unlike size."""
    if response.row in (1, 6):
        return 1.0  # a group of equal scores
    return None if response.step == 0 and response.row == 0 and response.sample else float(sum(response.token_ids)) / 10


ADAPTIVE = {"coef": 0.1, "target": 0.01, "horizon": 100}
# Adam's own epsilon would make steps of the whole learning rate out of gradients that are rounding alone.
IN_GROUPS = {"responses_per_prompt": 4, "epochs": 2, "minibatches": 4, "learning_rate": 1e-3, "adam_epsilon": 1e-4}
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"minibatches": 4, "reward_scaling": True, "kl": ADAPTIVE},
    "grpo": {
        "algorithm": "grpo",
        **IN_GROUPS,
        "advantage_scale": "batch",
        "kl": {"coef": 0.1},
        "train_unfinished": False,
    },
    "dapo": {"algorithm": "dapo", **IN_GROUPS, "candidates": 2},
    "gspo": {"algorithm": "gspo", **IN_GROUPS},
    "rloo": {"algorithm": "rloo", **IN_GROUPS, "kl": ADAPTIVE},
}


def work(rank: int, world: int, port: int, lora: bool, algorithm: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        ppo = config(**SETTINGS[algorithm])
        learner = make_learner(gpt2(width=16), ppo, lora=lora)
        samples, score = ppo.responses_per_prompt, one_dropped if algorithm == "ppo" else uneven
        generator = LocalGenerator(
            [make_engine(gpt2(width=16), lora=lora, chunk=4)], samples, chunk_prompts=4 // samples
        )
        log = Log(Path(folder) / "checkpoints")
        schedule = Schedule(3, checkpoint_every=3, eval_every=2)
        run(schedule, Prompts(ppo.prompts_per_step, rank, world), generator, LocalScorer(score), learner, log)
        torch.save((tensors_of(learner.weights()), log.metrics), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def trained(
    world: int, lora: bool, algorithm: str, folder: Path
) -> list[tuple[dict[str, torch.Tensor], list[dict[str, float]]]]:
    folder.mkdir()
    # fork: a fresh interpreter would import everything again in each worker.
    mp.start_processes(work, (world, free_port(), lora, algorithm, str(folder)), nprocs=world, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def together(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        tensors = [torch.full((n,), float(rank + 1)) for n in (3, 5, 1, 4)]
        add_over_workers(tensors, bucket_bytes=24)  # 3 alone, 5 and 1 together, 4 alone
        ppo = config(minibatches=2)
        learner, engine = make_learner(gpt2(width=16), ppo), make_engine(gpt2(width=16), chunk=4)
        engine.load_weights(learner.weights())
        prompts = Prompts(16, rank, world).next(0)
        responses, scorer, told = engine.generate(prompts, 0), LocalScorer(), []
        scorer.submit(prompts, responses)
        scores = scorer.collect()
        bad = [replace(s, value=math.nan) if s.row == 11 else s for s in scores]
        for given in (bad, scores):
            try:
                experience = learner.experience(Rollout(prompts, responses, given))
                if rank == 1:
                    experience.returns_BR[2, 0] = math.inf
                learner.update(experience)
            except NonFiniteError as error:
                told.append(str(error))
        torch.save(([t.tolist() for t in tensors], told), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_sums_in_buckets_and_failing_together(tmp_path: Path) -> None:
    """Only worker 1 meets what is not finite; worker 0 raises the same instead of waiting for it."""
    mp.start_processes(together, (2, free_port(), str(tmp_path)), nprocs=2, start_method="fork")
    for rank in range(2):
        sums, told = torch.load(tmp_path / f"{rank}.pt")
        assert sums == [[3.0] * n for n in (3, 5, 1, 4)]
        assert "[(11, 0)]" in told[0]
        assert "the value loss is inf; the micro-batch held rows" in told[1]
        assert " 10" in told[1]


@pytest.mark.parametrize(
    ("algorithm", "lora", "world"),
    [
        ("ppo", False, 2),
        ("ppo", True, 2),
        ("grpo", False, 2),
        ("grpo", True, 2),
        ("gspo", False, 4),
        ("dapo", False, 2),
        ("rloo", False, 2),
    ],
)
def test_worker_count_changes_nothing(tmp_path: Path, algorithm: str, lora: bool, world: int) -> None:
    ((alone, alone_metrics),) = trained(1, lora, algorithm, tmp_path / "one")
    workers = trained(world, lora, algorithm, tmp_path / "many")
    for tensors, metrics in workers:
        difference = max(float((tensors[name] - alone[name]).abs().max()) for name in alone)
        assert difference < 3e-6  # rounding alone: 0.8e-6 to 1.5e-6 over seeds and shuffles
        for mine, other in zip(metrics, alone_metrics, strict=True):
            for name in set(other) - {name for name in other if name.startswith("time/")}:
                assert mine[name] == pytest.approx(other[name], abs=1e-5), name
    first = workers[0][0]
    assert all(torch.equal(first[name], tensors[name]) for tensors, _ in workers for name in first)
