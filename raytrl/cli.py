"""The command line. Parses first and imports late, so that help and config errors answer at once."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer
from rich.markup import escape

from raytrl import commands
from raytrl.commands import err, out
from raytrl.config.sections.algorithms import PRESETS
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
    _guarded(lambda: commands.quickstart(output_dir, overrides or [], fresh), debug)


@app.command()
def sft(config: File, overrides: Overrides = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """Supervised fine-tuning with TRL's SFTTrainer."""
    _guarded(lambda: commands.train("sft", config, overrides, fresh), debug)


@app.command()
def reward(config: File, overrides: Overrides = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """A reward model from preference pairs, with TRL's RewardTrainer."""
    _guarded(lambda: commands.train("reward", config, overrides, fresh), debug)


@app.command()
def dpo(config: File, overrides: Overrides = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """Direct preference optimisation with TRL's DPOTrainer."""
    _guarded(lambda: commands.train("dpo", config, overrides, fresh), debug)


@app.command()
def ppo(config: File, overrides: Overrides = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """PPO, GRPO and their kin (`ppo.algorithm`), against reward models, rules or endpoints."""
    _guarded(lambda: commands.train("ppo", config, overrides, fresh), debug)


def _refer_to_ppo(algorithm: str) -> None:
    """Answers `raytrl grpo FILE` with the command that is meant."""

    @app.command(algorithm, hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def refer(context: typer.Context) -> None:
        words = " ".join(["raytrl ppo", *context.args, f"ppo.algorithm={algorithm}"])
        err.print(f"[bold red]error:[/] {algorithm} is an algorithm of `raytrl ppo`: `{escape(words)}`", soft_wrap=True)
        raise typer.Exit(2)


for _algorithm in PRESETS.keys() - {"ppo"}:
    _refer_to_ppo(_algorithm)


@app.command("eval")
def evaluate(config: File, overrides: Overrides = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """Scores a model's responses, alone or against a second model."""
    _guarded(lambda: commands.evaluate(config, overrides, fresh), debug)


@app.command()
def tune(config: File, overrides: Overrides = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """A sweep over any settings of a run file with Ray Tune, to a table, pictures and the best model."""
    _guarded(lambda: commands.tune(config, overrides, fresh), debug)


@app.command()
def serve(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN_DIR|CONFIG", help="a finished run, a model's folder, or a run file", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as serve.port=8001", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """A finished model behind HTTP until Ctrl-C: a policy by OpenAI's API, a reward model by POST /score."""
    _guarded(lambda: commands.serve(run, overrides), debug)


@app.command()
def report(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="such as runs/my-run", show_default=False)],
    debug: Debug = False,
) -> None:
    """Writes report.html of a run, finished or not: curves, responses, settings."""

    def work() -> None:
        from raytrl.report.run_page import write_run_page
        from raytrl.rundir import RunDirectory

        out.print(write_run_page(RunDirectory.named(run_dir)), soft_wrap=True)

    _guarded(work, debug)


@app.command()
def push(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="of a finished run", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name, or name", show_default=False)],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="of a LoRA run the adapter alone, not the merged model")
    ] = False,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="who sees a new repository: only you, unless --public"),
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="made where there is none")] = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[=PATH]", help="a variable, or a file, that holds it; default: HF_TOKEN, or `hf auth login`"
        ),
    ] = None,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only show what would be sent")] = False,
    debug: Debug = False,
) -> None:
    """Sends a finished run's model, with its card, to the Hugging Face Hub."""

    def work() -> None:
        from raytrl.roles.models.push import Destination

        commands.push(run_dir, adapter, Destination(repo, private, revision, message), token, dry_run)

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
    _guarded(lambda: commands.submit(words, address, not no_wait, env or [], secret or []), debug)


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
    _guarded(lambda: commands.plan(config, overrides or [], cluster or [], models), debug)


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
            commands.wide_in_a_pipe().print(values_table(loaded))
            return
        for shown in described_values(loaded, one_line=not out.is_terminal):
            out.print(shown, soft_wrap=not out.is_terminal)

    _guarded(work, debug)


@config_app.command("schema")
def config_schema(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="sft, reward, dpo, ppo, eval, tune or serve", show_default=False)
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


def main() -> None:
    try:
        os.getcwd()
    except OSError:  # every library below would fail of it, in words of its own
        err.print(
            "[bold red]error:[/] the working directory is gone (deleted, or on a disk that is); cd to one that is there"
        )
        raise SystemExit(2) from None
    app(prog_name="raytrl")  # also where it was started as `python -m raytrl`
