"""A sweep's file and search space: every value is refused or accepted before anything starts."""

from collections.abc import Callable
from typing import Any

import pytest

from raytrl.config.load import LoadedRun, load_run
from raytrl.config.runs.sweep import TuneRun
from raytrl.config.trials import check_edges, load_base, trial_name, trial_run
from raytrl.errors import ConfigError
from raytrl.launch.sweep.search import first_trials, known_points, make_optuna, make_scheduler

Load = Callable[..., LoadedRun]


def run_of(loaded: LoadedRun) -> TuneRun:
    assert isinstance(loaded.run, TuneRun)
    return loaded.run


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pbt": ({"scheduler": {"name": "pbt"}}, "Ray Train V2 hand it none"),
    "no bounds": ({"search": {"ppo.gamma": {"randn": [0, 1]}}}, "cannot be checked before the start"),
    "unknown": ({"search": {"ppo.gamma": {"normal": [0, 1]}}}, "expected: one of choice, grid, uniform"),
    "upside down": ({"search": {"ppo.gamma": {"uniform": [1, 0]}}}, "expected: lower < upper"),
    "log of 0": ({"search": {"ppo.gamma": {"loguniform": [0, 1]}}}, "expected: lower above 0 < upper"),
    "twice": ({"search": {"ppo.gamma": {"choice": [1, 1]}}}, "found: 1 twice"),
    "sections": ({"search": {"lora": {"choice": [{"r": 1}]}}}, "expected: single values"),
    "name": ({"search": {"name": {"choice": ["a"]}}}, "name: is set by the sweep"),
    "cluster": ({"search": {"cluster.address": {"choice": ["a"]}}}, "cluster.address: is set by the sweep"),
    "no trials": ({"trials": None}, "trials: missing"),
    "half a grid": ({"search": {"ppo.gamma": {"grid": [0.9, 1]}, "ppo.lam": {"uniform": [0, 1]}}, "trials": 3}, "of 2"),
    "too many": ({"search": {"ppo.gamma": {"grid": [0.9, 1]}}, "trials": 4}, "but the grid has 2 points"),
    "optuna grid": ({"algorithm": {"name": "optuna"}, "search": {"ppo.gamma": {"grid": [1]}}, "trials": 1}, "choice"),
    "optuna q": ({"algorithm": {"name": "optuna"}, "search": {"ppo.lam": {"qloguniform": [0.1, 1, 0.1]}}}, "the q"),
    "grace": ({"scheduler": {"name": "asha"}}, "grace_period: missing"),
    "owned": ({"scheduler": {"name": "asha", "grace_period": 1, "metric": "x"}}, "is set by `metric`"),
    "idle": ({"scheduler": {"name": "none", "grace_period": 1}}, "does nothing with name: none"),
    "idle patience": ({"limit_patience": 9}, "does nothing without limit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_the_file_alone(sweep: Load, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=r"sweep.yaml(:\d+)?: ") as caught:
        sweep(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "distribution", "message"),
    [
        ("ppo.kl.coef", {"choice": [0.1, -0.2]}, "value -0.2 is refused: ppo.kl.coef: input should be greater than"),
        ("ppo.gamma", {"uniform": [0.5, 1.5]}, "value 1.5 is refused: ppo.gamma: "),
        ("ppo.kl.coeff", {"choice": [1]}, "value 1 is refused: ppo.kl.coeff: unknown key; nearest known key: coef"),
        ("ppo.minibatches", {"randint": [1, 5]}, "value 3 is refused: ppo.batch_size: every optimizer step"),
    ],
)
def test_every_value_is_tried_on_the_base_run(
    sweep: Load, key: str, distribution: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=r"sweep.yaml:\d+: search\.") as caught:
        check_edges(sweep(search={key: distribution}))
    assert f"search.{key}: " in str(caught.value)
    assert message.replace("ppo.batch_size must", "").split(" is refused")[0] in str(caught.value)


def test_values_that_fit_alone_but_not_together_are_refused(sweep: Load) -> None:
    loaded = sweep(search={"ppo.batch_size": {"grid": [16, 20]}, "ppo.minibatches": {"grid": [2, 8]}}, trials=None)
    check_edges(loaded)
    with pytest.raises(ConfigError, match=r"ppo.batch_size=20, ppo.minibatches=8 do not fit together"):
        first_trials(run_of(loaded))


def test_the_base_must_train_and_hold_the_metric(sweep: Load) -> None:
    with pytest.raises(ConfigError, match=r"comes from evaluation; found: no data.eval"):
        load_base(sweep(metric="eval/score"))
    with pytest.raises(ConfigError, match=r"more than ppo.steps 8, so never"):
        load_base(sweep(metric="eval/score", base={"data": {"train": "a.jsonl", "eval": "b.jsonl"}}))
    grpo = {"ppo": {"algorithm": "grpo", "batch_size": 16}}
    rates = {"ppo.learning_rate": {"choice": [1e-5, 1e-4]}}
    with pytest.raises(ConfigError, match=r"'objective/kl' is measured against a reference; found: ppo.kl.coef 0"):
        load_base(sweep(limit={"objective/kl": 6.0}, base=grpo, search=rates))
    with pytest.raises(
        ConfigError, match=r"'val/explained_variance' is of a value function; found: ppo.advantage group_mean"
    ):
        load_base(sweep(metric="val/explained_variance", base=grpo, search=rates))
    with pytest.raises(ConfigError, match=r"search.ppo.kl.coef: value 0.0 .*'objective/kl' is measured against"):
        check_edges(sweep(limit={"objective/kl": 6.0}, search={"ppo.kl.coef": {"choice": [0.0, 0.1]}}))
    for search in (
        {"ppo.kl.coef": {"choice": [0.01, 0.1]}},
        {"ppo.algorithm": {"grid": ["rloo", "reinforce_baseline"]}},
    ):
        loaded = sweep(
            limit={"objective/kl": 6.0}, base=grpo, search=search, trials=None if "grid" in str(search) else 2
        )
        load_base(loaded)  # each trial has a reference, whatever the base has
        assert len(check_edges(loaded)) == 2
    loaded = sweep()
    with pytest.raises(ConfigError, match="base: found: a run file of kind 'tune'"):
        load_base(load_run(loaded.file, [f"base={loaded.file}"], "tune"))


def test_algorithms_that_a_base_leaves_no_key_to_set_are_refused(sweep: Load) -> None:
    grid = {"ppo.algorithm": {"grid": ["rloo", "grpo"]}}
    assert len(check_edges(sweep(search=grid, trials=None, base={"ppo": {"batch_size": 16}}))) == 2
    written = load_run(sweep(base={"ppo": {"algorithm": "grpo", "batch_size": 16}}).run.base, []).run  # type: ignore[attr-defined]
    resolved = {"ppo": written.model_dump(mode="json")["ppo"]}
    with pytest.raises(ConfigError, match=r"search.ppo.algorithm: rloo and grpo are the same run"):
        check_edges(sweep(search=grid, trials=None, base=resolved))


def test_overrides_reach_into_the_search_space(sweep: Load) -> None:
    file = sweep().file
    loaded = load_run(file, ["search.ppo.kl.coef={uniform: [0, 1]}", "search.ppo.lam={grid_search: [1]}"], "tune")
    assert {key: str(d.name) for key, d in run_of(loaded).search.items()} == {
        "ppo.learning_rate": "loguniform",
        "ppo.kl.coef": "uniform",
        "ppo.lam": "grid",
    }
    again = TuneRun.model_validate(loaded.run.model_dump(mode="json"))
    assert again == loaded.run


def test_the_same_seed_gives_the_same_trials_and_they_load(sweep: Load) -> None:
    run = run_of(sweep())
    points = known_points(run)
    assert points == known_points(run)
    assert len(points) == 4
    assert points != known_points(run.model_copy(update={"seed": 1}))
    for values in points:
        assert 1e-6 <= values["ppo.learning_rate"] <= 1e-4
        trial: Any = trial_run(run, values, "a", "runs").run
        assert (trial.ppo.learning_rate, trial.ppo.kl.coef) == tuple(values.values())


def test_a_grid_is_gone_through_once(sweep: Load) -> None:
    run = run_of(sweep(search={"ppo.lam": {"grid": [0.5, 1.0]}, "ppo.gamma": {"grid": [0.9, 0.8, 0.7]}}, trials=None))
    points = {tuple(values.values()) for values in known_points(run)}
    assert points == {(lam, gamma) for lam in (0.5, 1.0) for gamma in (0.9, 0.8, 0.7)}


def test_names_tell_the_values() -> None:
    assert trial_name(3, {"ppo.learning_rate": 1.2345e-5, "ppo.kl.coef": 0.05}) == "03-learning_rate-1.23e-05-coef-0.05"
    assert trial_name(1, {"model.path": "../a/b"}) == "01-path-.._a_b"


def test_schedulers_take_their_own_arguments(sweep: Load) -> None:
    asha = make_scheduler(run_of(sweep(scheduler={"name": "asha", "grace_period": 3, "reduction_factor": 2})))
    assert (asha._reduction_factor, asha._time_attr) == (2, "step")
    with pytest.raises(ConfigError, match=r"scheduler.grace: asha does not know it; it knows: "):
        make_scheduler(run_of(sweep(scheduler={"name": "asha", "grace_period": 3, "grace": 2})))
    with pytest.raises(ConfigError, match="Reduction Factor not valid"):
        make_scheduler(run_of(sweep(scheduler={"name": "asha", "grace_period": 3, "reduction_factor": 0.5})))
    assert make_scheduler(run_of(sweep(scheduler={"name": "median", "grace_period": 3}))) is not None


def test_optuna_takes_a_sampler_by_name(sweep: Load) -> None:
    assert make_optuna(run_of(sweep())) is None
    named = {"name": "optuna", "sampler": "RandomSampler"}
    suggested = make_optuna(run_of(sweep(algorithm=named))).suggest("a")
    assert suggested.keys() == {"ppo.learning_rate", "ppo.kl.coef"}
    with pytest.raises(ConfigError, match=r"algorithm.sampler: found: 'Sampler'; expected: one of "):
        make_optuna(run_of(sweep(algorithm={"name": "optuna", "sampler": "Sampler"})))
    with pytest.raises(ConfigError, match="Optuna refuses: "):
        make_optuna(run_of(sweep(algorithm={"name": "optuna", "sampler_arguments": {"startup": 1}})))


def test_fixed_values_hold_for_all_trials(sweep: Load) -> None:
    written = {"rollout": {"resources": {"CPU": 1}}}
    loaded = sweep(written, fixed={"ppo": {"epochs": 1}, "rollout.resources": {"GPU": 1}, "report_to": ["tensorboard"]})
    base: Any = load_base(loaded).run
    trial: Any = trial_run(run_of(loaded), {"ppo.kl.coef": 0.5}, "a", "runs").run
    for run in (base, trial):
        assert (run.ppo.epochs, run.ppo.steps, run.report_to) == (1, 8, ["tensorboard"])
        assert run.rollout.resources == {"CPU": 1, "GPU": 1}
    with pytest.raises(ConfigError, match=r"ppo.kl.coef: is in search too"):
        sweep(fixed={"ppo.kl.coef": 1})
    with pytest.raises(ConfigError, match="name: is set by the sweep"):
        sweep(fixed={"name": "x"})
