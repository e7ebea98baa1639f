"""Reward endpoints: POST {prompts, completions} as JSON, and {scores} comes back."""

import http.client
import ipaddress
import json
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence

from raytrl.config.sections.reward import SourceSection
from raytrl.errors import ConfigError
from raytrl.roles.reward.call import CallError, FinalError, Pair, completion_of
from raytrl.within import within

# Of the 4xx answers, those that another try may change: timeout, too early, too many requests.
_TRANSIENT = frozenset({408, 425, 429})
# What is read of an answer at most: a score has 25 characters, and what else an endpoint tells of a response some more.
_ANSWER_BYTES, _SCORE_BYTES = 2**20, 2**12


class EndpointSource:
    """An HTTP endpoint. It is sent what a reward function is called with: texts, or lists of chat messages.

    `{"scores": [...]}` holds one number a response, in order; `null` means "does not apply", as None does in Python.
    Raises ConfigError when a header's environment variable is not set.
    """

    def __init__(self, section: SourceSection) -> None:
        assert section.url is not None
        self.section = section
        self._url = section.url
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        for header, variable in section.headers_env.items():
            if variable not in os.environ:
                raise ConfigError(
                    f"reward.sources.{section.name}.headers_env.{header}: environment variable {variable} is not set "
                    "where the reward actor runs; expected: the value of the header; set it there"
                )
            self._headers[header] = os.environ[variable]

    def call(self, pairs: Sequence[Pair]) -> Sequence[object]:
        """One value a response; see `RewardSource`."""
        body = {"prompts": [prompt.text for prompt, _ in pairs], "completions": [completion_of(pair) for pair in pairs]}
        request = urllib.request.Request(self._url, data=json.dumps(body).encode(), headers=self._headers)  # noqa: S310 (config admits http and https only)
        # urllib bounds each read, not their sum: a server that drips bytes needs the outer limit.
        return within(self.section.timeout_s, lambda: _post(request, self.section.timeout_s, len(pairs)))

    def close(self) -> None:
        """Nothing is held between calls."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without its prompts, with our headers, at a host that nobody named."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Proxies of the environment are for other machines: to one of them, this machine's own names mean itself."""
    proxies = [urllib.request.ProxyHandler({})] if _is_here(url) else []
    return urllib.request.build_opener(_NoRedirects, *proxies)


def _is_here(url: str) -> bool:
    host = (urllib.parse.urlsplit(url).hostname or "").removesuffix(".")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", socket.gethostname().lower()) or host.endswith(".localhost")


def _post(request: urllib.request.Request, timeout_s: float, count: int) -> Sequence[object]:
    """The scores of `count` responses."""
    ends = time.monotonic() + timeout_s
    try:
        with _opener(request.full_url).open(request, timeout=timeout_s) as response:
            answer = _read(response, ends, _ANSWER_BYTES + count * _SCORE_BYTES)
    except urllib.error.HTTPError as error:
        if 300 <= error.code < 400:
            place = error.headers.get("Location", "no Location")
            raise FinalError(
                f"answered HTTP {error.code}, a redirect to {place}; expected: the url that answers"
            ) from None
        reason = f"answered HTTP {error.code}: {error.read(200).decode(errors='replace')}"
        if 400 <= error.code < 500 and error.code not in _TRANSIENT:
            raise FinalError(reason) from None
        raise CallError(reason) from None
    except TimeoutError:
        raise CallError(f"gave no answer within {timeout_s:g} s") from None
    try:
        scores = json.loads(answer)["scores"]
    except (ValueError, KeyError, TypeError):
        scores = None
    if not isinstance(scores, list):
        raise CallError(f"answered {answer[:200]!r}; expected: a JSON object with a list `scores`")
    return scores


def _read(response: http.client.HTTPResponse, ends: float, limit: int) -> bytes:
    """The body: not longer than `limit`, and not read on once the call has been given up."""
    body = bytearray()
    while piece := response.read1(min(65536, limit + 1)):
        body += piece
        if len(body) > limit:
            raise FinalError(f"answered more than {limit} bytes; expected: a JSON object with a list `scores`")
        if time.monotonic() > ends:
            raise TimeoutError
    return bytes(body)
