"""`ppo.algorithm` in a run file: defaults that can be overwritten, where they come from, and what cannot be meant."""

from pathlib import Path
from typing import Any

import pytest
from toy import gpt2

from raytrl.config.load import LoadedRun, load_run
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.sections.algorithms import PRESETS, defaults_of
from raytrl.errors import ConfigError
from raytrl.plan.memory import ppo_worker
from raytrl.plan.shapes import read_shapes

FILE = """\
kind: ppo
name: a
model: {path: base}
data: {train: train.jsonl}
reward: {sources: [{name: rule, function: "rules.py:rule"}]}
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(*overrides: str, text: str = FILE) -> LoadedRun:
    Path("run.yaml").write_text(text)
    return load_run("run.yaml", list(overrides))


def run_of(*overrides: str) -> PpoRun:
    run = load(*overrides).run
    assert isinstance(run, PpoRun)
    return run


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


def dotted(run: PpoRun, key: str) -> Any:
    value: Any = run.ppo
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("algorithm", PRESETS)
def test_each_is_a_set_of_defaults_that_says_whose_they_are(algorithm: str) -> None:
    loaded = load(f"ppo.algorithm={algorithm}")
    assert isinstance(loaded.run, PpoRun)
    origins = {key: (value, origin) for key, value, origin in loaded.values()}
    for key, value in defaults_of(algorithm).items():
        assert dotted(loaded.run, key) == value
        assert origins[f"ppo.{key}"] == (value, f"from algorithm: {algorithm}")
    assert origins["ppo.lr_schedule"][1] == "default" and origins["ppo.algorithm"][1] == "command line"


@pytest.mark.parametrize("algorithm", PRESETS)
def test_a_resolved_file_is_read_back_as_the_same_run(algorithm: str) -> None:
    run = run_of(f"ppo.algorithm={algorithm}")
    again = load(text=load(f"ppo.algorithm={algorithm}").as_yaml()).run
    assert again.model_dump() == run.model_dump()


def test_what_is_written_beside_it_counts() -> None:
    loaded = load("ppo.algorithm=grpo", "ppo.kl.coef=0.1", "ppo.loss_mean=responses", "ppo.epochs=2")
    assert isinstance(loaded.run, PpoRun)
    assert loaded.run.ppo.kl.coef == 0.1 and loaded.run.ppo.kl.place == "loss" and loaded.run.ppo.epochs == 2
    origins = {key: origin for key, _, origin in loaded.values()}
    assert origins["ppo.kl.coef"] == origins["ppo.epochs"] == "command line"
    assert origins["ppo.kl.place"] == "from algorithm: grpo"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["algorithm=grpo", "responses_per_prompt=1"], "ppo.responses_per_prompt: advantage group_mean compares"),
        (["advantage_scale=group"], "ppo.advantage_scale: there is no group"),
        (["algorithm=grpo", "whiten_advantages=true"], "ppo.whiten_advantages: advantages would be scaled twice"),
        (["algorithm=grpo", "ratio=sequence"], "ppo.loss_mean: with ratio sequence"),
        (["algorithm=grpo", "loss=cispo"], "ppo.ratio_limit: missing"),
        (["algorithm=cispo", "ratio_limit=0.2"], "ppo.ratio_limit: input should be greater than or equal to 1"),
        (["algorithm=grpo", "ratio_limit=1.1"], "ppo.ratio_limit: the clip range ends at 1.2 already"),
        (["algorithm=cispo", "clip_range=0.1"], "ppo.clip_range: does nothing with loss cispo"),
        (["algorithm=grpo", "value_coef=0.5"], "ppo.value_coef: does nothing with advantage group_mean"),
        (["algorithm=rloo", "lam=0.9"], "ppo.lam: does nothing with advantage leave_one_out"),
        (["algorithm=grpo", "gamma=0.9"], "ppo.gamma: does nothing with advantage group_mean"),
        (
            ["algorithm=reinforce", "value_learning_rate=1e-4"],
            "ppo.value_learning_rate: does nothing with advantage none",
        ),
        (["candidates=2"], "ppo.candidates: are chosen by how"),
        (["importance={low: 2.0, high: 3.0}"], "ppo.importance: low and high: must leave room for 1"),
        (["algorithm=grop"], "ppo.algorithm: input should be 'ppo', 'grpo'"),
        (["algorithm=grpo", "kl.target=6"], "ppo.kl.coef: target adapts it by factors"),
    ],
    ids=str,
)
def test_what_contradicts_or_does_nothing_is_refused(overrides: list[str], expected: str) -> None:
    assert expected in error_of(*(f"ppo.{override}" for override in overrides))


def test_a_value_model_without_a_critic_is_refused() -> None:
    assert "value_model.init: there is no value function" in error_of("ppo.algorithm=grpo", "value_model.init=base")
    assert "value_model.shared: there is no value function" in error_of("ppo.algorithm=grpo", "value_model.shared=true")
    assert "value_model.init: a shared value function is a new head" in error_of(
        "value_model={shared: true, init: base}"
    )


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["algorithm=grpo"], None),
        (["algorithm=grpo", "clip_range=0.1"], "ppo.clip_range: acts on nothing"),
        (["algorithm=dapo"], "ppo.clip_range_high: acts on nothing"),
        (["algorithm=gspo", "minibatches=1"], "ppo.clip_range, ppo.clip_range_high, ppo.ratio: act on nothing"),
        (["algorithm=gspo"], None),
        (["epochs=1", "minibatches=1"], "ppo.clip_range: acts on nothing"),
        (["algorithm=grpo", "clip_range=0.1", "minibatches=2"], None),
    ],
    ids=str,
)
def test_what_acts_on_ratios_is_told_where_every_ratio_is_1(overrides: list[str], told: str | None) -> None:
    lines = [
        line for line in run_of(*(f"ppo.{override}" for override in overrides)).idle_settings(10) if "ratio" in line
    ]
    assert len(lines) == (told is not None)
    assert told is None or lines[0].startswith(told)


def test_a_name_whose_comparison_is_overwritten_is_told() -> None:
    resolved = load("ppo.algorithm=grpo").as_yaml()
    run = load("ppo.algorithm=rloo", text=resolved).run
    assert any("rloo compares with leave_one_out by itself" in line for line in run.idle_settings(10))
    again = load(text=resolved).run
    assert not any(line.startswith(("ppo.algorithm", "ppo.clip_range")) for line in again.idle_settings(10))
    late = load("ppo.max_lag=1", text=resolved).run
    assert any(line.startswith("ppo.importance: null, so samples of older") for line in late.idle_settings(10))


def test_importance_is_on_where_the_batch_is_older() -> None:
    assert run_of().ppo.importance is None
    late = run_of("ppo.max_lag=1").ppo.importance
    assert late is not None and (late.level, late.mode, late.low, late.high) == ("token", "truncate", None, 2.0)
    assert run_of("ppo.max_lag=1", "ppo.importance=null").ppo.importance is None
    assert run_of("ppo.importance={level: sequence}").ppo.importance is not None


def test_a_learner_without_a_critic_and_a_reference_holds_a_third(tmp_path: Path) -> None:
    """By the estimate of `raytrl plan`; a value head on the policy is as good as no model."""
    model = gpt2(width=64, layers=4)
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]

    def weights(*overrides: str) -> float:
        run = run_of(*overrides)
        shapes, problems = read_shapes(run)
        assert not problems
        return ppo_worker(run, shapes["model.path"]).parts["weights"]

    ppo, grpo = weights(), weights("ppo.algorithm=grpo")
    assert ppo / 3 == pytest.approx(grpo, rel=0.01)
    assert weights("ppo.algorithm=grpo", "ppo.kl.coef=0.1") == pytest.approx(2 * grpo, rel=0.01)
    assert weights("value_model.shared=true") == pytest.approx(2 * grpo, rel=0.01)
