"""The learner: what changes nothing, what must change something, and what is refused."""

import math
import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import (
    LORA,
    LocalGenerator,
    LocalScorer,
    Log,
    Prompts,
    config,
    gpt2,
    llama,
    make_engine,
    make_learner,
    prompt_batch,
    tensors_of,
)
from transformers import AutoModelForCausalLM

from raytrl.algo.logprobs import token_logprobs
from raytrl.errors import NonFiniteError, RewardError, RunError, WeightsVersionError
from raytrl.loop.loop import Schedule, run
from raytrl.loop.protocols import Rollout
from raytrl.records.metrics import METRICS
from raytrl.records.samples import Response
from raytrl.roles.learner.build import assemble, build_backend, build_networks
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.learner.networks import Networks
from raytrl.roles.learner.save import save_policy, save_value
from raytrl.roles.learner.sequences import Sequences
from raytrl.roles.weights.buckets import checksum

CPU = torch.device("cpu")


def train(
    steps: int,
    *,
    lora: bool = False,
    learner: PpoLearner | None = None,
    folder: Path | None = None,
    scorer: LocalScorer | None = None,
    engine_temperature: float = 1.0,
    **changes: Any,
) -> tuple[PpoLearner, Log]:
    ppo = config(**changes)
    learner = learner or make_learner(gpt2(width=16), ppo, lora=lora)
    engine = make_engine(gpt2(width=16), lora=lora, temperature=engine_temperature)
    log = Log(folder)
    schedule = Schedule(steps, checkpoint_every=1 if folder else 0)
    generator = LocalGenerator([engine], ppo.responses_per_prompt)
    run(schedule, Prompts(ppo.prompts_per_step), generator, scorer or LocalScorer(), learner, log)
    return learner, log


def parameters(learner: PpoLearner) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in learner._backend.networks.named_parameters()}


def difference(a: PpoLearner, b: PpoLearner) -> float:
    mine, other = parameters(a), parameters(b)
    return max(float((mine[name] - other[name]).abs().max()) for name in mine)


def a_rollout(ppo_responses: int = 1, family: Any = None) -> Rollout:
    def model() -> Any:
        return family() if family else gpt2(width=16)

    engine, learner = make_engine(model()), make_learner(model(), config())
    engine.load_weights(learner.weights())
    prompts = prompt_batch(0, range(16 // ppo_responses))
    responses = engine.generate(prompts, 0, samples=ppo_responses)
    scorer = LocalScorer()
    scorer.submit(prompts, responses)
    return Rollout(prompts, responses, scorer.collect())


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, lora: bool) -> None:
    adaptive = {"kl": {"coef": 0.1, "target": 0.01, "horizon": 100}, "reward_scaling": True}
    unbroken, _ = train(4, lora=lora, **adaptive)
    train(2, lora=lora, folder=tmp_path, **adaptive)
    resumed = make_learner(gpt2(width=16), config(**adaptive), lora=lora)
    resumed.load(tmp_path / "2")
    assert resumed.step == 2
    train(4, lora=lora, learner=resumed, **adaptive)
    assert resumed.weights().checksum == unbroken.weights().checksum
    assert checksum(parameters(resumed)) == checksum(parameters(unbroken))
    assert resumed._controller.coef == unbroken._controller.coef != 0.1
    assert resumed._running.state_dict() == unbroken._running.state_dict()


def test_a_checkpoint_of_another_seed_is_refused(tmp_path: Path) -> None:
    train(1, folder=tmp_path)
    with pytest.raises(RunError, match="another seed"):
        make_learner(gpt2(width=16), config(), seed=1).load(tmp_path / "1")


def test_every_microbatch_is_told() -> None:
    beats: list[int] = []
    ppo = config(max_tokens_per_microbatch=1)  # a row each
    whole = make_learner(gpt2(width=16), ppo)
    learner = PpoLearner(whole._backend, ppo, temperature=1.0, seed=0, beat=lambda: beats.append(1))
    learner.experience(a_rollout())
    assert len(beats) == ppo.batch_size
    learner.update(learner.experience(a_rollout()))
    assert len(beats) == (1 + 1 + ppo.epochs) * ppo.batch_size


@pytest.mark.parametrize("max_tokens", [1, 11, 40])
def test_microbatches_change_nothing(max_tokens: int) -> None:
    # Plain-ish Adam divides by the gradient's size, so rounding shows up times the learning rate at worst.
    whole, log = train(2)
    parts, parts_log = train(2, max_tokens_per_microbatch=max_tokens)
    assert difference(whole, parts) < 1e-5
    for name, value in log.metrics[-1].items():
        if not name.startswith("time/"):
            assert parts_log.metrics[-1][name] == pytest.approx(value, abs=2e-4), name


@pytest.mark.parametrize("lora", [False, True])
def test_only_what_should_learn_learns(lora: bool) -> None:
    learner = make_learner(gpt2(width=16), config(), lora=lora)
    before = parameters(learner)
    train(2, lora=lora, learner=learner)
    changed = {name for name, value in parameters(learner).items() if not torch.equal(value, before[name])}
    if lora:
        expected = {name for name in before if "lora_" in name or name.startswith("value_head")}
        frozen_a = {n for n in expected if "lora_A" in n}
        assert expected - frozen_a <= changed <= expected
    else:
        assert changed and not any(name.startswith("reference.") for name in changed)
        assert any(name.startswith("policy.") for name in changed)
        assert any(name.startswith("value.") for name in changed)


@pytest.mark.parametrize("family", [gpt2, llama])
def test_with_lora_the_reference_is_the_base(family: Any) -> None:
    base = family().eval()
    learner = make_learner(deepcopy(base), config(), lora=True)
    networks = learner._backend.networks
    with torch.no_grad():
        for name, value in networks.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2)
    rollout = a_rollout()
    batch = Sequences.of([p.token_ids for p in rollout.prompts], [r.token_ids for r in rollout.responses], CPU)
    inputs = {
        "input_ids": batch.input_ids_BT,
        "attention_mask": batch.attention_mask_BT,
        "position_ids": batch.position_ids_BT,
    }
    with torch.no_grad():
        logits_NV = batch.at_tokens(base(**inputs).logits[:, batch.prompt_width - 1 : -1])
        expected = token_logprobs(logits_NV, batch.tokens_N, 1.0)
        torch.testing.assert_close(networks("reference", batch)[0], expected, atol=1e-5, rtol=0)
        policy, _ = networks("policy", batch)
        assert float((policy - expected).abs().max()) > 0.1
        networks("value", batch)
        networks("reference", batch)
        assert torch.equal(networks("policy", batch)[0], policy)


def test_with_lora_only_adapters_travel() -> None:
    names = tensors_of(make_learner(gpt2(width=16), config(), lora=True).weights())
    assert names and all("lora_" in name and ".default." in name for name in names)


def test_dropout_is_off_everywhere() -> None:
    networks = assemble(gpt2(width=16, dropout=0.5), lora=LORA)
    networks.train()
    rollout = a_rollout()
    batch = Sequences.of([p.token_ids for p in rollout.prompts], [r.token_ids for r in rollout.responses], CPU)
    with torch.no_grad():
        for network in ("policy", "reference"):
            assert torch.equal(networks(network, batch)[0], networks(network, batch)[0])
        assert torch.equal(networks("value", batch), networks("value", batch))


def test_the_untrained_policy_has_no_kl_and_repeats_its_logprobs() -> None:
    _, log = train(3)
    assert abs(log.metrics[0]["objective/kl"]) < 1e-5
    assert all(m["val/first_log_ratio"] < 1e-5 for m in log.metrics)
    assert {key for m in log.metrics for key in m} <= set(METRICS)  # each says what it means
    assert all(m["rollout/logprob_gap_max"] < 1e-4 for m in log.metrics)
    assert log.metrics[0]["val/explained_variance"] == pytest.approx(0, abs=1e-6)  # the value head starts at zero
    assert log.metrics[-1]["episode"] == 48


def test_a_policy_that_is_not_its_reference_is_refused() -> None:
    learner = make_learner(gpt2(width=16), config())
    with torch.no_grad():
        for parameter in learner._backend.networks.reference.parameters():  # type: ignore[union-attr]
            parameter.mul_(1.1)
    with pytest.raises(RunError, match="KL between the untrained policy"):
        learner.experience(a_rollout())


def test_a_forward_pass_that_does_not_repeat_is_refused() -> None:
    learner = make_learner(gpt2(width=16), config())
    experience = learner.experience(a_rollout())
    with torch.no_grad():
        learner._backend.networks.policy.lm_head.weight.mul_(1.5)  # type: ignore[union-attr, operator]
    with pytest.raises(RunError, match="does not repeat the old log-probs"):
        learner.update(experience)


def test_non_finite_scores_and_weights_name_their_rows() -> None:
    rollout = a_rollout()
    scores = [replace(s, value=math.nan) if s.row == 5 else s for s in rollout.scores]
    learner = make_learner(gpt2(width=16), config(minibatches=1))
    with pytest.raises(NonFiniteError, match=r"\(5, 0\)"):
        learner.experience(Rollout(rollout.prompts, rollout.responses, scores))
    experience = learner.experience(rollout)
    experience.returns_BR[3, 0] = math.inf
    before = checksum(parameters(learner))
    with pytest.raises(NonFiniteError, match="value loss"):
        learner.update(experience)
    assert checksum(parameters(learner)) == before
    with torch.no_grad():
        learner._backend.networks.value.score.weight.fill_(math.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(NonFiniteError, match="values not finite in rows"):
        learner.experience(rollout)


def test_log_probs_that_an_engine_could_not_tell_are_counted_and_hide_no_gap() -> None:
    rollout = a_rollout()
    apart = [replace(r, sampling_logprobs=tuple(x - 0.5 for x in r.sampling_logprobs)) for r in rollout.responses]
    length = sum(len(r.token_ids) for r in apart)
    untold = [replace(r, sampling_logprobs=(math.nan, *r.sampling_logprobs[1:])) for r in apart]
    learner = make_learner(gpt2(width=16), config(max_lag=1))
    experience = learner.experience(Rollout(rollout.prompts, untold, rollout.scores))
    assert experience.metrics["rollout/logprobs_missing"] == pytest.approx(len(apart))
    assert experience.metrics["rollout/logprob_gap_mean"] == pytest.approx(0.5 if length > len(apart) else math.nan)
    mask = experience.samples.sequences.response_mask_BR
    expected = torch.where(mask, math.exp(0.5), 1.0)
    expected[:, 0] = 1.0
    torch.testing.assert_close(experience.importance_BR, expected, rtol=1e-4, atol=0)
    assert all(math.isfinite(value) for value in learner.update(experience).values())


def test_dropped_samples_are_left_out_and_counted() -> None:
    rollout = a_rollout()
    scores = [replace(s, value=None) if s.row in (2, 9) else s for s in rollout.scores]
    learner = make_learner(gpt2(width=16), config())
    experience = learner.experience(Rollout(rollout.prompts, rollout.responses, scores))
    assert experience.num_responses == 14 and experience.metrics["objective/dropped"] == 2
    kept = [s.value for s in scores if s.value is not None]
    assert experience.metrics["objective/scores"] == pytest.approx(sum(kept) / 14, abs=1e-6)
    metrics = learner.update(experience)
    assert metrics["episode"] == 14 and all(math.isfinite(v) for v in metrics.values())
    with pytest.raises(RewardError):
        learner = make_learner(gpt2(width=16), config())
        learner.experience(Rollout(rollout.prompts, rollout.responses, [replace(s, value=None) for s in scores]))


def test_rollouts_that_do_not_fit_are_refused() -> None:
    rollout = a_rollout()
    learner = make_learner(gpt2(width=16), config())

    def asked(responses: list[Response]) -> None:
        learner.experience(Rollout(rollout.prompts, responses, rollout.scores))

    with pytest.raises(RunError, match="do not match"):
        asked(list(rollout.responses[:-1]))
    with pytest.raises(RunError, match="do not match"):
        asked([*rollout.responses[:-1], rollout.responses[0]])
    with pytest.raises(WeightsVersionError):
        asked([replace(r, policy_version=1) for r in rollout.responses])
    with pytest.raises(WeightsVersionError):
        asked([replace(r, step=1) for r in rollout.responses])


def test_rows_may_come_in_any_order() -> None:
    rollout = a_rollout(2)
    ppo = config(responses_per_prompt=2)
    learners = [make_learner(gpt2(width=16), ppo) for _ in range(2)]
    learners[0].update(learners[0].experience(rollout))
    shuffled = Rollout(rollout.prompts[::-1], rollout.responses[::-1], rollout.scores[::-1])
    learners[1].update(learners[1].experience(shuffled))
    assert learners[0].weights().checksum == learners[1].weights().checksum


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 2e-3},
        {"value_learning_rate": 2e-3},
        {"lr_schedule": "constant"},
        {"lr_schedule": "cosine"},
        {"adam_epsilon": 1e-2},
        {"max_grad_norm": 0.01},
        {"gamma": 0.5},
        {"lam": 0.1},
        {"clip_range": 0.001},
        {"value_clip_range": 0.001},
        {"value_clip_range": None},
        {"value_coef": 1.0},
        {"kl": {"coef": 0.5}},
        {"kl": {"coef": 0.05, "target": 0.001, "horizon": 20}},
        {"missing_eos_penalty": 1.0},
        {"reward_clip": 0.1},
        {"reward_scaling": True},
        {"whiten_advantages": False},
        {"epochs": 1},
        {"minibatches": 1},
        {"responses_per_prompt": 2},
    ],
    ids=str,
)
def test_every_setting_does_something(changes: dict[str, Any], baseline: str) -> None:
    learner, _ = train(3, **({"value_clip_range": 0.02} | changes))
    assert checksum(parameters(learner)) != baseline


@pytest.fixture(scope="module")
def baseline() -> str:
    return checksum(parameters(train(3, value_clip_range=0.02)[0]))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", [gpt2, llama])
def test_gradient_checkpointing_computes_layers_twice_to_the_same_weights(family: Any, lora: bool) -> None:
    passes: dict[bool, int] = {}
    checksums = set()
    for checkpointing in (False, True):
        learner = make_learner(family(), config(gradient_checkpointing=checkpointing), lora=lora)
        policy = learner._backend.networks.policy
        norm = next(m for name, m in policy.named_modules() if name.endswith(("ln_2", "post_attention_layernorm")))
        count = [0]
        norm.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        learner.update(learner.experience(a_rollout(family=family)))
        passes[checkpointing] = count[0]
        checksums.add(checksum(parameters(learner)))
    assert len(checksums) == 1
    # LoRA's value function runs on the same layers; the passes that make experience keep nothing to compute again.
    experience = 3 if lora else 1
    assert passes[True] - experience == 2 * (passes[False] - experience)


def test_the_gradient_is_really_clipped() -> None:
    """One SGD-like look: with huge rewards the applied gradient has the norm of the limit."""
    learner = make_learner(gpt2(width=16), config(whiten_advantages=False))
    rollout = a_rollout()
    huge = [replace(s, value=1e4) for s in rollout.scores]
    seen: list[float] = []
    optimizer = learner._backend._optimizer  # type: ignore[attr-defined]
    original = optimizer.step

    def step() -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        original()

    optimizer.step = step
    metrics = learner.update(learner.experience(Rollout(rollout.prompts, rollout.responses, huge)))
    assert metrics["val/grad_norm"] > 100
    assert all(norm == pytest.approx(1.0, abs=1e-3) for norm in seen) and len(seen) == 4


def test_the_engine_holds_exactly_the_learners_weights() -> None:
    learner, _ = train(2)
    engine = make_engine(gpt2(width=16))
    engine.load_weights(learner.weights())
    prompts = prompt_batch(2, range(16))
    responses = engine.generate(prompts, 2)
    scorer = LocalScorer()
    scorer.submit(prompts, responses)
    metrics = learner.experience(Rollout(prompts, responses, scorer.collect())).metrics
    assert metrics["rollout/logprob_gap_max"] < 1e-5


def test_another_sampling_temperature_is_seen() -> None:
    _, log = train(1, engine_temperature=0.7)
    assert log.metrics[0]["rollout/logprob_gap_max"] > 0.05


def test_networks_and_engine_from_folders(tmp_path: Path) -> None:
    """Save, build from folders, and score a reward model's folder as the value function's start."""
    gpt2(width=16).save_pretrained(tmp_path / "policy")  # type: ignore[operator]
    trained, _ = train(1)
    networks = trained._backend.networks
    save_policy(trained._backend, tmp_path / "out")
    save_value(trained._backend, tmp_path / "value")
    built = build_networks(str(tmp_path / "out"), value_init=str(tmp_path / "value"))
    for mine, other in ((built.policy, networks.policy), (built.value, networks.value)):
        assert mine is not None and other is not None
        assert checksum(dict(mine.named_parameters())) == checksum(dict(other.named_parameters()))
    assert float(built.value.score.weight.abs().sum()) > 0  # type: ignore[union-attr, arg-type, operator]
    fresh = build_networks(str(tmp_path / "policy"), value_init=str(tmp_path / "policy"))
    assert float(fresh.value.score.weight.abs().sum()) == 0  # type: ignore[union-attr, arg-type, operator]


def test_the_reference_stays_pages_of_its_file(tmp_path: Path) -> None:
    """So all workers and trials of a node share one copy of it; and training writes to none of them."""
    gpt2(width=16).save_pretrained(tmp_path / "policy")  # type: ignore[operator]
    networks = build_networks(str(tmp_path / "policy"))
    assert networks.reference is not None
    before = checksum(dict(networks.reference.named_parameters()))
    assert before == checksum(dict(networks.policy.named_parameters()))
    file = str(tmp_path / "policy/model.safetensors")
    mapped = [
        range(*[int(end, 16) for end in line.split()[0].split("-")])
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(file)
    ]
    assert all(any(p.data_ptr() in pages for pages in mapped) for p in networks.reference.parameters())
    learner = PpoLearner(build_backend(networks, config()), config(), temperature=1.0, seed=0)
    train(1, learner=learner)
    assert checksum(dict(networks.reference.named_parameters())) == before
    assert checksum(dict(networks.policy.named_parameters())) != before
    content = Path(file).read_bytes()
    Path(file).unlink()
    Path(file).write_bytes(content)  # another file: the mapped one stays with the process
    train(2, learner=learner)
    assert checksum(dict(networks.reference.named_parameters())) == before


@pytest.mark.parametrize("lora", [False, True])
def test_a_frozen_file_that_is_written_over_ends_the_run(tmp_path: Path, lora: bool) -> None:
    gpt2(width=16).save_pretrained(tmp_path / "policy")  # type: ignore[operator]
    networks = build_networks(str(tmp_path / "policy"), lora=LORA if lora else None)
    learner = PpoLearner(build_backend(networks, config()), config(), temperature=1.0, seed=0)
    train(1, learner=learner, lora=lora)
    with open(tmp_path / "policy/model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(bytes(4))
    with pytest.raises(RunError, match=r"model\.safetensors was written over while this run computes with it"):
        train(2, learner=learner, lora=lora)


def test_a_saved_lora_policy_loads_as_adapter_and_merged(tmp_path: Path) -> None:
    base = gpt2(width=16)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    learner = make_learner(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config(), lora=True)
    train(2, lora=True, learner=learner)
    networks = learner._backend.networks
    save_policy(learner._backend, tmp_path / "out")
    save_value(learner._backend, tmp_path / "value")
    rollout = a_rollout()
    batch = Sequences.of([p.token_ids for p in rollout.prompts], [r.token_ids for r in rollout.responses], CPU)
    for folder in (tmp_path / "out", tmp_path / "out" / "merged"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logprobs, _ = Networks(model, gpt2(), gpt2(), dtype=torch.float32)("policy", batch)
            torch.testing.assert_close(logprobs, networks("policy", batch)[0], atol=1e-5, rtol=0)
            assert float((logprobs - networks("reference", batch)[0]).abs().max()) > 1e-4
    assert (tmp_path / "value" / "adapter_model.safetensors").exists()
