"""The command line. Parses first and imports late, so that help and config errors answer at once."""

import json
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from raytrl.errors import RaytrlError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-training on Ray: fine-tune, train reward models, align. One YAML file is one run.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at run files without running them.")
app.add_typer(config_app, name="config")

File = Annotated[str, typer.Argument(metavar="CONFIG", help="the run file (YAML)", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="such as training.learning_rate=1e-5", show_default=False),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="throw away what the run directory holds and start anew")]
Debug = Annotated[bool, typer.Option("--debug", help="show the full traceback of an error")]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def _guarded(work: Callable[[], None], debug: bool) -> None:
    """Runs a command's work; an error becomes one message and an exit status (2: not started, 1: failed)."""
    try:
        work()
    except RaytrlError as error:
        if debug:
            traceback.print_exc()
        for line in str(error).splitlines():
            err.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True)
        raise typer.Exit(error.exit_status) from None
    except KeyboardInterrupt:
        err.print("interrupted; the same command continues from the last checkpoint")
        raise typer.Exit(130) from None


def _train(kind: str, file: str, overrides: list[str] | None, fresh: bool) -> None:
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
    out.print(summary(outcome))
    _write_page(loaded)


def _evaluate(file: str, overrides: list[str] | None, fresh: bool) -> None:
    from raytrl.config.load import load_run

    loaded = load_run(file, overrides or [], "eval")
    from raytrl.launch.runs.evaluation import EvalKind
    from raytrl.launch.runs.run import run_to_end
    from raytrl.report.evaluation import results_table, samples_table
    from raytrl.report.progress import Display

    _stop_on_sigterm()
    with Display(out, f"eval {loaded.run.name}") as display:
        outcome = run_to_end(EvalKind(loaded), _command(), fresh, display.show)
    if outcome.already_done:
        out.print("this evaluation is finished already; --fresh does it anew")
    out.print(samples_table(outcome.samples))
    out.print(results_table(outcome.results))
    _write_page(loaded)


def _command() -> str:
    """What the user typed."""
    return shlex.join(["raytrl", *sys.argv[1:]])


def _write_page(loaded: Any) -> None:
    from raytrl.report.run_page import write_run_page
    from raytrl.rundir import RunDirectory

    out.print(f"report    {write_run_page(RunDirectory(loaded.run.output_dir, loaded.run.name))}", soft_wrap=True)


def _plan(file: str, overrides: list[str], cluster: list[str], models: str) -> None:
    from raytrl.config.load import load_run

    loaded = load_run(file, overrides)
    from raytrl.launch.session.session import planned_cluster
    from raytrl.plan.plan import RULE, plan
    from raytrl.report.plan import plan_view

    out.print(plan_view(plan(loaded, planned_cluster(loaded.run, cluster), models)))
    out.print(f"[dim]{RULE}[/]")


def _submit(words: list[str], address: str | None, wait: bool, env: list[str], secret: list[str]) -> None:
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


def _tune(file: str, overrides: list[str] | None, fresh: bool) -> None:
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
    _wide_in_a_pipe().print(trials_table(outcome.trials, columns, outcome.best))
    out.print(sweep_summary(outcome, run_dir.exists(f"trials/{outcome.best}/tensorboard")))


def _quickstart(output_dir: str, overrides: list[str], fresh: bool) -> None:
    from contextlib import contextmanager

    from raytrl.launch.runs.quickstart import quickstart
    from raytrl.records.outcome import Evaluated
    from raytrl.report.evaluation import samples_table
    from raytrl.report.progress import Display
    from raytrl.report.quickstart import paths_table, stages_table
    from raytrl.report.run_page import write_run_page
    from raytrl.rundir import RunDirectory

    _stop_on_sigterm()

    @contextmanager
    def showing(title: str) -> Iterator[Callable[[Any], None]]:
        out.print(f"[bold]{escape(title)}[/]", soft_wrap=True)
        with Display(out, title.split()[0]) as display:
            yield display.show

    stages = {stage.kind: stage for stage in quickstart(output_dir, overrides, fresh, showing)}
    last = stages["eval"].outcome
    assert isinstance(last, Evaluated)
    out.rule("done", align="left")
    out.print(samples_table(last.samples, titles={"compare": "before PPO", "model": "after PPO"}))
    rows = {kind: stage.rows for kind, stage in stages.items()}
    out.print(stages_table(rows, last.results, {kind: stage.seconds for kind, stage in stages.items()}))
    for stage in stages:
        write_run_page(RunDirectory(output_dir, stage))
    out.print(paths_table(output_dir))


def _stop_on_sigterm() -> None:
    """A stopped job or a full queue slot ends the run as Ctrl-C does: Ray is taken down, checkpoints stay."""
    import signal

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def _show_versions(asked: bool) -> None:
    if not asked:
        return
    from raytrl.versions import versions

    found = versions()
    out.print(f"raytrl {found.pop('raytrl')}")
    out.print(", ".join(f"{name} {version}" for name, version in found.items()), soft_wrap=True)
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_versions, is_eager=True, help="show it, and those of Ray, TRL and others"
        ),
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="such as ppo.ppo.steps=8", show_default=False),
    ] = None,
    output_dir: Annotated[
        str, typer.Option("--output-dir", help="where run files, data and runs go")
    ] = "runs/quickstart",
    fresh: Fresh = False,
    debug: Debug = False,
) -> None:
    """From nothing to an aligned model on this machine: SFT, reward model, PPO, evaluation; data included."""
    _guarded(lambda: _quickstart(output_dir, overrides or [], fresh), debug)


@app.command()
def sft(config: File, overrides: Overrides = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """Supervised fine-tuning with TRL's SFTTrainer."""
    _guarded(lambda: _train("sft", config, overrides, fresh), debug)


@app.command()
def reward(config: File, overrides: Overrides = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """A reward model from preference pairs, with TRL's RewardTrainer."""
    _guarded(lambda: _train("reward", config, overrides, fresh), debug)


@app.command()
def dpo(config: File, overrides: Overrides = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """Direct preference optimisation with TRL's DPOTrainer."""
    _guarded(lambda: _train("dpo", config, overrides, fresh), debug)


@app.command()
def ppo(config: File, overrides: Overrides = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """PPO against reward models, rules or endpoints, with rollout and reward actors."""
    _guarded(lambda: _train("ppo", config, overrides, fresh), debug)


@app.command("eval")
def evaluate(config: File, overrides: Overrides = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """Scores a model's responses, alone or against a second model."""
    _guarded(lambda: _evaluate(config, overrides, fresh), debug)


@app.command()
def tune(config: File, overrides: Overrides = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """A sweep over any settings of a run file with Ray Tune, to a table, pictures and the best model."""
    _guarded(lambda: _tune(config, overrides, fresh), debug)


@app.command()
def report(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="such as runs/my-run", show_default=False)],
    debug: Debug = False,
) -> None:
    """Writes report.html of a run, finished or not: curves, responses, settings."""

    def work() -> None:
        from raytrl.report.run_page import write_run_page
        from raytrl.rundir import RunDirectory

        parent, _, name = run_dir.rstrip("/").rpartition("/")
        out.print(write_run_page(RunDirectory(parent or ".", name)), soft_wrap=True)

    _guarded(work, debug)


@app.command()
def submit(
    words: Annotated[list[str], typer.Argument(metavar="-- KIND CONFIG [KEY=VALUE]...", show_default=False)],
    address: Annotated[
        str | None, typer.Option(help="http://head:8265; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="return as soon as the job is started")] = False,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="a variable of the job; Ray shows it to others")
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=PATH]", help="a variable that the cluster, or a file there, holds"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Runs a command as a Ray job with this folder's files, follows its log, ends with its exit status."""
    _guarded(lambda: _submit(words, address, not no_wait, env or [], secret or []), debug)


@app.command("plan")
def plan_command(
    config: File,
    overrides: Overrides = None,
    cluster: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=N,…", help="plan for nodes=2,gpus=8,gpu_gib=80,cpus=64,mem_gib=512; may be repeated"),
    ] = None,
    models: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="holds <model path>/config.json of models that are not on this machine"),
    ] = "",
    debug: Debug = False,
) -> None:
    """What would run where, whether it fits, how large a step is. Starts nothing."""
    _guarded(lambda: _plan(config, overrides or [], cluster or [], models), debug)


@config_app.command("show")
def config_show(
    config: File,
    overrides: Overrides = None,
    describe: Annotated[bool, typer.Option("--describe", help="and what each key means")] = False,
    debug: Debug = False,
) -> None:
    """Every value of a run file and where it comes from."""

    def work() -> None:
        from raytrl.config.load import load_run
        from raytrl.report.config import described_values, values_table

        loaded = load_run(config, overrides or [])
        if not describe:
            _wide_in_a_pipe().print(values_table(loaded))
            return
        for shown in described_values(loaded, one_line=not out.is_terminal):
            out.print(shown, soft_wrap=not out.is_terminal)

    _guarded(work, debug)


@config_app.command("schema")
def config_schema(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="sft, reward, dpo, ppo, eval or tune", show_default=False)
    ],
) -> None:
    """The JSON schema of a kind of run file, for editors."""

    def work() -> None:
        from raytrl.config.kinds import RUNS
        from raytrl.config.schema import json_schema
        from raytrl.errors import ConfigError

        if kind not in RUNS:
            raise ConfigError(f"{kind!r}: no such kind of run; expected: one of {', '.join(RUNS)}")
        sys.stdout.write(json.dumps(json_schema(kind), indent=2) + "\n")

    _guarded(work, False)


def _wide_in_a_pipe() -> Console:
    """The console for a table; a pipe has no width, and grep sees each row on one line."""
    return out if out.is_terminal else Console(highlight=False, width=10_000)


def main() -> None:
    app(prog_name="raytrl")  # also where it was started as `python -m raytrl`
