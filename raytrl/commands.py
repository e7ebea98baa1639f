"""What each command of the command line does: load the run file, run it, show what came. Imports late."""

import shlex
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from raytrl.roles.models.push import Destination

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def train(kind: str, file: str, overrides: list[str] | None, fresh: bool) -> None:
    from raytrl.config.load import load_run

    loaded = load_run(file, overrides or [], kind)
    from raytrl.launch.runs.run import kind_of, run_to_end
    from raytrl.records.outcome import Trained
    from raytrl.report.progress import Display, summary

    _stop_on_sigterm()
    with Display(out, f"{kind} {loaded.run.name}") as display:
        outcome = run_to_end(kind_of(loaded), _command(), fresh, display.show)
    assert isinstance(outcome, Trained)
    if outcome.already_done:
        out.print("this run is finished already; --fresh trains it anew")
    wide_in_a_pipe().print(summary(outcome, _page_of(loaded)))


def evaluate(file: str, overrides: list[str] | None, fresh: bool) -> None:
    from raytrl.config.load import load_run

    loaded = load_run(file, overrides or [], "eval")
    from raytrl.launch.runs.run import kind_of, run_to_end
    from raytrl.records.outcome import Evaluated
    from raytrl.report.evaluation import evaluation_tables
    from raytrl.report.progress import Display

    _stop_on_sigterm()
    with Display(out, f"eval {loaded.run.name}") as display:
        outcome = run_to_end(kind_of(loaded), _command(), fresh, display.show)
    assert isinstance(outcome, Evaluated)
    if outcome.already_done:
        out.print("this evaluation is finished already; --fresh does it anew")
    for table in evaluation_tables(outcome.results, outcome.samples):
        out.print(table)
    out.print(f"report    {_page_of(loaded)}", soft_wrap=True, markup=False)


def serve(place: str, overrides: list[str] | None) -> None:
    from raytrl.config.load import load_run

    loaded = load_run(place, overrides or [], "serve")
    from raytrl.launch.runs.run import run_to_end
    from raytrl.launch.runs.serve import ServeKind
    from raytrl.report.progress import Display

    _stop_on_sigterm()
    with Display(out, f"serve {loaded.run.name}") as display:
        outcome = run_to_end(ServeKind(loaded), _command(), True, display.show)
    if outcome.cut_off:
        out.print(f"[yellow]{outcome.cut_off} requests were not finished in time (serve.drain_s)[/]")
    out.print("stopped")


def _command() -> str:
    """What the user typed."""
    return shlex.join(["raytrl", *sys.argv[1:]])


def _page_of(loaded: Any) -> str:
    """Writes a run's report page; where it lies."""
    from raytrl.report.run_page import write_run_page
    from raytrl.rundir import RunDirectory

    return write_run_page(RunDirectory(loaded.run.output_dir, loaded.run.name))


def plan(file: str, overrides: list[str], cluster: list[str], models: str) -> None:
    from raytrl.config.load import load_run

    loaded = load_run(file, overrides, elsewhere=bool(cluster))
    from raytrl.launch.session.session import planned_cluster
    from raytrl.plan.plan import RULE
    from raytrl.plan.plan import plan as planned
    from raytrl.report.plan import plan_view

    out.print(plan_view(planned(loaded, planned_cluster(loaded.run, cluster), models)))
    out.print(f"[dim]{RULE}[/]")


def push(run_dir: str, adapter: bool, to: "Destination", token: str | None, dry_run: bool) -> None:
    from raytrl.roles.models.push import check_repo, package_of, send, token_of
    from raytrl.rundir import RunDirectory

    def tell(text: str) -> None:
        out.print(text, soft_wrap=True, markup=False)

    check_repo(to.repo)
    secret = None if dry_run and token is None else token_of(token)
    with package_of(RunDirectory.named(run_dir), adapter) as package:
        for name, size in package.sizes().items():
            tell(f"{size:>16,}  {name}")
        tell(f"{sum(package.sizes().values()):>16,}  bytes to {to.repo}")
        if package.left_out:
            tell(f"not sent, no part of a model: {', '.join(package.left_out)}")
        if package.shortened:
            tell(f"of {package.shortened} local paths and addresses in README.md only the last part is sent")
        if dry_run:
            tell("nothing was sent (--dry-run)")
            return
        assert secret is not None
        try:
            tell(send(package, to, secret, tell))
        except KeyboardInterrupt:
            err.print("interrupted; the same command sends what is missing")
            raise typer.Exit(130) from None


def submit(words: list[str], address: str | None, wait: bool, env: list[str], secret: list[str]) -> None:
    from raytrl.launch.jobs import jobs

    submission = jobs.prepare(words, env, secret)
    client = jobs.connect(address)
    job = jobs.job_of(client, submission)
    if job is not None:
        out.print(f"{job} is at this run already", soft_wrap=True)
    else:
        out.print(f"sending   {submission.package}", soft_wrap=True, markup=False)
        job = jobs.submit(client, submission)
        out.print(f"job       {job}", soft_wrap=True)
    if not wait:
        out.print(f"follow it with the same command without --no-wait, or: ray job logs --follow {job}", soft_wrap=True)
        return
    try:
        jobs.follow(client, job, lambda text: out.out(text, end="", highlight=False))
    except KeyboardInterrupt:
        _stop_or_leave(client, job)
    status, text = jobs.outcome(client, job)
    if text:
        err.print(text, soft_wrap=True, markup=False)
    raise typer.Exit(status)


def _stop_or_leave(client: Any, job: str) -> None:
    from raytrl.launch.jobs import jobs

    if sys.stdin.isatty() and typer.confirm(f"\nstop {job}? (no: it goes on without this terminal)"):
        jobs.stop(client, job)
        return
    err.print(f"{job} goes on; the same command follows it again; ray job stop {job} ends it", soft_wrap=True)
    raise typer.Exit(130)


def tune(file: str, overrides: list[str] | None, fresh: bool) -> None:
    from raytrl.config.load import load_run

    loaded = load_run(file, overrides or [], "tune")
    from raytrl.launch.runs.run import run_to_end
    from raytrl.launch.sweep.sweep import SweepKind
    from raytrl.records.metrics import KL
    from raytrl.report.sweep import SweepDisplay, sweep_summary, trials_table
    from raytrl.report.sweep_page import write_sweep_page
    from raytrl.rundir import RunDirectory

    _stop_on_sigterm()
    kind = SweepKind(loaded)
    run, columns = kind.run, list(dict.fromkeys([kind.run.metric, *kind.run.limit, KL]))
    with SweepDisplay(out, f"tune {run.name}", columns) as display:
        kind.show_trials = display.show_trials
        outcome = run_to_end(kind, _command(), fresh, display.show)
    run_dir = RunDirectory(run.output_dir, run.name)
    if outcome.already_done:
        out.print("this sweep is finished already; --fresh makes it anew")
    else:
        write_sweep_page(run, outcome.trials, outcome.best, run_dir)
    wide_in_a_pipe().print(trials_table(outcome.trials, columns, outcome.best))
    out.print(sweep_summary(outcome, run_dir.exists(f"trials/{outcome.best}/tensorboard")))


def quickstart(output_dir: str, overrides: list[str], fresh: bool) -> None:
    from contextlib import contextmanager

    from raytrl.launch.runs import quickstart as stages_of
    from raytrl.records.outcome import Evaluated
    from raytrl.report.evaluation import samples_table
    from raytrl.report.progress import Display
    from raytrl.report.quickstart import how_to_serve, paths_table, stages_table
    from raytrl.report.run_page import write_run_page
    from raytrl.rundir import RunDirectory

    _stop_on_sigterm()

    @contextmanager
    def showing(title: str) -> Iterator[Callable[[Any], None]]:
        out.print(f"[bold]{escape(title)}[/]", soft_wrap=True)
        with Display(out, title.split()[0]) as display:
            yield display.show

    stages = {stage.kind: stage for stage in stages_of.quickstart(output_dir, overrides, fresh, showing)}
    last = stages["eval"].outcome
    assert isinstance(last, Evaluated)
    out.rule("done", align="left")
    out.print(samples_table(last.samples, titles={"compare": "before PPO", "model": "after PPO"}))
    rows = {kind: stage.rows for kind, stage in stages.items()}
    out.print(stages_table(rows, last.results, {kind: stage.seconds for kind, stage in stages.items()}))
    for stage in stages:
        write_run_page(RunDirectory(output_dir, stage))
    out.print(paths_table(output_dir))
    out.print(how_to_serve(output_dir, str(last.samples[0]["prompt"])), soft_wrap=True, markup=False)


def _stop_on_sigterm() -> None:
    """A stopped job or a full queue slot ends the run as Ctrl-C does: Ray is taken down, checkpoints stay."""
    import signal

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def wide_in_a_pipe() -> Console:
    """The console for a table; a pipe has no width, and grep sees each row on one line."""
    return out if out.is_terminal else Console(highlight=False, width=10_000)
