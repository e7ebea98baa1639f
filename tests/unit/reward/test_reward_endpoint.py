"""HTTP endpoints, against a real server on this machine."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from raytrl.config.sections.reward import SourceSection
from raytrl.errors import ConfigError
from raytrl.roles.reward.call import Failure, ask
from raytrl.roles.reward.endpoint import EndpointSource

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any], int], tuple[int, bytes] | None]


class _Server:
    """Answers each POST by `answer(handler, body, number of the call)`; None: it has answered by itself."""

    def __init__(self) -> None:
        self.calls = 0
        self.answer: Answer = lambda *_: (200, b"{}")
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.calls += 1
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = outer.answer(self, body, outer.calls)
                if answer is not None:
                    self.send_response(answer[0])
                    self.end_headers()
                    self.wfile.write(answer[1])

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers: an endpoint on this machine needs no proxy
    server = _Server()
    threading.Thread(target=server.server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.server.shutdown()
    server.server.server_close()


def _source(server: _Server, **more: Any) -> EndpointSource:
    return EndpointSource(SourceSection(name="judge", url=server.url, **{"retries": 0, "timeout_s": 5, **more}))


def _scores(values: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": values}).encode()


def test_texts_go_out_and_scores_come_back(server: _Server, pair: Any) -> None:
    server.answer = lambda _, body, __: _scores(
        [len(p) - len(c) for p, c in zip(body["prompts"], body["completions"], strict=True)]
    )
    assert ask(_source(server), [pair("abc", "d"), pair("a", "bcd")]) == [2.0, -2.0]


def test_chat_goes_out_as_messages_and_null_is_not_applicable(server: _Server, pair: Any) -> None:
    prompt = [{"role": "user", "content": "hi"}]

    def answer(_: Any, body: dict[str, Any], __: int) -> tuple[int, bytes]:
        assert body == {
            "prompts": [prompt],
            "completions": [[{"role": "assistant", "content": "ho"}]],
            "ended": [True],
        }
        return _scores([None])

    server.answer = answer
    assert ask(_source(server), [pair(prompt, "ho")]) == [None]


def test_a_server_error_is_asked_again(server: _Server, pair: Any) -> None:
    server.answer = lambda _, __, call: (500, b"warming up") if call == 1 else _scores([1])
    assert ask(_source(server, retries=1), [pair("p", "x")]) == [1.0]
    assert server.calls == 2


def test_a_cut_response_is_told_apart_unless_the_server_knows_no_such_key(server: _Server, pair: Any) -> None:
    seen: list[Any] = []

    def answer(_: Any, body: dict[str, Any], __: int) -> tuple[int, bytes]:
        seen.append(body.get("ended"))
        return _scores([1, 2])

    server.answer = answer
    pairs = [pair("p", "x"), pair("p", "y", ended=False)]
    ask(_source(server), pairs)
    ask(_source(server, send_ended=False), pairs)
    assert seen == [[True, False], None]


def test_a_server_that_refuses_the_key_says_what_to_do(server: _Server, pair: Any) -> None:
    server.answer = lambda *_: (
        422,
        b'{"detail": [{"loc": ["body", "ended"], "msg": "Extra inputs are not permitted"}]}',
    )
    (outcome,) = ask(_source(server, retries=3), [pair("p", "x")])
    assert isinstance(outcome, Failure)
    assert "send_ended: false" in outcome.reason
    assert server.calls == 1


@pytest.mark.parametrize(("told", "calls"), [({"retry": False}, 1), ({}, 3), ({"retry": True}, 3)])
def test_one_response_has_an_error_and_the_others_their_scores(
    server: _Server, pair: Any, told: dict[str, Any], calls: int
) -> None:
    server.answer = lambda *_: _scores([1.5, {"error": "the text has 805 tokens", **told}])
    outcomes = ask(_source(server, retries=2), [pair("p", "x"), pair("p", "y", row=1)])
    assert outcomes == [1.5, Failure("the text has 805 tokens", retry=calls > 1)]
    assert server.calls == calls


def _says(status: int, text: bytes, retry_after: str | None = None) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, _: Any, call: int) -> tuple[int, bytes] | None:
        if call > 4:
            return _scores([1])
        handler.send_response(status)
        if retry_after is not None:
            handler.send_header("Retry-After", retry_after)
        handler.end_headers()
        handler.wfile.write(text)
        return None

    return answer


@pytest.mark.parametrize(
    ("status", "text"),
    [(503, b"draining"), (429, b"too many"), (404, b"Path '/score' not found. Please ping http://.../-/routes")],
)
def test_who_is_told_to_come_again_does_without_using_up_retries(
    server: _Server, pair: Any, status: int, text: bytes
) -> None:
    server.answer = _says(status, text)
    assert ask(_source(server, retries=0), [pair("p", "x")]) == [1.0]
    assert server.calls == 5


def test_another_404_is_a_wrong_address(server: _Server, pair: Any) -> None:
    server.answer = _says(404, b"no such page")
    (outcome,) = ask(_source(server, retries=3), [pair("p", "x")])
    assert outcome == Failure("answered HTTP 404: no such page", retry=False)


def test_an_outage_is_waited_for_as_long_as_it_is_said(server: _Server, pair: Any) -> None:
    server.answer = lambda *_: (503, b"draining")
    begin = time.monotonic()
    (outcome,) = ask(_source(server, retries=5, outage_s=0.3), [pair("p", "x")])
    assert outcome == Failure("answered HTTP 503: draining; and so for 0.3 s (outage_s)", retry=False)
    assert 0.3 <= time.monotonic() - begin < 3


def test_retry_after_is_kept_to(server: _Server, pair: Any) -> None:
    server.answer = _says(503, b"draining", retry_after="30")
    (outcome,) = ask(_source(server, outage_s=0.2), [pair("p", "x")])
    assert isinstance(outcome, Failure)
    assert server.calls == 2  # at once, and when the outage was over


def test_a_call_that_is_too_large_is_made_in_whole_batches(server: _Server, pair: Any) -> None:
    sizes: list[int] = []

    def answer(_: Any, body: dict[str, Any], __: int) -> tuple[int, bytes]:
        sizes.append(len(body["prompts"]))
        return _scores([float(text) for text in body["completions"]]) if sizes[-1] <= 40 else (413, b"too large")

    server.answer = answer
    pairs = [pair("p", str(i), row=i) for i in range(150)]
    assert ask(_source(server), pairs) == list(map(float, range(150)))
    assert sizes == [150, 64, 32, 32, 86, 32, 54, 32, 22]


def test_one_response_that_is_too_large_is_a_failure(server: _Server, pair: Any) -> None:
    server.answer = lambda *_: (413, b"too large")
    assert ask(_source(server, retries=3), [pair("p", "x")]) == [Failure("answered HTTP 413: too large", retry=False)]
    assert server.calls == 1


def test_a_server_that_said_to_come_again_may_be_gone_for_a_while(server: _Server, pair: Any) -> None:
    """It drains when it is first asked, and restarts."""
    server.answer = lambda *_: (503, b"draining")
    source = _source(server, retries=0, outage_s=20)
    port, handler = server.server.server_port, server.server.RequestHandlerClass
    asked = ThreadPoolExecutor(1).submit(ask, source, [pair("p", "x")])
    while not server.calls:
        time.sleep(0.01)
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(TimeoutError):
        asked.result(timeout=0.2)
    again = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.answer = lambda *_: _scores([1])
    threading.Thread(target=again.serve_forever, args=(0.01,), daemon=True).start()
    assert asked.result(timeout=20) == [1.0]
    again.shutdown()
    again.server_close()


def test_a_server_that_has_answered_may_be_gone_for_a_while(server: _Server, pair: Any) -> None:
    server.answer = lambda *_: _scores([1])
    source = _source(server, retries=0, outage_s=20)
    assert ask(source, [pair("p", "x")]) == [1.0]
    server.server.server_close()  # as killed: what comes is refused
    port = server.server.server_port
    asked = ThreadPoolExecutor(1).submit(ask, source, [pair("p", "x")])
    with pytest.raises(TimeoutError):
        asked.result(timeout=0.2)
    again = ThreadingHTTPServer(("127.0.0.1", port), server.server.RequestHandlerClass)
    threading.Thread(target=again.serve_forever, args=(0.01,), daemon=True).start()
    assert asked.result(timeout=20) == [1.0]
    again.shutdown()
    again.server_close()


def test_an_answer_that_is_cut_off_is_none(server: _Server, pair: Any) -> None:
    """A server that is killed ends in the middle of a refusal, or of scores."""

    def answer(handler: BaseHTTPRequestHandler, _: Any, call: int) -> tuple[int, bytes] | None:
        if call == 4:
            return _scores([1])
        status = {1: 200, 2: 503, 3: 404}[call]
        handler.send_response(status)
        handler.send_header(*(("Content-Length", "99") if status == 200 else ("Transfer-Encoding", "chunked")))
        handler.end_headers()
        handler.wfile.write(b'{"scores": [1' if status == 200 else b"")
        return None

    server.answer = answer
    assert ask(_source(server, retries=0, outage_s=20), [pair("p", "x")]) == [1.0]
    assert server.calls == 4


def test_retries_are_bounded(server: _Server, pair: Any) -> None:
    server.answer = lambda *_: (500, b"broken")
    assert ask(_source(server, retries=2), [pair("p", "x")]) == [Failure("answered HTTP 500: broken")]
    assert server.calls == 3


def test_a_refusal_is_not_asked_again(server: _Server, pair: Any) -> None:
    server.answer = lambda *_: (401, b"who are you")
    (outcome,) = ask(_source(server, retries=3), [pair("p", "x")])
    assert outcome == Failure("answered HTTP 401: who are you", retry=False)
    assert server.calls == 1


@pytest.mark.parametrize("drips", [False, True])
def test_silence_and_dripping_cost_the_limit(server: _Server, pair: Any, drips: bool) -> None:
    gone = threading.Event()

    def answer(handler: BaseHTTPRequestHandler, _: Any, __: int) -> None:
        if drips:
            handler.send_response(200)
            handler.end_headers()
        while not gone.wait(0.1):  # each byte comes in time; all of them do not
            handler.wfile.write(b" " if drips else b"")

    server.answer = answer
    assert ask(_source(server, timeout_s=0.4), [pair("p", "x")]) == [Failure("gave no answer within 0.4 s")]
    gone.set()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_no_answer_and_leads_nowhere(
    server: _Server, pair: Any, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Followed, 302 would carry the secret header, but no prompts, to the other place; its answer would be the score."""
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    seen: list[str] = []

    def answer(handler: BaseHTTPRequestHandler, _: Any, __: int) -> None:
        seen.append(handler.path)
        handler.send_response(status)
        handler.send_header("Location", f"{server.url}/elsewhere")
        handler.end_headers()

    server.answer = answer
    (outcome,) = ask(_source(server, retries=3, headers_env={"Authorization": "JUDGE_TOKEN"}), [pair("p", "x")])
    reason = f"answered HTTP {status}, a redirect to {server.url}/elsewhere; expected: the url that answers"
    assert outcome == Failure(reason, retry=False)
    assert seen == ["/score"]


def _endless(piece: bytes, pause_s: float, ended: threading.Event) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, _: Any, __: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(piece)
                time.sleep(pause_s)
        except OSError:  # nobody reads any more
            ended.set()

    return answer


def test_an_answer_without_end_is_not_read_to_its_end(server: _Server, pair: Any) -> None:
    ended = threading.Event()
    server.answer = _endless(b" " * 65536, 0.0, ended)
    (outcome,) = ask(_source(server, timeout_s=30, retries=3), [pair("p", "x")])
    assert outcome == Failure(
        f"answered more than {2**20 + 2**12} bytes; expected: a JSON object with a list `scores`", retry=False
    )
    assert server.calls == 1
    assert ended.wait(5)


def test_a_call_that_was_given_up_reads_no_more(server: _Server, pair: Any) -> None:
    ended = threading.Event()
    server.answer = _endless(b" " * 100, 0.02, ended)
    assert ask(_source(server, timeout_s=0.3), [pair("p", "x")]) == [Failure("gave no answer within 0.3 s")]
    assert ended.wait(5)


def test_nobody_there(server: _Server, pair: Any) -> None:
    source = EndpointSource(SourceSection(name="judge", url="http://127.0.0.1:9/score", retries=0))
    (outcome,) = ask(source, [pair("p", "x")])
    assert isinstance(outcome, Failure)
    assert "refused" in outcome.reason


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"scores": [1, 2]}', "returned 2 scores for 1 responses"),
        (b'{"scores": [NaN]}', "returned nan"),
        (b'{"scores": [Infinity]}', "returned inf"),
        (b'{"scores": [true]}', "returned True (a bool)"),
        (b'{"scores": ["0.5"]}', "returned '0.5' (a str)"),
        (b'{"scores": 0.5}', "expected: a JSON object with a list `scores`"),
        (b'{"score": [0.5]}', "expected: a JSON object with a list `scores`"),
        (b"[0.5]", "expected: a JSON object with a list `scores`"),
        (b"<html>", "answered b'<html>'"),
    ],
)
def test_nonsense_is_a_failure_that_shows_it(server: _Server, pair: Any, body: bytes, words: str) -> None:
    server.answer = lambda *_: (200, body)
    (outcome,) = ask(_source(server), [pair("p", "x")])
    assert isinstance(outcome, Failure)
    assert words in outcome.reason


def test_a_header_comes_from_the_environment(server: _Server, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = lambda handler, *_: _scores([1 if handler.headers["Authorization"] == "Bearer x" else 0])
    monkeypatch.setenv("JUDGE_HEADER", "Bearer x")
    assert ask(_source(server, headers_env={"Authorization": "JUDGE_HEADER"}), [pair("p", "x")]) == [1.0]
    monkeypatch.delenv("JUDGE_HEADER")
    with pytest.raises(ConfigError, match="environment variable JUDGE_HEADER is not set"):
        _source(server, headers_env={"Authorization": "JUDGE_HEADER"})
