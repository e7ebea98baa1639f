"""What a finished sweep leaves beside its trials: results.csv, best.yaml, and the best trial's model in place."""

import csv
import io
import os
from collections.abc import Sequence

from raytrl.config.runs.sweep import TuneRun
from raytrl.config.trials import trial_run
from raytrl.launch.sweep.book import TrialBook
from raytrl.records.sweep import Trial
from raytrl.rundir import RunDirectory


def write_end(run: TuneRun, book: TrialBook, best: Trial, run_dir: RunDirectory) -> str:
    """Writes all of it; returns where the best model is."""
    run_dir.write("results.csv", results_csv(book.all, list(run.search)))
    run_dir.write("best.yaml", best_yaml(run, best))
    if not run_dir.is_local:
        return f"{run_dir}/trials/{best.name}/model"
    link = run_dir.at("model")
    if os.path.islink(link):
        os.remove(link)
    os.symlink(f"trials/{best.name}/model", link)
    return f"{run_dir}/model"


def results_csv(trials: Sequence[Trial], keys: Sequence[str]) -> str:
    """A line a trial: its values, state, last metrics, seconds."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *keys, "state", "step", *names, "seconds", "cause"])
    for trial in trials:
        values = [trial.values[key] for key in keys]
        metrics = [trial.metrics.get(name, "") for name in names]
        writer.writerow([trial.name, *values, trial.state, trial.step, *metrics, f"{trial.seconds:.1f}", trial.cause])
    return text.getvalue()


def best_yaml(run: TuneRun, best: Trial) -> str:
    """A run file with every value of the best trial, which trains it once more under a name of its own."""
    loaded = trial_run(run, best.values, f"{run.name}-best", run.output_dir)
    found = f"{run.metric} {best.metrics[run.metric]:.6g}"
    return f"# The best of the sweep {run.name}: trial {best.name}, {found} at step {best.step}.\n{loaded.as_yaml()}"
