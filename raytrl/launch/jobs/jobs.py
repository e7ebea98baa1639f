"""`raytrl submit`: a run as a Ray job. The same as `ray job submit`, with the checks of a run before it is sent."""

import asyncio
import hashlib
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytrl.config.kinds import RUNS
from raytrl.config.load import LoadedRun, load_run
from raytrl.errors import ConfigError, ResourceError, RunError
from raytrl.launch.jobs.package import Package, check_files, package_of
from raytrl.launch.session import secrets
from raytrl.plan.where import refuse_lost_output

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_RUN = "raytrl_run"  # metadata key: which run directory the job writes, as a digest
_STOP_WAIT_S = 60  # for raytrl to end its actors after SIGTERM; Ray's default is 3
_STATUS_S = 120  # for Ray to write down how a job ended
_ASK_S = 0.2
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Submission:
    """A checked request; nothing was sent yet."""

    command: tuple[str, ...]
    loaded: LoadedRun
    package: Package
    runtime_env: dict[str, Any]

    @property
    def run_key(self) -> str:
        run = self.loaded.run
        return hashlib.blake2b(f"{run.output_dir}/{run.name}".encode(), digest_size=12).hexdigest()


def prepare(words: Sequence[str], env: Sequence[str], secret: Sequence[str]) -> Submission:
    """Checks a command (`ppo FILE key=value …`) as far as is possible here.

    Raises:
        ConfigError: the run file is wrong, files would be missing in the job, its results would be lost, or the working
            directory is too large.
    """
    if len(words) < 2 or words[0] not in RUNS:
        raise ConfigError(
            f"submit: found: {shlex.join(words) or 'nothing'!r} after --; expected: one of {', '.join(RUNS)}, a run file, "
            f"and overrides, such as: raytrl submit -- sft my-run.yaml"
        )
    secrets.refuse_in_words(words)
    variables = {**secrets.environment(env), **secrets.reference(secret), "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}
    options = [word for word in words[2:] if word.startswith("-")]
    loaded = load_run(words[1], [word for word in words[2:] if word not in options], words[0])
    refuse_lost_output(loaded.run.output_dir)
    package = package_of(".")
    check_files(loaded, package)
    runtime_env: dict[str, Any] = {"working_dir": package.folder, "env_vars": variables}
    if any("=" in text for text in secret):  # processes on other nodes read the files themselves
        runtime_env["worker_process_setup_hook"] = f"{secrets.__name__}.{secrets.load_secrets.__name__}"
    return Submission(("raytrl", *words), loaded, package, runtime_env)


def connect(address: str | None) -> "JobSubmissionClient":
    """A client of the cluster's job server.

    Args:
        address: http://head:8265; None: what RAY_API_SERVER_ADDRESS or RAY_ADDRESS says, or a Ray on this machine.

    Raises:
        ResourceError: nobody answers there, or Ray's token is missing or wrong.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if address is not None:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets its variables win over the argument
    shown = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "a Ray on this machine"
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise ResourceError(
            f"--address: the cluster at {shown} asks for Ray's token, and it is missing or wrong; expected: "
            f"RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"--address: no job server answers; found: {shown}: {_first_line(error)}; expected: the dashboard of a "
            f"running cluster, such as http://head:8265"
        ) from None


def job_of(client: "JobSubmissionClient", submission: Submission) -> str | None:
    """The job that is at this run already; a second one could only find its directory locked.

    Raises:
        RunError: the cluster did not answer.
    """
    with _answered("did not list its jobs"):
        for job in client.list_jobs():
            if (job.metadata or {}).get(_RUN) == submission.run_key and job.status not in _ENDED:
                return str(job.submission_id)
    return None


def submit(client: "JobSubmissionClient", submission: Submission) -> str:
    """Sends the working directory and starts the job; returns its id.

    Raises:
        RunError: the cluster refused it, or did not answer.
    """
    run = submission.loaded.run
    with _answered("did not take the job"):
        return str(
            client.submit_job(
                entrypoint=shlex.join(submission.command),
                submission_id=f"{run.kind}-{run.name}-{time.strftime('%Y%m%d-%H%M%S')}",
                runtime_env=submission.runtime_env,
                metadata={_RUN: submission.run_key},
            )
        )


@contextmanager
def _answered(what: str) -> Iterator[None]:
    """Raises RunError where the job server says no, or is not reached any more."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(f"submit: the cluster {what}: {_first_line(error)}") from None
    except OSError as error:
        raise RunError(
            f"submit: the cluster {what}: {_first_line(error)}; submit again: a job that has started meanwhile is found"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def follow(client: "JobSubmissionClient", job: str, write: Callable[[str], None]) -> None:
    """Passes the job's log on as it is written, until it ends.

    Raises:
        RunError: the connection broke; the job goes on.
    """

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            write(lines)

    try:
        asyncio.run(tail())
    except asyncio.CancelledError:  # Ctrl-C, in a moment in which the client counts a cancellation of its own
        raise KeyboardInterrupt from None
    except (RuntimeError, OSError) as error:
        raise RunError(
            f"submit: the connection to the log of {job} broke: {_first_line(error)}; the job goes on; submit the "
            f"same again to follow it, or: ray job logs --follow {job}"
        ) from None


def outcome(client: "JobSubmissionClient", job: str) -> tuple[int, str]:
    """The job's exit status as its own command gave it, and words where that command never ran.

    Raises:
        RunError: Ray does not say in time how it ended, or is not reached.
    """
    info, last = _ended(client, job, _STATUS_S)
    if info is None:
        raise RunError(f"submit: waited {_STATUS_S} s for Ray to say how {job} ended; last answer: {last}")
    if info.status == "SUCCEEDED":
        return 0, ""
    if info.status == "STOPPED":
        return 130, f"{job} was stopped; the same submission continues from the last checkpoint"
    if info.driver_exit_code:
        return int(info.driver_exit_code), ""
    return 1, f"{job} failed: {info.message}"


def _ended(client: "JobSubmissionClient", job: str, limit_s: float) -> tuple[Any, str]:
    """What Ray says of a job that has ended, None where it has not said so in time; and the last answer. A dashboard may be
    starting again meanwhile."""
    limit, last = time.monotonic() + limit_s, "none"
    while time.monotonic() < limit:
        try:
            info = client.get_job_info(job)
        except (RuntimeError, OSError) as error:
            last = _first_line(error)
        else:
            if info.status in _ENDED:
                return info, str(info.status)
            last = str(info.status)
        time.sleep(_ASK_S)
    return None, last


def stop(client: "JobSubmissionClient", job: str) -> None:
    """Asks the job to end, and waits until it has.

    Raises:
        RunError: it has not within the time that it is given, or Ray is not reached.
    """
    try:
        client.stop_job(job)
    except (RuntimeError, OSError) as error:
        raise RunError(
            f"submit: {job} could not be asked to stop, and goes on: {_first_line(error)}; ray job stop {job} asks again"
        ) from None
    limit_s = _STOP_WAIT_S + _STATUS_S
    info, last = _ended(client, job, limit_s)
    if info is None:
        raise RunError(f"submit: {job} was asked to stop and has not within {limit_s} s; last answer: {last}")
