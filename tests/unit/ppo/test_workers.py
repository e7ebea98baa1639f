"""The number of learner workers changes nothing: same global batch, same result."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from toy import LocalGenerator, LocalScorer, Log, Prompts, config, gpt2, make_engine, make_learner

from raytrl.ppo.loop import Schedule, run
from raytrl.records import Prompt, Response


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def one_dropped(prompt: Prompt, response: Response) -> float | None:
    """Worker 0 loses all but one of its rows of the first step, so shares are uneven."""
    return None if response.step == 0 and response.row < 7 else float(sum(response.token_ids)) / 10


def work(rank: int, world: int, port: int, lora: bool, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        ppo = config(minibatches=4, reward_scaling=True, kl={"coef": 0.1, "target": 0.01, "horizon": 100})
        learner = make_learner(gpt2(width=16), ppo, lora=lora)
        generator = LocalGenerator([make_engine(gpt2(width=16), lora=lora, chunk=4)], 1, chunk_prompts=4)
        log = Log(Path(folder) / "checkpoints")
        schedule = Schedule(3, checkpoint_every=3, eval_every=2)
        run(schedule, Prompts(16, rank, world), generator, LocalScorer(one_dropped), learner, log)
        torch.save((dict(learner.weights().tensors), log.metrics), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def trained(world: int, lora: bool, folder: Path) -> list[tuple[dict[str, torch.Tensor], list[dict[str, float]]]]:
    folder.mkdir()
    # fork: a fresh interpreter would import everything again in each worker.
    mp.start_processes(work, (world, free_port(), lora, str(folder)), nprocs=world, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize(("lora", "world"), [(False, 2), (True, 2)])
def test_worker_count_changes_nothing(tmp_path: Path, lora: bool, world: int) -> None:
    ((alone, alone_metrics),) = trained(1, lora, tmp_path / "one")
    workers = trained(world, lora, tmp_path / "many")
    for tensors, metrics in workers:
        difference = max(float((tensors[name] - alone[name]).abs().max()) for name in alone)
        assert difference < 3e-6  # rounding alone: 0.8e-6 to 1.5e-6 over seeds and shuffles
        for mine, other in zip(metrics, alone_metrics, strict=True):
            for name in set(other) - {name for name in other if name.startswith("time/")}:
                assert mine[name] == pytest.approx(other[name], abs=1e-5), name
    first = workers[0][0]
    assert all(torch.equal(first[name], tensors[name]) for tensors, _ in workers for name in first)
