"""Which trial wins, when one is stopped, how many run at once, and what a sweep goes on from after a cut."""

import csv
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.tune.search import Searcher

from raytrl.config.load import LoadedRun, load_run
from raytrl.config.runs.sweep import TuneRun
from raytrl.launch.sweep.book import LimitWatch, TrialBook, best_trial, last_values, over_limit
from raytrl.launch.sweep.end import best_yaml, results_csv, write_end
from raytrl.launch.sweep.search import TrialSearcher, first_trials, make_optuna, make_scheduler, replay
from raytrl.launch.sweep.trial import TrialReports
from raytrl.plan import placement
from raytrl.plan.cluster import Group, Need, Node
from raytrl.records.progress import Progress
from raytrl.records.sweep import Trial
from raytrl.report.sweep_page import frontier, sweep_page
from raytrl.rundir import MetricsLog, RunDirectory

Load = Callable[..., LoadedRun]
METRIC = "objective/scores_raw"


def trial(name: str, state: str, score: float, kl: float = 0.0) -> Trial:
    values = {"ppo.learning_rate": 1e-5, "ppo.kl.coef": 0.2}
    return Trial(name, values, state, step=8, metrics={METRIC: score, "objective/kl": kl}, seconds=1.0)


def test_only_a_trial_that_ran_to_its_end_wins() -> None:
    trials = [
        trial("a", "done", 1.0),
        trial("b", "done", 2.0),
        trial("c", "over limit", 9.0),
        trial("d", "stopped", 9.0),
    ]
    assert best_trial(trials, METRIC, "max") is trials[1]
    assert best_trial(trials, METRIC, "min") is trials[0]
    assert best_trial([*trials, trial("e", "done", 2.0)], METRIC, "max") is trials[1]
    assert best_trial(trials[2:], METRIC, "max") is None


def test_a_trial_is_stopped_when_it_stays_over_the_limit() -> None:
    watch = LimitWatch({"objective/kl": 10.0}, 3)
    kls = [9.0, 11.0, 12.0, 9.0, 11.0, 12.0, 12.0]
    answers = [watch.take(step, {"objective/kl": kl}) for step, kl in enumerate(kls)]
    assert answers[:-1] == [""] * 6
    assert answers[-1] == "objective/kl 12 > 10, 3 values in a row"
    assert over_limit({"objective/kl": 10.0}, {"objective/kl": 10.0}) == ""
    assert over_limit({"objective/kl": 10.5}, {"objective/kl": 10.0}) == "objective/kl 10.5 > 10"


def test_a_noisy_metric_counts_by_the_mean_of_its_last_values() -> None:
    rows = [{"a": 1.0}, {"a": 2.0, "b": 5.0}, {"a": 4.0}]
    assert last_values(rows, ["a", "b", "c"]) == {"a": 4.0, "b": 5.0}
    assert last_values(rows, ["a", "b", "c"], 2) == {"a": 3.0, "b": 5.0}


def test_steps_that_are_redone_count_once_towards_the_limit() -> None:
    watch = LimitWatch({"objective/kl": 10.0}, 3)
    assert not any(watch.take(step, {"objective/kl": 11.0}) for step in (1, 2, 1, 2, 1, 2))
    assert watch.take(3, {"objective/kl": 11.0})


def test_as_many_trials_as_nodes_have_room_for() -> None:
    def trials_that_fit(
        shared: list[dict[str, float]], trial: list[dict[str, float]], nodes: list[dict[str, float]], most: int
    ) -> int:
        needs = (Need(tuple(Group(str(i), 1, r) for i, r in enumerate(part))) for part in (shared, trial))
        placements = placement.place_trials(*needs, [Node(str(i), r) for i, r in enumerate(nodes)], most)
        return max(0, len(placements) - 1)

    trial_of_3: list[dict[str, float]] = [{"CPU": 1}, {"CPU": 2}]
    assert trials_that_fit([], trial_of_3, [{"CPU": 8}], 99) == 2
    assert trials_that_fit([{"CPU": 1}], trial_of_3, [{"CPU": 8}], 99) == 2
    assert trials_that_fit([{"CPU": 2.5}], trial_of_3, [{"CPU": 8}], 99) == 1
    assert trials_that_fit([], trial_of_3, [{"CPU": 8}], 1) == 1
    assert trials_that_fit([], [{"CPU": 2}], [{"CPU": 3}, {"CPU": 3}], 99) == 2  # not 3: no process is cut in halves
    assert trials_that_fit([], [{"CPU": 1, "GPU": 1}], [{"CPU": 8, "GPU": 2}, {"CPU": 8}], 99) == 2
    assert trials_that_fit([{"GPU": 1}], [{"CPU": 1}], [{"CPU": 8}], 99) == 0
    assert trials_that_fit([], [{"CPU": 0.1}] * 3, [{"CPU": 0.9}], 99) == 3  # sums of tenths are not exact


@pytest.fixture
def book(sweep: Load) -> TrialBook:
    """Four trials: done with 2.0, stopped with 1.0, running when the sweep was cut off, and waiting."""
    run = sweep().run
    assert isinstance(run, TuneRun)
    book = TrialBook(run, RunDirectory(run.output_dir, run.name))
    book.add(first_trials(run))
    names = [each.name for each in book.all]
    for name, score in zip(names[:3], (2.0, 1.0, 3.0), strict=True):
        rows = [{"step": step, METRIC: score * step / 4} for step in (1, 2, 3, 4)]
        book.directory(name).write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    book.end(names[0], "done", "", 5.0)
    book.end(names[1], "stopped", "by asha at step 4", 5.0)
    book.change(names[2], state="running")
    return book


def reopened(book: TrialBook) -> TrialBook:
    again = TrialBook(book._run, book._run_dir)
    again.take_up_again()
    return again


def test_finished_trials_stay_finished_and_the_others_get_their_turn(book: TrialBook) -> None:
    again = reopened(book)
    assert [each.state for each in again.all] == ["done", "stopped", "waiting", "waiting"]
    assert [each.values for each in again.all] == [each.values for each in book.all]
    searcher = TrialSearcher(book._run, again, None, lambda trial: None)
    suggested = [searcher.suggest(name) for name in "ab"]
    assert [s["loaded"].run.name for s in suggested] == [each.name for each in again.all[2:]]
    assert searcher.suggest("c") == Searcher.FINISHED


def test_a_trial_that_finished_while_nobody_looked_is_done(book: TrialBook) -> None:
    running = book.all[2]
    book.directory(running.name).update_manifest(state="done")
    again = reopened(book)
    assert again[running.name].state == "done"
    assert again[running.name].metrics[METRIC] == 3.0


def test_a_failed_trial_is_tried_again(book: TrialBook) -> None:
    book.end(book.all[2].name, "failed", "no memory", 1.0)
    assert reopened(book).all[2].state == "waiting"


def test_a_done_trial_over_the_limit_or_without_the_metric_is_not_done(sweep: Load) -> None:
    run = sweep(limit={"objective/kl": 5.0}).run
    assert isinstance(run, TuneRun)
    book = TrialBook(run, RunDirectory(run.output_dir, run.name))
    book.add(first_trials(run))
    over, without = book.all[0].name, book.all[1].name
    book.directory(over).write("metrics.jsonl", json.dumps({"step": 1, METRIC: 1.0, "objective/kl": 6.0}) + "\n")
    assert book.end(over, "done", "", 1.0).cause == "objective/kl 6 > 5 at the end"
    assert book[over].state == "over limit"
    assert book.end(without, "done", "", 1.0).state == "failed"


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_one_never_wins(value: float, mode: str, sweep: Load) -> None:
    run = sweep(limit={"objective/kl": 5.0}, mode=mode).run
    assert isinstance(run, TuneRun)
    book = TrialBook(run, RunDirectory(run.output_dir, run.name))
    book.add(first_trials(run))
    odd, good, kl, _ = (each.name for each in book.all)
    for name, score, distance in ((odd, value, 1.0), (good, 1.0, 1.0), (kl, 2.0, math.nan)):
        book.directory(name).write("manifest.json", "{}")
        log = MetricsLog(book.directory(name))
        log.append({"step": 1, METRIC: 1.0, "objective/kl": 1.0})
        log.append({"step": 2, METRIC: score, "objective/kl": distance})
        book.end(name, "done", "", 1.0)
    assert (book[odd].state, book[good].state, book[kl].state) == ("failed", "done", "failed")
    assert book[odd].cause == f"{METRIC} nan at the end: not a finite number"
    assert METRIC not in book[odd].metrics
    assert book[kl].cause == "objective/kl nan at the end: not a finite number"
    assert best_trial(book.all, METRIC, mode) == book[good]
    for file in ("trials.json", f"trials/{odd}/metrics.jsonl"):
        assert not re.search("NaN|Infinity", book._run_dir.read(file) or "")
    assert f"{METRIC} nan" in results_csv(book.all, list(run.search))


def test_a_sweep_of_before_with_nan_in_its_book_has_another_best() -> None:
    trials = [trial("a", "done", math.nan), trial("b", "done", 1.0), trial("c", "done", math.inf)]
    assert best_trial(trials, METRIC, "max") is best_trial(trials, METRIC, "min") is trials[1]
    assert best_trial(trials[::2], METRIC, "max") is None


def test_nan_is_over_every_limit() -> None:
    assert over_limit({"objective/kl": math.nan}, {"objective/kl": 10.0}) == "objective/kl nan > 10"
    watch = LimitWatch({"objective/kl": 10.0}, 2)
    assert [watch.take(step, {"objective/kl": math.nan}) for step in (1, 2)] == [
        "",
        "objective/kl nan > 10, 2 values in a row",
    ]


def test_schedulers_and_optuna_see_finite_numbers_only(book: TrialBook, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", reported.append)
    reports = TrialReports(book._run, book.directory("x"))
    for step, value in enumerate((1.0, math.nan, -math.inf, 2.0), 1):
        reports.show(Progress("step", step, 5, metrics={METRIC: value}))
    assert reported == [{"step": 1, METRIC: 1.0}, {"step": 4, METRIC: 2.0}]
    reports.show(Progress("step", 5, 5, metrics={METRIC: math.nan}))
    assert reports.last == {"step": 5}
    heard: list[Any] = []
    scheduler = SimpleNamespace(on_trial_add=lambda *_: None, on_trial_result=lambda _, __, row: heard.append(row))
    book.directory(book.all[0].name).write(
        "metrics.jsonl", f'{{"step": 1, "{METRIC}": NaN}}\n{{"step": 2, "{METRIC}": 3}}\n'
    )
    replay(scheduler, book._run.model_copy(update={"scheduler": SimpleNamespace(name="asha")}), book)
    assert heard[0] == {"step": 2, METRIC: 3}
    searcher = TrialSearcher(book._run, book, None, lambda trial: None)
    assert searcher._value(trial("a", "done", math.nan)) is None
    assert searcher._value(trial("a", "done", 2.0)) == 2.0


def test_a_scheduler_knows_the_trials_of_before_the_cut(sweep: Load, book: TrialBook) -> None:
    run = book._run.model_copy(update={"scheduler": sweep(scheduler={"name": "asha", "grace_period": 2}).run.scheduler})
    scheduler = make_scheduler(run)
    replay(scheduler, run, reopened(book))
    rungs = scheduler._brackets[0]._rungs
    recorded = {milestone: sorted(values.values()) for milestone, values in rungs if values}
    assert recorded == {2: [0.5, 1.0]}


def test_optuna_knows_the_trials_of_before_the_cut(sweep: Load, book: TrialBook) -> None:
    run = book._run.model_copy(update={"algorithm": sweep(algorithm={"name": "optuna"}).run.algorithm, "trials": 6})
    again, optuna = reopened(book), make_optuna(run)
    searcher = TrialSearcher(run, again, optuna, lambda trial: None)
    assert [t.value for t in optuna._ot_study.trials] == [2.0, 1.0]
    names = [searcher.suggest(str(number))["loaded"].run.name for number in range(4)]
    assert names[:2] == [each.name for each in again.all[2:4]]
    assert searcher.suggest("4") == Searcher.FINISHED
    assert len(reopened(again)) == 6  # new ones are on disk before they start
    searcher.on_trial_complete("0", {"end": "done"})
    searcher.on_trial_complete("2", {"end": "failed"})
    assert [t.state.name for t in optuna._ot_study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "RUNNING", "COMPLETE"]


def test_a_metric_that_the_run_does_not_log_fails_the_trial_at_its_first_step(book: TrialBook) -> None:
    reports = TrialReports(book._run, book.directory("x"))
    with pytest.raises(Exception, match="does not log 'objective/scores_raw'; it logs, for example: objective/scores"):
        reports.show(Progress("step", 1, 4, metrics={"objective/scores": 1.0}))


def test_results_and_the_best_run_file(book: TrialBook) -> None:
    rows = list(csv.DictReader(io.StringIO(results_csv(book.all, list(book._run.search)))))
    assert [row["state"] for row in rows] == ["done", "stopped", "running", "waiting"]
    assert float(rows[0]["ppo.learning_rate"]) == book.all[0].values["ppo.learning_rate"]
    file = book._run_dir.at("best.yaml")
    book._run_dir.write("best.yaml", best_yaml(book._run, book.all[0]))
    best: Any = load_run(file, [], "ppo").run
    assert best.name == "sweep-best"
    assert best.ppo.learning_rate == book.all[0].values["ppo.learning_rate"]
    assert yaml.safe_load(book._run_dir.read("best.yaml") or "")["ppo"]["steps"] == 8


def test_the_frontier_holds_what_nobody_beats() -> None:
    points = [(1.0, 1.0), (2.0, 0.5), (2.0, 3.0), (3.0, 3.0), (4.0, 4.0)]
    assert frontier(points, "max") == [(1.0, 1.0), (2.0, 3.0), (4.0, 4.0)]
    assert frontier(points, "min") == [(1.0, 1.0), (2.0, 0.5)]


def test_the_page_stands_alone(book: TrialBook) -> None:
    best = book.all[0].name
    curves = {each.name: [(1, 0.5), (2, 1.0)] for each in book.all[:2]}
    page = sweep_page(book._run, book.all, best, curves)
    assert page.count("<svg") == 2  # no KL was logged
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page
    assert best in page


@pytest.mark.parametrize(("mode", "better"), [("max", "up"), ("min", "down")])
def test_every_picture_has_a_heading(sweep: Load, mode: str, better: str) -> None:
    run = sweep(mode=mode).run
    assert isinstance(run, TuneRun)
    trials = [
        Trial(
            f"0{i}",
            {"ppo.learning_rate": 1e-5 * i, "ppo.kl.coef": 0.1 * i},
            "done",
            step=4,
            metrics={METRIC: 1.0, "objective/kl": i},
        )
        for i in (1, 2)
    ]
    page = sweep_page(run, trials, "01", {"01": [(1, 0.5)], "02": [(1, 1.0)]})
    assert re.findall("<figure><h2>(.*?)</h2>", page) == [
        "Learning curves",
        f"{METRIC} against KL: {better} and left is better",
        f"{METRIC} by the searched values",
    ]


def test_a_sweep_that_is_made_anew_leaves_no_link_to_an_old_model(book: TrialBook) -> None:
    run_dir, best = book._run_dir, book.all[0]
    book.directory(best.name).write("model/config.json", "{}")
    run_dir.update_manifest(state="done")
    assert write_end(book._run, book, best, run_dir) == write_end(book._run, book, best, run_dir)
    assert run_dir.read("model/config.json") == "{}"
    run_dir.clear()
    assert not Path(run_dir.at("model")).is_symlink()
    assert not run_dir.exists("trials")


def test_optuna_goes_on_after_values_that_do_not_fit_together(sweep: Load) -> None:
    search = {"ppo.batch_size": {"choice": [16, 20]}, "ppo.minibatches": {"choice": [2, 8]}}
    sampler = {"name": "optuna", "sampler": "RandomSampler"}
    run = sweep(search=search, trials=12, algorithm=sampler).run
    assert isinstance(run, TuneRun)
    book, refused = TrialBook(run, RunDirectory(run.output_dir, run.name)), []
    searcher = TrialSearcher(run, book, make_optuna(run), refused.append)
    while searcher.suggest(f"id-{len(book)}") != Searcher.FINISHED:
        pass
    assert 0 < len(refused) < 12
    assert {tuple(trial.values.values()) for trial in refused} == {(20, 8)}
    assert "expected: a multiple of minibatches" in refused[0].cause
