"""A reward model that `raytrl serve` serves: the scores of a reward actor, bit for bit, through drain and kill."""

import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from raytrl.config.sections.reward import SourceSection
from raytrl.records.samples import Prompt, Response
from raytrl.roles.reward.call import Failure, ask
from raytrl.roles.reward.endpoint import EndpointSource
from raytrl.roles.reward.model import ModelSource
from tests.ppo_files import make_files, ppo_file
from tests.runs import (
    free_port,
    kill_everything,
    last_step,
    output_of,
    raytrl,
    start,
    text_rows,
    wait_for,
    weights_hash,
)
from tests.served import Server, served
from tests.unit.reward.conftest import save_classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve-reward")
    make_files(folder)
    save_classifier(folder / "reward", n_positions=128)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with served(folder, str(folder / "reward"), "serve.max_rows=200", f"output_dir={folder}/runs") as server:
        yield server


def _pairs(count: int) -> list[tuple[Prompt, Response]]:
    """Some of them cut; one is longer than the model takes, which has 128 positions."""
    texts = [row["text"] for row in text_rows(count, seed=5)]
    pairs = []
    for i, text in enumerate(texts):
        chat = i % 4 == 3
        prompt: Any = [{"role": "user", "content": text[:12]}] if chat else text[:12]
        said = text * 9 if i == 7 else text[12:40]
        pairs.append((Prompt(0, i, prompt, ()), Response(0, i, 0, (), said, i % 3 != 0, (), 0)))
    return pairs


def _told(outcome: Any) -> Any:
    """What is known of a failure at both ends of a connection."""
    return (outcome.reason, outcome.retry) if isinstance(outcome, Failure) else outcome


def test_scores_are_those_of_a_reward_actor_to_the_bit(folder: Path, server: Server) -> None:
    pairs = _pairs(150)
    url = EndpointSource(SourceSection(name="served", url=f"{server.base}/score", retries=0))
    here = ModelSource(SourceSection(name="here", model=str(folder / "reward")), device="cpu")
    found, expected = ask(url, pairs), ask(here, pairs)
    assert list(map(_told, found)) == list(map(_told, expected))
    assert isinstance(found[7], Failure)
    assert "tokens; the model takes 128" in found[7].reason
    assert not found[7].retry
    blind = EndpointSource(SourceSection(name="blind", url=f"{server.base}/score", retries=0, send_ended=False))
    others = ask(blind, pairs)  # the cut ones have other scores then
    assert [one == other for one, other in zip(others, expected, strict=True)].count(False) > 20


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{nope", 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"[" * 20000, 400, "no JSON"),
        ([1], 400, "body"),
        ({}, 400, "prompts"),
        ({"prompts": [], "completions": []}, 400, "prompts"),
        ({"prompts": ["a"], "completions": []}, 400, "differ in length"),
        ({"prompts": ["a"], "completions": ["b"], "ended": [1]}, 400, "ended.0"),
        ({"prompts": ["a"], "completions": [5]}, 400, "completions.0"),
        ({"prompts": ["a"], "completions": [[{"role": "assistant", "content": "b"}]]}, 400, "row 0"),
        ({"prompts": [[]], "completions": [[]]}, 400, "prompts.0"),
        ({"prompts": ["a"], "completions": ["b"], "query": ["c"]}, 400, "query"),
        ({"prompts": ["a"] * 201, "completions": ["b"] * 201}, 413, "serve.max_rows"),
        ({"prompts": ["a" * 2**20], "completions": ["b"]}, 413, "serve.max_body_bytes"),
    ],
)
def test_what_is_wrong_is_said_in_openai_s_form(server: Server, body: Any, status: int, words: str) -> None:
    found, _, answer = server.ask("/score", body)
    assert found == status
    assert words in answer["error"]["message"]


def test_nothing_else_is_there(server: Server) -> None:
    for path in ("/", "/docs", "/openapi.json", "/v1/models", "/invocations"):
        status, headers, answer = server.ask(path)
        assert (status, answer["error"]["code"]) == (404, "not_found")
        assert not [name for name in headers if name.lower().startswith("access-control")]
    assert server.ask("/score")[0] == 405
    assert server.ask("/health")[0] == 200
    assert 'raytrl_serve_answers_total{path="other",status="404"}' in server.ask("/metrics")[2]


def _ppo(folder: Path, name: str, source: dict[str, Any], steps: int = 6) -> str:
    sources = [{"name": "taste", **source}]
    return ppo_file(
        folder,
        name,
        learner={"workers": 1},
        rollout={"actors": 1},
        reward={"sources": sources},
        ppo={"steps": steps},
    )


@pytest.mark.slow
def test_a_run_against_the_server_is_a_run_with_the_model(folder: Path) -> None:
    """The server is killed in the middle, and comes back at its address; another is drained under a run's calls."""
    raytrl("ppo", _ppo(folder, "by-model", {"model": str(folder / "reward")}))
    port = free_port()
    path = _ppo(folder, "by-url", {"url": f"http://127.0.0.1:{port}/score", "timeout_s": 20})
    runs = f"output_dir={folder}/runs"
    with served(folder, str(folder / "reward"), runs, "name=first", port=port) as server:
        run = start("ppo", path)
        wait_for("step 2", lambda: last_step(folder / "runs/by-url") >= 2, run)
        kill_everything(server.process)
    with served(folder, str(folder / "reward"), runs, "name=second", port=port):
        output = output_of(run)
        assert run.returncode == 0, output
    assert weights_hash(folder / "runs/by-url/model") == weights_hash(folder / "runs/by-model/model")
    samples = [(folder / f"runs/{name}/samples.jsonl").read_text() for name in ("by-url", "by-model")]
    assert samples[0] == samples[1]


def test_what_is_in_flight_is_finished_and_newcomers_come_again(folder: Path) -> None:
    body = {"prompts": ["a"] * 2000, "completions": ["the film is good"] * 2000}
    with (
        served(
            folder,
            str(folder / "reward"),
            f"output_dir={folder}/runs",
            "name=drained",
            "serve.max_rows=2000",
            "serve.drain_s=90",
        ) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        asked = [pool.submit(server.ask, "/score", body) for _ in range(4)]
        wait_for("work", lambda: "raytrl_serve_running 4.0" in server.ask("/metrics")[2], server.process)
        stopped = threading.Thread(target=server.stop)
        stopped.start()
        refused: list[tuple[int, dict[str, str], Any]] = []
        while server.process.poll() is None:  # to the end: what Ray Serve answers when it has no application is 404
            try:
                refused.append(server.ask("/health"))
            except (OSError, http.client.HTTPException):  # nobody listens any more, or it ended while it answered
                continue
        assert [each.result()[0] for each in asked] == [200] * 4
        stopped.join()
        assert server.process.returncode == 0, server.said()
    draining = [answer for answer in refused if answer[0] != 200]
    assert draining
    assert {status for status, _, _ in draining} == {503}
    assert draining[0][1]["retry-after"] == "1"
    assert json.loads((folder / "runs/drained/manifest.json").read_text())["cut_off"] == 0
