"""ZeRO gives what plain Adam gives, and resumes bit by bit; two workers each."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from test_workers import SETTINGS, one_dropped, uneven
from toy import LORA, LocalGenerator, LocalScorer, Log, Prompts, config, gpt2, llama, make_engine, tensors_of
from transformers import AutoModelForCausalLM

from raytrl.config.sections.ppo import HEAD_CHUNK
from raytrl.errors import ConfigError
from raytrl.loop.loop import Schedule, run
from raytrl.roles.learner.build import assemble, build_backend, build_networks
from raytrl.roles.learner.head import head_of
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.learner.networks import _plain
from raytrl.roles.learner.save import save_policy, save_value
from raytrl.roles.models.adapters import policy_parameters
from tests.runs import free_port

pytestmark = pytest.mark.slow


def make(zero: dict[str, Any] | None, lora: bool, algorithm: str) -> PpoLearner:
    torch.manual_seed(0)
    # Small micro-batches: workers run out of rows at different times and must stay in lockstep.
    ppo = config(**SETTINGS[algorithm], max_tokens_per_microbatch=8)
    if ppo.has_critic:
        ppo = ppo.model_copy(update={"value_learning_rate": 2e-3})
    reference = ppo.kl.coef > 0
    networks = assemble(gpt2(width=16), critic=ppo.has_critic, reference_needed=reference, lora=LORA if lora else None)
    # 0: also parameters of a model as small as this one are spread over the workers.
    settings = None if zero is None else {"zero_optimization": {"stage3_param_persistence_threshold": 0, **zero}}
    backend = build_backend(networks, ppo, deepspeed=settings)
    backend.bucket_bytes = 600
    return PpoLearner(backend, ppo, temperature=1.0, seed=0, max_new_tokens=3, reference="start" if reference else None)


def most_gathered(learner: PpoLearner) -> tuple[int, int]:
    """Parameters of the policy that lie whole in this process while its weights are sent: at most, and of how many."""
    parameters = list(policy_parameters(learner._backend.networks.policy).values())
    return max(sum(p.numel() > 0 for p in parameters) for _ in learner.weights().buckets), len(parameters)


def work(rank: int, port: int, zero: dict[str, Any] | None, lora: bool, algorithm: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    checkpoints, results = Path(folder) / "checkpoints", []
    for resume in (False, True):
        learner = make(zero, lora, algorithm)
        if resume:
            learner.load(checkpoints / "1")
        samples, score = learner._config.responses_per_prompt, one_dropped if algorithm == "ppo" else uneven
        generator = LocalGenerator(
            [make_engine(gpt2(width=16), lora=lora, chunk=4)], samples, chunk_prompts=4 // samples
        )
        log = Log(None if resume else checkpoints)
        prompts = Prompts(16 // samples, rank, 2)
        run(Schedule(2, checkpoint_every=1), prompts, generator, LocalScorer(score), learner, log)
        results.append(tensors_of(learner.weights()))
    gathered, parameters = most_gathered(learner)
    assert gathered < parameters if zero is not None and zero["stage"] == 3 else gathered == parameters
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def trained(zero: dict[str, Any] | None, lora: bool, folder: Path, algorithm: str = "ppo") -> dict[str, torch.Tensor]:
    folder.mkdir()
    mp.start_processes(work, (free_port(), zero, lora, algorithm, str(folder)), nprocs=2, start_method="spawn")
    whole, resumed = torch.load(folder / "0.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    return dict(whole)


@pytest.mark.parametrize(
    ("algorithm", "lora"), [("ppo", False), ("ppo", True), ("grpo", False), ("grpo", True), ("rloo", False)]
)
def test_zero_equals_plain_adam_and_resumes_exactly(tmp_path: Path, algorithm: str, lora: bool) -> None:
    plain = trained(None, lora, tmp_path / "plain", algorithm)
    for stage in (1, 2, 3):
        sharded = trained({"stage": stage}, lora, tmp_path / str(stage), algorithm)
        assert max(float((sharded[name] - plain[name]).abs().max()) for name in plain) < 5e-6


def test_offloaded_states_are_stepped_alike(tmp_path: Path) -> None:
    plain = trained(None, False, tmp_path / "plain")
    for stage in (2, 3):
        zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
        sharded = trained(zero, False, tmp_path / str(stage))
        assert max(float((sharded[name] - plain[name]).abs().max()) for name in plain) < 5e-6


def sharded(rank: int, port: int, family: str, lora: bool, dtype: torch.dtype, folder: str) -> None:
    """A run from a folder under ZeRO-3, and what is seen of it on the way."""
    join(rank, port)
    HEAD_CHUNK["cpu"] = 3  # log-probs a part of the vocabulary at a time
    ppo = config(minibatches=2, max_tokens_per_microbatch=16)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 10_000_000}
    settings = {"zero_optimization": zero}
    arguments: dict[str, Any] = {"lora": LORA if lora else None, "dtype": dtype}
    networks = build_networks(f"{folder}/start", deepspeed=settings, **arguments)
    numels = {name: p.numel() for name, p in networks.named_parameters() if "lora_" not in name and name != HEAD}
    assert len(numels) > 10 and not any(numels.values())  # no process ever held more than a part
    learner = PpoLearner(build_backend(networks, ppo, deepspeed=settings), ppo, temperature=1.0, seed=0)
    assert head_of(_plain(networks.policy)) is not None
    passes, invalidated = watch_traces()
    learner = trained_on(learner, family, lora, dtype, rank)
    # Only the first two passes of each kind, of five, are not foreseen.
    assert invalidated == [] and passes.count(False) <= 2 * 5 and passes.count(True) > 20, (passes, invalidated)
    save_value(learner._backend, Path(folder) / "value")
    save_policy(learner._backend, Path(folder) / "model")
    sent = tensors_of(learner.weights())
    torch.save(sent, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


HEAD = "value_head.weight"
FAMILIES: dict[str, Callable[[], Any]] = {"gpt2": lambda: gpt2(width=16), "llama": llama}


def join(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", rank=rank, world_size=2)


def trained_on(learner: PpoLearner, family: str, lora: bool, dtype: torch.dtype, rank: int) -> PpoLearner:
    engine = make_engine(FAMILIES[family](), lora=lora, chunk=4, dtype=dtype)
    run(Schedule(3), Prompts(16, rank, 2), LocalGenerator([engine], 1, chunk_prompts=4), LocalScorer(), learner, Log())
    return learner


def watch_traces() -> tuple[list[bool], list[int]]:
    """Of each forward pass, whether ZeRO-3 knew its order; and how often it forgot one."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    passes: list[bool] = []
    invalidated: list[int] = []
    reset, invalidate = Coordinator.reset_step, Coordinator._invalidate_trace

    def at_reset(self: Any) -> None:
        reset(self)
        passes.append(self.is_complete_trace())

    def at_invalidation(self: Any) -> None:
        invalidated.append(len(passes))
        invalidate(self)

    Coordinator.reset_step, Coordinator._invalidate_trace = at_reset, at_invalidation
    return passes, invalidated


def plain(rank: int, port: int, family: str, lora: bool, dtype: torch.dtype, folder: str) -> None:
    join(rank, port)
    ppo = config(minibatches=2, max_tokens_per_microbatch=16)
    networks = build_networks(f"{folder}/start", lora=LORA if lora else None, dtype=dtype)
    learner = trained_on(
        PpoLearner(build_backend(networks, ppo), ppo, temperature=1.0, seed=0), family, lora, dtype, rank
    )
    torch.save(tensors_of(learner.weights()), f"{folder}/{rank}-plain.pt")
    save_value(learner._backend, Path(folder) / "value-plain")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("gpt2", torch.float32), ("llama", torch.float32), ("gpt2", torch.bfloat16), ("llama", torch.bfloat16)],
    ids=str,
)
def test_zero_3_holds_parts_from_the_start_to_the_end(
    tmp_path: Path, family: str, lora: bool, dtype: torch.dtype
) -> None:
    FAMILIES[family]().to(dtype).save_pretrained(tmp_path / "start")  # type: ignore[operator]
    for work in (sharded, plain):
        mp.start_processes(work, (free_port(), family, lora, dtype, str(tmp_path)), nprocs=2, start_method="spawn")
    sent, expected = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "0-plain.pt")
    limit = 5e-6 if dtype == torch.float32 else 2e-2
    assert sent.keys() == expected.keys()
    for name, value in sent.items():
        assert value.dtype == expected[name].dtype
        assert float((value.float() - expected[name].float()).abs().max()) < limit, name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / ("model/merged" if lora else "model"))
    assert model.dtype == dtype
    file = load_file(tmp_path / ("model/merged" if lora else "model") / "model.safetensors")
    assert {value.dtype for value in file.values()} == {dtype}
    if not lora:
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in sent.items())
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    values, others = (load_file(tmp_path / name / weights) for name in ("value", "value-plain"))
    assert all(float((values[name].float() - others[name].float()).abs().max()) < limit for name in others)


def test_stage_0_is_refused() -> None:
    with pytest.raises(ConfigError, match="stage must be 1, 2 or 3; found 0"):
        make({"stage": 0}, False)
