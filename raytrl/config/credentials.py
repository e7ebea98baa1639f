"""Credentials have no place in a run file: its values are stored with the run, shown and sent to trackers."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from raytrl.errors import ConfigError

# Not eos_token, pad_token and the like, which are words of a vocabulary.
_SECRET_KEY = re.compile(
    r"token|(.+_)?(hub|hf|auth|access|api|session|sas)_token|(.+_)?(api|access|secret|account)_?key|(.+_)?(secret|password)",
    re.IGNORECASE,
)
_SECRET_PARAMETER = re.compile(
    r"(.*[_-])?(token|key|secret|signature|credential|password)|apikey|secretkey|accesskey|sig", re.IGNORECASE
)
_USER_INFO = re.compile(r"://[^/\s?#@]*:[^/\s@]+@|\bhttps?://[^/\s?#@]+@", re.IGNORECASE)
_INSTEAD = "an environment variable that the library reads (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HF_TOKEN …)"

SECRETS_VARIABLE = "RAYTRL_SECRETS"  # names the secrets of a job, and where they lie
# Of an environment variable.
_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY(_|$)|APIKEY", re.IGNORECASE)


def sounds_secret(variable: str, value: str = "") -> bool:
    """Whether an environment variable is named like a secret, or its value holds credentials in an address."""
    return bool(_SECRET_VARIABLE.search(variable) or _USER_INFO.search(value))


def refuse_credentials(values: Mapping[str, Any], where: str) -> None:
    """Refuses values that hold a password, key or token; the message names the key, never the value.

    Args:
        values: by dotted key.
        where: the file, or "command line".

    Raises:
        ConfigError: one line for each.
    """
    problems = [
        f"{where}: {key}: holds {what}, and values of a run file are stored and shown; found: (not shown); expected: {instead}"
        for key, value in values.items()
        for what, instead in _found(key, value)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def is_reference(value: str) -> bool:
    """Whether it says where a secret is, NAME or NAME=/file, and cannot be one itself."""
    return re.fullmatch(r"[A-Z][A-Z0-9_]*(=/.+)?", value) is not None


def _found(key: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, list | tuple):
        return [found for item in value for found in _found(key, item)][:1]
    if not isinstance(value, str) or ".headers_env." in key:  # names of variables
        return []
    if key == "serve.api_key":
        instead = "NAME of an environment variable (A-Z, 0-9, _), or NAME=/path/of/a/file"
        return [("a secret", instead)] if value and not is_reference(value) else []
    instead = "headers_env: {Authorization: NAME_OF_A_VARIABLE}" if key.endswith(".url") else _INSTEAD
    if value.strip() not in ("", "~", "null") and _SECRET_KEY.fullmatch(key.rpartition(".")[2]):
        return [("a secret", "an environment variable such as HF_TOKEN, and not this key")]
    if _USER_INFO.search(value):
        return [("credentials in an address", instead)]
    if "://" in value:
        for name, given in parse_qsl(value.partition("?")[2].partition("#")[0]):
            if given and _SECRET_PARAMETER.fullmatch(name):
                return [(f"a secret in an address (parameter {name})", instead)]
    return []
