"""Reward endpoints: POST {prompts, completions, ended} as JSON, and {scores} comes back."""

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
from typing import Any

from raytrl.config.sections.reward import SourceSection
from raytrl.errors import ConfigError
from raytrl.roles.reward.call import MODEL_BATCH_SIZE, Asked, AwayError, CallError, Failure, FinalError, Pair
from raytrl.within import within

# Of the 4xx answers, those that another try may change: timeout, too early.
_TRANSIENT = frozenset({408, 425})
_COME_AGAIN = frozenset({429, 503})
# What Ray Serve's proxy says of an application that it takes down or has not got back yet.
_SERVE_HAS_NONE = b"/-/routes"
_LONGEST_WAIT_S = 60.0  # that a server may ask for
# What is read of an answer at most: a score has 25 characters, and what else an endpoint tells of a response some more.
_ANSWER_BYTES, _SCORE_BYTES = 2**20, 2**12


class EndpointSource:
    """An HTTP endpoint. It is sent what a reward function is called with: texts, or lists of chat messages; and of each response
    whether it ended by itself.

    `{"scores": [...]}` holds one number a response, in order; `null` means "does not apply", as None does in Python, and
    `{"error": text, "retry": false}` that there is none for this response, and whether asking again may change that.

    A server that says 429 or 503, or that has answered before and is gone, is waited for (`AwayError`). One that never
    answered is more likely a wrong address.

    Raises ConfigError when a header's environment variable is not set.
    """

    def __init__(self, section: SourceSection) -> None:
        assert section.url is not None
        self.section = section
        self._url = section.url
        self._has_answered = False
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
        rows = [Asked.of(pair) for pair in pairs]
        body: dict[str, list[Any]] = {
            "prompts": [row.prompt for row in rows],
            "completions": [row.completion for row in rows],
        }
        if self.section.send_ended:
            body["ended"] = [row.whole for row in rows]
        request = urllib.request.Request(self._url, data=json.dumps(body).encode(), headers=self._headers)  # noqa: S310 (config admits http and https only)
        try:
            # urllib bounds each read, not their sum: a server that drips bytes needs the outer limit.
            return within(self.section.timeout_s, lambda: self._post(request, len(pairs)))
        except _TooLargeError:
            if len(pairs) == 1:
                raise
            half = _half_of(len(pairs))
            return [*self.call(pairs[:half]), *self.call(pairs[half:])]

    def _post(self, request: urllib.request.Request, count: int) -> Sequence[object]:
        """The scores of `count` responses."""
        timeout_s = self.section.timeout_s
        ends = time.monotonic() + timeout_s
        try:
            with _opener(request.full_url).open(request, timeout=timeout_s) as response:
                self._has_answered = True
                answer = _read(response, ends, _ANSWER_BYTES + count * _SCORE_BYTES)
        except urllib.error.HTTPError as error:
            self._has_answered = True
            raise _refused(error, self.section.send_ended) from None
        except TimeoutError:
            raise CallError(f"gave no answer within {timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.URLError) and isinstance(error.reason, TimeoutError):
                raise CallError(f"gave no answer within {timeout_s:g} s") from None
            reason = f"raised {type(error).__name__}: {error}"
            raise (AwayError(reason) if self._has_answered else CallError(reason)) from None
        return _scores_in(answer)

    def close(self) -> None:
        """Nothing is held between calls."""


class _TooLargeError(FinalError):
    """The server takes less at a time."""


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


def _refused(error: urllib.error.HTTPError, sent_ended: bool) -> CallError:
    """What an answer means that is no 200."""
    if 300 <= error.code < 400:
        place = error.headers.get("Location", "no Location")
        return FinalError(f"answered HTTP {error.code}, a redirect to {place}; expected: the url that answers")
    try:
        text, is_cut = error.read(200), False
    except (OSError, http.client.HTTPException):  # whoever refuses may end while saying so: its status stands
        text, is_cut = b"", True
    reason = f"answered HTTP {error.code}: {text.decode(errors='replace')}"
    if error.code in _COME_AGAIN or (error.code == 404 and (is_cut or _SERVE_HAS_NONE in text)):
        return AwayError(reason, _retry_after_s(error.headers.get("Retry-After")))
    if error.code in (400, 422) and sent_ended and b"ended" in text:
        reason += "; of a server that knows no `ended`: send_ended: false"
    if error.code == 413:
        return _TooLargeError(reason)
    return CallError(reason) if error.code >= 500 or error.code in _TRANSIENT else FinalError(reason)


def _half_of(count: int) -> int:
    """Of a call that is too large: whole batches of a served model where there are several, whose scores stay the same then."""
    batches = -(-count // MODEL_BATCH_SIZE)
    return batches // 2 * MODEL_BATCH_SIZE or count // 2


def _retry_after_s(header: str | None) -> float:
    """Seconds; it may be a date, which is not read."""
    return min(float(header), _LONGEST_WAIT_S) if header is not None and header.isdecimal() else 0.0


def _scores_in(answer: bytes) -> Sequence[object]:
    try:
        scores = json.loads(answer)["scores"]
    except (ValueError, KeyError, TypeError):
        scores = None
    if not isinstance(scores, list):
        raise CallError(f"answered {answer[:200]!r}; expected: a JSON object with a list `scores`")
    return [_outcome(score) for score in scores]


def _outcome(score: object) -> object:
    if not isinstance(score, dict) or not isinstance(score.get("error"), str):
        return score
    return Failure(f"{score['error']:.1000}", retry=score.get("retry") is not False)


def _read(response: http.client.HTTPResponse, ends: float, limit: int) -> bytes:
    """The body: not longer than `limit`, and not read on once the call has been given up."""
    body = bytearray()
    while piece := response.read1(min(65536, limit + 1)):
        body += piece
        if len(body) > limit:
            raise FinalError(f"answered more than {limit} bytes; expected: a JSON object with a list `scores`")
        if time.monotonic() > ends:
            raise TimeoutError
    if response.length:  # `read1` takes an end that comes too early for the end
        raise http.client.IncompleteRead(bytes(body), response.length)
    return bytes(body)
