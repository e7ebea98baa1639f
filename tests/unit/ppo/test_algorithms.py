"""Without a critic: what each algorithm needs, what changes nothing, and what must change something.

Where each of them ends: tests/learning.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_learner import a_rollout, difference, parameters, train
from toy import config, gpt2, make_engine, make_learner, prompt_batch

from raytrl.config.sections.algorithms import PRESETS
from raytrl.loop.protocols import Rollout
from raytrl.records.metrics import METRICS
from raytrl.records.samples import Score
from raytrl.roles.learner.experience import Experience
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.weights.buckets import checksum

WITHOUT_CRITIC = sorted(PRESETS.keys() - {"ppo"})
SEVERAL = {
    "batch_size": 16,
    "epochs": 2,
    "minibatches": 2,
    "learning_rate": 1e-3,
}  # optimizer steps, so that ratios move


def of(algorithm: str, **changes: Any) -> dict[str, Any]:
    samples = 1 if algorithm == "reinforce" else 4
    return {"algorithm": algorithm, "responses_per_prompt": samples, **SEVERAL, **changes}


@pytest.mark.parametrize("algorithm", WITHOUT_CRITIC)
def test_nothing_is_held_for_what_it_does_not_need(algorithm: str, tmp_path: Path) -> None:
    learner, log = train(1, folder=tmp_path, **of(algorithm))
    networks = learner._backend.networks
    assert networks.value is None and networks.value_head is None and networks.value_group() == []
    has_reference = "rloo" in algorithm or "reinforce" in algorithm
    assert (networks.reference is not None) == has_reference == ("objective/kl" in log.metrics[0])
    stored = torch.load(tmp_path / "1/networks.pt", weights_only=True)
    assert stored and all(name.startswith("policy.") for name in stored)
    assert {key for metrics in log.metrics for key in metrics} <= set(METRICS)
    assert not any("value" in key or key.startswith("val/explained") for key in log.metrics[0])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("algorithm", "candidates"), [("grpo", 1), ("rloo", 1), ("dapo", 3)])
def test_a_resumed_run_is_bit_equal(algorithm: str, candidates: int, lora: bool, tmp_path: Path) -> None:
    settings = of(algorithm, candidates=candidates)
    unbroken, _ = train(4, lora=lora, **settings)
    train(2, lora=lora, folder=tmp_path, **settings)
    resumed = make_learner(gpt2(width=16), config(**settings), lora=lora)
    resumed.load(tmp_path / "2")
    train(4, lora=lora, learner=resumed, **settings)
    assert checksum(parameters(resumed)) == checksum(parameters(unbroken))
    assert not lora or all("value" not in name for name in parameters(resumed))


@pytest.mark.parametrize("algorithm", WITHOUT_CRITIC)
def test_how_a_batch_is_cut_and_ordered_changes_nothing(algorithm: str) -> None:
    # Adam's own epsilon of 1e-8 would make steps of the whole learning rate out of gradients that are rounding alone.
    settings = of(algorithm, kl={"coef": 0.3}, adam_epsilon=1e-5)
    rollout = a_rollout(config(**settings).responses_per_prompt)
    a_row_each = {"max_tokens_per_microbatch": 1}
    whole, cut, shuffled = (make_learner(gpt2(width=16), config(**settings | how)) for how in ({}, a_row_each, {}))
    whole.update(whole.experience(rollout))
    cut.update(cut.experience(rollout))
    backwards = Rollout(rollout.prompts[::-1], rollout.responses[::-1], rollout.scores[::-1])
    shuffled.update(shuffled.experience(backwards))
    assert difference(whole, cut) < 1e-5
    assert whole.weights().checksum == shuffled.weights().checksum


@pytest.mark.parametrize("changes", [{}, {"candidates": 2, "batch_size": 8}, {"loss_mean": "responses"}], ids=str)
def test_the_only_pass_of_an_update_has_the_old_logprobs(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one optimizer step a batch, and nothing else that needs them before: the same step, the same metrics."""
    settings = of("grpo", **{"epochs": 1, "minibatches": 1, "adam_epsilon": 1e-5} | changes)
    rollout, passes = a_rollout(4), list[int]()

    def learned() -> tuple[PpoLearner, dict[str, float]]:
        learner, count = make_learner(gpt2(width=16), config(**settings)), 0
        policy = learner._backend.logprobs

        def counted(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            return policy(*arguments)

        monkeypatch.setattr(learner._backend, "logprobs", counted)
        metrics = dict(learner.update(learner.experience(rollout)))
        passes.append(count)
        return learner, metrics

    one, metrics = learned()
    monkeypatch.setattr(PpoLearner, "_learns_in_one_pass", False)
    two, expected = learned()
    assert 2 * passes[0] == passes[1]
    assert difference(one, two) < 1e-6
    assert metrics.keys() == expected.keys()
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"kl": {"coef": 0.1}}, {"importance": {}}, {"minibatches": 2}, {"max_lag": 1}, {"train_unfinished": False}],
    ids=str,
)
def test_what_needs_the_old_logprobs_has_a_pass_for_them(changes: dict[str, Any]) -> None:
    settings = of("grpo", **{"epochs": 1, "minibatches": 1} | changes)
    learner = make_learner(gpt2(width=16), config(**settings))
    assert learner.experience(a_rollout(4)).old_logprobs_BR is not None


def test_a_row_is_a_group_whatever_its_text() -> None:
    """Four prompts are dealt to sixteen rows: rows 0 and 4 have one text, and are two groups."""
    rollout = a_rollout(2)
    learner = make_learner(gpt2(width=16), config(**of("dr_grpo", responses_per_prompt=2)))
    higher = [replace(s, value=s.value + 5.0 * (s.row >= 4)) for s in rollout.scores if s.value is not None]
    raised = learner.experience(Rollout(rollout.prompts, rollout.responses, higher))
    plain = learner.experience(rollout)
    torch.testing.assert_close(raised.advantages_BR, plain.advantages_BR, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage": "leave_one_out"},
        {"advantage": "none", "advantage_scale": "none"},
        {"advantage_scale": "none"},
        {"advantage_scale": "batch"},
        {"advantage_scale": "none", "whiten_advantages": True},
        {"loss_mean": "responses"},
        {"loss_mean": "max_tokens"},
        {"ratio": "sequence", "loss_mean": "responses"},
        {"loss": "cispo", "ratio_limit": 5.0},
        {"clip_range": 0.001},
        {"clip_range_high": 0.001},
        {"ratio_limit": 1.051},
        {"train_unfinished": False},
        {"kl": {"coef": 0.5}},
        {"kl": {"coef": 0.5, "place": "reward"}},
        {"missing_eos_penalty": 1.0},
        {"reward_clip": 0.1},
        {"importance": {}},
        {"importance": {"level": "sequence"}},
        {"importance": {"mode": "mask", "high": 1.01}},
        {"importance": {"low": 0.99}},
        {"importance": {"high": 1.01}},
        {"importance": {"high": None}},
        {"epochs": 1},
        {"minibatches": 1},
        {"responses_per_prompt": 2},
        {"learning_rate": 2e-3},
    ],
    ids=str,
)
def test_every_setting_does_something(changes: dict[str, Any]) -> None:
    """Against GRPO with a policy that was sampled a little hotter, and clips that act."""
    base = of("grpo", clip_range=0.05, learning_rate=3e-3)
    found = [checksum(parameters(train(3, engine_temperature=1.3, **base | each)[0])) for each in ({}, changes)]
    assert found[0] != found[1]


def test_importance_is_a_setting_of_its_own_for_each_form() -> None:
    forms = [{}, {"level": "sequence"}, {"mode": "mask"}, {"high": 1.05}, {"low": 0.95}, {"high": None}]
    rollout = a_rollout()
    apart = (0.2, -0.8, 0.2)
    moved = [
        replace(r, sampling_logprobs=tuple(x + d for x, d in zip(r.sampling_logprobs, apart, strict=False)))
        for r in rollout.responses
    ]
    found = set()
    for form in forms:
        learner = make_learner(gpt2(width=16), config(importance=form))
        weights = learner.experience(Rollout(rollout.prompts, moved, rollout.scores)).importance_BR
        assert weights is not None
        found.add(tuple(weights.flatten().tolist()))
    assert len(found) == len(forms)


def of_candidates(differing: set[int], dropped: Collection[int] = ()) -> tuple[Experience, dict[str, float]]:
    """What GRPO learns from, of eight prompts of which two are to be learned from, eight responses in all."""
    ppo = config(algorithm="grpo", batch_size=8, responses_per_prompt=4, candidates=4, minibatches=1)
    prompts = prompt_batch(0, range(8))
    learner, engine = make_learner(gpt2(width=16), ppo), make_engine(gpt2(width=16))
    engine.load_weights(learner.weights())
    responses = engine.generate(prompts, 0, samples=4)
    scores = []
    for r in responses:
        value = float(r.row + (r.sample if r.row in differing else 0))
        scores.append(Score(0, r.row, r.sample, None if r.row in dropped and r.sample else value, {"rule": value}))
    experience = learner.experience(Rollout(prompts, responses, scores))
    return experience, dict(learner.update(experience))


def test_the_first_prompts_that_differ_are_learned_from() -> None:
    experience, metrics = of_candidates({1, 4, 5, 7})
    assert [place // 4 for place in experience.samples.global_rows] == [1] * 4 + [4] * 4
    assert experience.samples.places == list(range(8))
    assert metrics["groups/kept"] == 4 and metrics["groups/equal_fraction"] == 0.5
    assert metrics["objective/scores_raw"] == pytest.approx(sum(range(8)) / 8 + 4 * 1.5 / 8)  # of all that was sampled
    assert metrics["episode"] == 8 and metrics["val/grad_norm"] > 0


def test_where_fewer_differ_fewer_are_learned_from() -> None:
    experience, metrics = of_candidates({6})
    assert {place // 4 for place in experience.samples.global_rows} == {6} and metrics["episode"] == 4
    experience, metrics = of_candidates(set())
    assert {place // 4 for place in experience.samples.global_rows} == {0, 4} and metrics["val/grad_norm"] == 0
    experience, _ = of_candidates(set(), dropped={0, 1, 2, 3})  # a single response is kept of each
    assert {place // 4 for place in experience.samples.global_rows} == {0, 4} and len(experience.samples.places) == 5
    experience, _ = of_candidates({1, 2, 3}, dropped={1})  # whose only kept response differs from nothing
    assert {place // 4 for place in experience.samples.global_rows} == {2, 3}
