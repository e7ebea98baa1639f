"""`ppo.max_lag` and `rollout.versions`: what fits together, what is refused, what is said, what it takes."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytrl.config.load import load_run
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.sections.engines import Asked, _serves_adapters, holds_several_versions
from raytrl.config.sections.rollout import RolloutSection
from raytrl.errors import ConfigError
from raytrl.plan.lag import of_phases
from raytrl.plan.memory import estimates
from raytrl.plan.need import need_of
from raytrl.plan.shapes import read_shapes
from tests.ppo_files import make_files, make_policy, ppo_file

LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lag")
    make_files(path)
    make_policy(path, head_size=32)  # which vLLM's attention on CPUs has
    return path


def run_of(folder: Path, lag: int, rollout: dict[str, Any] | None = None, **more: Any) -> PpoRun:
    ppo = {"max_lag": lag, "batch_size": 16, **more.pop("ppo", {})}
    found = load_run(ppo_file(folder, "lag", ppo=ppo, rollout=rollout or {}, **more), []).run
    assert isinstance(found, PpoRun)
    return found


@pytest.mark.parametrize(
    ("lag", "rollout", "versions", "groups"),
    [
        (0, {}, 1, 1),
        (1, {}, 1, 1),
        (1, {"versions": 2, "actors": 1}, 2, 1),
        (2, {"actors": 1}, 3, 1),
        (3, {"actors": 1}, 4, 1),
        (3, {"versions": 3, "actors": 1}, 3, 1),
        (3, {"versions": 1, "actors": 3}, 1, 3),
        (3, {"versions": 2}, 2, 2),
        (2, {"engine": "vllm", "actors": 2}, 1, 2),
    ],
)
def test_who_holds_what(folder: Path, lag: int, rollout: dict[str, Any], versions: int, groups: int) -> None:
    found = run_of(folder, lag, rollout)
    assert (found.engine_versions, found.lane_groups) == (versions, groups)
    assert found.lanes == (lag + 1 if versions > lag else lag)


def test_vllm_holds_adapters_side_by_side(folder: Path) -> None:
    """As its class for the model says, in its source."""
    assert run_of(folder, 3, {"engine": "vllm", "actors": 1}, lora=LORA).engine_versions == 4


@pytest.mark.parametrize(
    ("lag", "rollout", "message"),
    [
        (
            3,
            {"versions": 1},
            r"rollout.actors: ppo.max_lag 3 has batches of 3 versions on their way, and an engine holds 1 ",
        ),
        (3, {"versions": 1}, r"found: 2; expected: at least 3, or a max_lag of at most 2"),
        (2, {"versions": 4}, r"rollout.versions: with ppo.max_lag 2 no more than 3 .* found: 4; leave it out"),
        (0, {"versions": 2}, r"rollout.versions: with ppo.max_lag 0 no more than 1 "),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, lag: int, rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(folder, lag, rollout)


def test_vllm_holds_one_version_of_a_whole_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.versions: vllm holds one version .* found: 2; expected: 1, and a "):
        run_of(folder, 2, {"engine": "vllm", "versions": 2})


def test_what_is_said(folder: Path) -> None:
    def ahead(*how: Any, **more: Any) -> str | None:
        return dict(run_of(folder, *how, **more).in_words({}, None)).get("ahead")

    assert ahead(0) is None
    assert ahead(1) == "one batch is sampled ahead: step s learns from version s - 1; samples count by their own weight"
    assert str(ahead(2, {"actors": 1})).endswith("weight; engines hold 3 versions side by side")
    assert str(ahead(2, {"versions": 1}, ppo={"importance": None})).endswith(
        "samples are not weighted; 2 groups of actors take turns"
    )
    assert [line for line in run_of(folder, 4).idle_settings(None) if line.startswith("ppo.max_lag: 4: with 3 nobody")]
    assert not [line for line in run_of(folder, 3).idle_settings(None) if line.startswith("ppo.max_lag")]


def test_what_it_takes(folder: Path) -> None:
    """Each further version is a further copy of the policy in the engine; and in the object store, for whoever is lost."""

    def weights(run: PpoRun) -> float:
        shapes, _ = read_shapes(run, "")
        return estimates(run, shapes)["rollout.actors"].parts["weights"]

    plain, three, taking_turns = run_of(folder, 0), run_of(folder, 3), run_of(folder, 2, {"versions": 1})
    assert weights(three) == 4 * weights(plain) == 4 * weights(taking_turns)
    size = sum(file.stat().st_size for file in (folder / "policy").glob("*.safetensors"))
    assert [need_of(run).object_store_bytes - need_of(plain).object_store_bytes for run in (three, taking_turns)] == [
        6 * size,
        2 * size,
    ]
    adapters = [run_of(folder, lag, lora=LORA) for lag in (0, 3)]
    assert weights(adapters[0]) == weights(adapters[1])


def phases(generate: float, **more: float) -> dict[str, float]:
    times = {"score": 0.1, "experience": 0.4, "update": 1.0, "idle": 0.0, "sync": 0.2, **more, "generate": generate}
    return {f"time/{name}_s": value for name, value in times.items()} | {"time/step_s": sum(times.values())}


def test_what_a_lag_would_bring_is_told_from_the_last_runs_phases(folder: Path) -> None:
    first = phases(30.0)
    assert of_phases([], 0) is None and of_phases([first], 0) is None
    told = str(of_phases([first, *[phases(1.0)] * 3], 0))
    assert "took 2.7 s: 1 s of sampling, 1.5 s of scores and learning, 0.2 s of new weights" in told
    assert "with ppo.max_lag=1 it would be about 1.7 s, 1.6 times as fast" in told and "longer part" not in told
    assert "sampling is the longer part" in str(of_phases([first, phases(2.0)], 0))
    waited = [first, phases(0.5, drain=0.0) | {"rollout/lag_max": 2.0}]
    assert "waited 0.5 s of 2.2 s for responses" in str(of_phases(waited, 2))


def test_a_half_written_file_tells_what_it_has(folder: Path) -> None:
    from raytrl.plan.lag import lag_note

    run = run_of(folder, 0)
    place = folder / "runs/lag"
    place.mkdir(parents=True)
    rows = [json.dumps({"step": i, **phases(1.0)}) for i in range(1, 4)]
    (place / "metrics.jsonl").write_text("\n".join([*rows, '{"st']))
    assert "the last 2 steps in this run directory took 2.7 s" in str(lag_note(run))


@pytest.mark.parametrize(
    ("architecture", "serves"),
    [
        ("LlamaForCausalLM", True),
        ("MistralForCausalLM", True),  # by its base, in another module
        ("Qwen3ForCausalLM", True),
        ("GPT2LMHeadModel", False),
        ("NobodyKnowsForCausalLM", None),
    ],
)
def test_which_models_vllm_serves_adapters_of(tmp_path: Path, architecture: str, serves: bool | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert _serves_adapters(str(tmp_path)) is serves
    assert _serves_adapters("some/hub-id") is None


@pytest.mark.parametrize("lora", [{"lora_bias": True}, {"r": 1024}, {"init_lora_weights": "pissa"}])
def test_adapters_that_vllm_refuses_are_merged(folder: Path, lora: dict[str, Any]) -> None:
    asked = Asked(RolloutSection(engine="vllm"), [str(folder / "policy")], LORA | lora)
    assert holds_several_versions(asked) is False


@pytest.mark.parametrize(
    ("lag", "rollout", "is_told"),
    [(2, {"versions": 1, "actors": 3}, True), (2, {"versions": 1}, False), (3, {}, False)],
)
def test_groups_that_have_unequal_work_are_told(folder: Path, lag: int, rollout: dict[str, Any], is_told: bool) -> None:
    lines = run_of(folder, lag, rollout).idle_settings(None)
    assert bool([line for line in lines if "groups that make" in line]) == is_told


@pytest.mark.parametrize(
    ("metric", "ppo", "is_there"),
    [
        ("importance/ess", {}, False),
        ("importance/ess", {"importance": {}}, True),
        ("rollout/lag_mean", {"importance": {}}, False),
        ("importance/mean", {"max_lag": 1}, True),
        ("importance/mean", {"max_lag": 1, "importance": None}, False),
        ("rollout/kl_to_sampler", {"max_lag": 1, "importance": None}, True),
    ],
)
def test_which_metrics_there_are(folder: Path, metric: str, ppo: dict[str, Any], is_there: bool) -> None:
    lag = ppo.pop("max_lag", 0)
    assert (run_of(folder, lag, ppo=ppo).why_without(metric) is None) == is_there
