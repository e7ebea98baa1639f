"""ZeRO gives what plain Adam gives, and resumes bit by bit; two workers each."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_workers import free_port, one_dropped
from toy import LORA, LocalGenerator, LocalScorer, Log, Prompts, config, gpt2, make_engine, tensors_of

from raytrl.errors import ConfigError
from raytrl.loop.loop import Schedule, run
from raytrl.roles.learner.build import assemble, build_backend
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.models.adapters import policy_parameters

pytestmark = pytest.mark.slow


def make(zero: dict[str, Any] | None, lora: bool) -> PpoLearner:
    torch.manual_seed(0)
    # Small micro-batches: workers run out of rows at different times and must stay in lockstep.
    ppo = config(minibatches=4, max_tokens_per_microbatch=8, value_learning_rate=2e-3)
    networks = assemble(gpt2(width=16), lora=LORA if lora else None)
    # 0: also parameters of a model as small as this one are spread over the workers.
    settings = None if zero is None else {"zero_optimization": {"stage3_param_persistence_threshold": 0, **zero}}
    backend = build_backend(networks, ppo, deepspeed=settings)
    backend.bucket_bytes = 600
    return PpoLearner(backend, ppo, temperature=1.0, seed=0)


def most_gathered(learner: PpoLearner) -> tuple[int, int]:
    """Parameters of the policy that lie whole in this process while its weights are sent: at most, and of how many."""
    parameters = list(policy_parameters(learner._backend.networks.policy).values())
    return max(sum(p.numel() > 0 for p in parameters) for _ in learner.weights().buckets), len(parameters)


def work(rank: int, port: int, zero: dict[str, Any] | None, lora: bool, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    checkpoints, results = Path(folder) / "checkpoints", []
    for resume in (False, True):
        learner = make(zero, lora)
        if resume:
            learner.load(checkpoints / "1")
        generator = LocalGenerator([make_engine(gpt2(width=16), lora=lora, chunk=4)], 1, chunk_prompts=4)
        log = Log(None if resume else checkpoints)
        run(Schedule(2, checkpoint_every=1), Prompts(16, rank, 2), generator, LocalScorer(one_dropped), learner, log)
        results.append(tensors_of(learner.weights()))
    gathered, parameters = most_gathered(learner)
    assert gathered < parameters if zero is not None and zero["stage"] == 3 else gathered == parameters
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def trained(zero: dict[str, Any] | None, lora: bool, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    mp.start_processes(work, (free_port(), zero, lora, str(folder)), nprocs=2, start_method="spawn")
    whole, resumed = torch.load(folder / "0.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    return dict(whole)


@pytest.mark.parametrize("lora", [False, True])
def test_zero_equals_plain_adam_and_resumes_exactly(tmp_path: Path, lora: bool) -> None:
    plain = trained(None, lora, tmp_path / "plain")
    for stage in (1, 2, 3):
        sharded = trained({"stage": stage}, lora, tmp_path / str(stage))
        assert max(float((sharded[name] - plain[name]).abs().max()) for name in plain) < 5e-6


def test_offloaded_states_are_stepped_alike(tmp_path: Path) -> None:
    plain = trained(None, False, tmp_path / "plain")
    for stage in (2, 3):
        zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
        sharded = trained(zero, False, tmp_path / str(stage))
        assert max(float((sharded[name] - plain[name]).abs().max()) for name in plain) < 5e-6


def test_stage_0_is_refused() -> None:
    with pytest.raises(ConfigError, match="stage must be 1, 2 or 3; found 0"):
        make({"stage": 0}, False)
