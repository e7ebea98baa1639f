"""Secrets of a job by reference: what is submitted names them, and where they lie on the cluster; never their values.

`raytrl submit --secret NAME=/path` puts `NAME=/path` into the job's environment under `SECRETS_VARIABLE`. Every process of the
job, on whatever node, reads the file itself. `--secret NAME` says that the cluster's own environment has it.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from raytrl.config.credentials import SECRETS_VARIABLE, sounds_secret
from raytrl.errors import ConfigError

_REFERENCE = re.compile(r"(?P<name>[A-Za-z_]\w*)(=(?P<path>/.+))?")
_IN_ADDRESS = re.compile(r"://[^/\s@]+:[^/\s@]+@")


def reference(secrets: Sequence[str]) -> dict[str, str]:
    """The environment variable that names the secrets; empty where there are none.

    Raises:
        ConfigError: one is not `NAME` or `NAME=/path/on/the/cluster`.
    """
    for secret in secrets:
        if not _REFERENCE.fullmatch(secret) or "," in secret:
            name = secret.partition("=")[0]
            raise ConfigError(
                f"--secret {name}: not a reference; expected: NAME, which the cluster's environment has, or "
                f"NAME=/path/of/a/file on the cluster; the value itself is never given"
            )
    return {SECRETS_VARIABLE: ",".join(secrets)} if secrets else {}


def environment(assignments: Sequence[str]) -> dict[str, str]:
    """Variables of `--env NAME=VALUE`, or `--env NAME` with this process' value.

    Raises:
        ConfigError: not set here, or named like a secret: Ray shows a job's variables to whoever may see the job.
    """
    found = {}
    for text in assignments:
        name, has_value, value = text.partition("=")
        if sounds_secret(name):
            raise ConfigError(
                f"--env {name}: is named like a secret, and Ray keeps and shows the variables of a job; expected: "
                f"--secret {name} (the cluster's environment has it) or --secret {name}=/path/of/a/file on the cluster"
            )
        if not has_value and name not in os.environ:
            raise ConfigError(f"--env {name}: is not set here; expected: --env {name}=VALUE")
        found[name] = value if has_value else os.environ[name]
    return found


def refuse_in_words(words: Sequence[str]) -> None:
    """Refuses a command that holds a password in an address: Ray keeps and shows a job's command.

    Raises:
        ConfigError: without repeating it.
    """
    for word in words:
        if _IN_ADDRESS.search(word):
            raise ConfigError(
                f"{word.partition('=')[0]}: holds a password in an address, and Ray keeps and shows the command of a job; "
                f"expected: credentials in the cluster's environment, or --secret"
            )


def load_secrets() -> None:
    """Puts the secrets that the job refers to into this process' environment.

    Raises:
        ConfigError: one is not where the submission said; the message has no value in it.
    """
    for text in filter(None, os.environ.get(SECRETS_VARIABLE, "").split(",")):
        name, _, path = text.partition("=")
        if path:
            try:
                os.environ[name] = Path(path).read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ConfigError(
                    f"--secret {name}: cannot be read on {os.uname().nodename}; found: {path}: {error.strerror}; expected: a "
                    f"file that every node has, such as a mounted Kubernetes secret"
                ) from None
        elif name not in os.environ:
            raise ConfigError(
                f"--secret {name}: is not in the environment of the processes on {os.uname().nodename}; expected: set "
                f"where Ray was started, or --secret {name}=/path/of/a/file"
            )


def values_at(place: str | None, key: str) -> list[str]:
    """The secrets that a reference of a run file leads to: NAME's value, or the lines of the file in NAME=/file.

    Raises:
        ConfigError: there is none; the message has no value in it.
    """
    if place is None:
        return []
    name, _, path = place.partition("=")
    try:
        text = Path(path).read_text(encoding="utf-8") if path else os.environ.get(name, "")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text in UTF-8"
        raise ConfigError(
            f"{key}: cannot be read on {os.uname().nodename}; found: {path}: {reason}; expected: a file that every node "
            f"has, such as a mounted Kubernetes secret"
        ) from None
    if not (found := [line.strip() for line in text.splitlines() if line.strip()]):
        where = path or f"the environment variable {name}"
        raise ConfigError(
            f"{key}: nothing in {where} on {os.uname().nodename}; expected: a secret, set where Ray was started, or NAME=/file"
        )
    return found
