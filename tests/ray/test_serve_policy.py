"""A policy that `raytrl serve` serves with vLLM, asked by OpenAI's own client."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import APIStatusError, AuthenticationError, OpenAI
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ppo_files import make_policy
from tests.runs import wait_for
from tests.served import Server, served

KEY = "the-key-of-these-tests"
PROMPTS = ("the film", "a dull story is", "warm")
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with a chat template, and two LoRA adapters for it."""
    folder = tmp_path_factory.mktemp("serve-policy")
    policy = make_policy(folder, head_size=32)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(policy)
    for seed, name in enumerate(("polite", "rude")):
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy), lora)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    (folder / "key").write_text(f"{KEY}\nthe-next-key\n")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    words = [
        *(
            "policy",
            "serve.name=film",
            "serve.host=0.0.0.0",
            f"serve.api_key=FILM_KEY={folder}/key",
            "serve.engine=vllm",
        ),
        *("serve.adapters={polite: polite, rude: rude}", "serve.max_tokens=100", "serve.max_n=4", "serve.max_rows=20"),
        *("serve.max_ongoing=8", "serve.max_queued=4", "serve.request_timeout_s=60"),
    ]
    with served(folder, *words) as server:
        yield server


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.base}/v1", api_key=KEY, max_retries=0, timeout=60)


def _greedy(folder: Path, adapter: str | None, prompt: str, tokens: int) -> str:
    """By transformers, of the merged model."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "policy")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, folder / adapter).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return str(tokenizer.decode(made, skip_special_tokens=True)).rstrip("\ufffd")  # vLLM withholds half a character


@pytest.mark.parametrize("model", ["film", "polite", "rude"])
def test_greedy_text_is_that_of_transformers_and_streamed_is_plain(folder: Path, client: OpenAI, model: str) -> None:
    expected = [_greedy(folder, None if model == "film" else model, prompt, 12) for prompt in PROMPTS]
    made = client.completions.create(model=model, prompt=list(PROMPTS), max_tokens=12, temperature=0)
    assert [choice.text for choice in made.choices] == expected
    assert made.usage is not None
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    assert made.usage.prompt_tokens == sum(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    for prompt, text in zip(PROMPTS, expected, strict=True):
        parts = client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0, stream=True)
        assert "".join(part.choices[0].text for part in parts) == text


def test_chat_is_the_template_s_text(folder: Path, client: OpenAI) -> None:
    asked: Any = [{"role": "user", "content": "the film"}]
    made = client.chat.completions.create(model="film", messages=asked, max_tokens=12, temperature=0)
    assert made.choices[0].message.content == _greedy(folder, None, "[user]the film<|end|>[assistant]", 12)
    parts = client.chat.completions.create(model="film", messages=asked, max_tokens=12, temperature=0, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == made.choices[0].message.content


def test_the_same_seed_has_the_same_text(client: OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        made = client.completions.create(model="film", prompt="the", max_tokens=16, seed=seed, n=3)
        return [choice.text for choice in made.choices]

    assert texts(1) == texts(1) != texts(2)
    assert len(set(texts(1))) == 3


def test_models_have_names_and_no_paths(folder: Path, client: OpenAI, server: Server) -> None:
    assert sorted(model.id for model in client.models.list()) == ["film", "polite", "rude"]
    assert str(folder) not in json.dumps(server.ask("/v1/models", headers={"Authorization": f"Bearer {KEY}"})[2])


def test_without_the_key_nothing_but_health_answers(server: Server) -> None:
    for path in ("/v1/completions", "/v1/models", "/metrics", "/invocations", "/tokenize", "/v1/load_lora_adapter"):
        for method in ("GET", "POST"):
            assert server.ask(path, {} if method == "POST" else None, method=method)[0] == 401
    assert server.ask("/health")[0] == 200
    assert OpenAI(base_url=f"{server.base}/v1", api_key="the-next-key").models.list().data
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{server.base}/v1", api_key="none").models.list()
    marker = "nobody shall log this prompt"
    server.ask("/v1/completions", {"prompt": marker, "model": "film"}, headers={"Authorization": f"Bearer {KEY}"})
    server.ask("/v1/completions", {"prompt": marker, "n": "many"}, headers={"Authorization": f"Bearer {KEY}"})
    words = [word for process in server.below("raylet") for word in process.cmdline() if "raylet_socket_name=" in word]
    sessions = {Path(word.partition("=")[2]).parents[1] for word in words}
    written = [file for place in (server.log.parent, *sessions) for file in place.rglob("*") if file.is_file()]
    assert len(written) > 20
    for file in written:
        text = file.read_bytes() if file.name != "key" else b""
        assert KEY.encode() not in text, file
        assert marker.encode() not in text, file


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        (b"{nope", 400, "JSON"),
        (b"[1]", 400, "dictionary"),
        ({"prompt": ""}, 400, "non-empty"),
        ({"prompt": []}, 400, "at least one prompt"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": [999999]}, 400, "out of vocabulary"),
        ({"prompt": [-1]}, 400, "greater than or equal to 0"),
        ({"prompt": "the " * 500}, 400, "maximum context length"),
        ({"prompt": ["the"] * 21}, 413, "serve.max_rows"),
        ({"prompt": "a" * 2**20}, 413, "serve.max_body_bytes"),
        ({"max_tokens": 0}, 400, "at least 1"),
        ({"max_tokens": -1}, 400, "at least 1"),
        ({"max_tokens": 101}, 400, "serve.max_tokens"),
        ({"temperature": -1}, 400, "non-negative"),
        (b'{"model": "film", "prompt": "a", "temperature": NaN}', 400, "finite"),
        ({"top_p": 2}, 400, "top_p"),
        ({"n": 5}, 400, "serve.max_n"),
        ({"n": 0}, 400, "at least 1"),
        ({"n": "many"}, 400, "integer"),
        ({"stop": [""]}, 400, "empty"),
        (b'{"model": "film", "prompt": "a", "stop": ["\\ud800"]}', 400, "JSON"),
        ({"logprobs": 1000}, 400, "logprobs"),
        ({"best_of": 2}, 400, "best_of"),
        ({"unheard": 1}, 400, "unheard"),
        ({"logit_bias": {"999999": 1}}, 400, "vocab"),
        ({"structured_outputs": {"regex": "((("}}, 400, "structured_outputs"),
        ({"stream": True, "max_tokens": 0}, 400, "at least 1"),
        ({"stream": True, "prompt": [999999]}, 400, "out of vocabulary"),
        ({"stream": True, "logit_bias": {"999999": 1}}, 400, "vocab"),
        ({"stream": True, "logprobs": 1000}, 400, "logprobs"),
        ({"model": "other"}, 404, "does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_openai_s_form(server: Server, given: Any, status: int, words: str) -> None:
    body = given if isinstance(given, bytes) else {"model": "film", "prompt": "a", "max_tokens": 2} | given
    found, _, answer = server.ask("/v1/completions", body, headers={"Authorization": f"Bearer {KEY}"})
    assert (found, words in answer["error"]["message"]) == (status, True), answer


@pytest.mark.parametrize(
    "body", [{}, {"messages": "a"}, {"messages": []}, {"messages": [{"content": "a"}]}, {"messages": [5]}]
)
def test_a_chat_without_messages_is_refused(server: Server, body: Any) -> None:
    found, _, answer = server.ask(
        "/v1/chat/completions", {"model": "film"} | body, headers={"Authorization": f"Bearer {KEY}"}
    )
    assert found == 400, answer
    assert answer["error"]["message"]


def _generated(server: Server) -> float:
    text = server.ask("/metrics", headers={"Authorization": f"Bearer {KEY}"})[2]
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:generation_tokens_total"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_engine(server: Server, stream: bool) -> None:
    """Of what eight clients asked for, most is never made: they leave as soon as the engine has begun."""
    import http.client

    host = server.base.removeprefix("http://")
    before = _generated(server)
    prompts = ["the"] * 20
    body = json.dumps(
        {"model": "film", "prompt": prompts, "max_tokens": 100, "n": 4, "ignore_eos": True, "stream": stream}
    )
    left = []
    for _ in range(8):
        connection = http.client.HTTPConnection(host)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        left.append(connection)
    if stream:
        left[0].getresponse().read(20)
    else:
        running = "raytrl_serve_running 8.0"
        wait_for("work", lambda: running in server.ask("/metrics", headers=headers)[2], server.process)
    for connection in left:
        connection.close()
    gone = "raytrl_serve_running 0.0"
    wait_for("idle", lambda: gone in server.ask("/metrics", headers=headers)[2], server.process)
    made = _generated(server) - before
    assert made < 0.4 * 8 * 20 * 4 * 100
    assert (
        'raytrl_serve_answers_total{path="/v1/completions",status="499"}' in server.ask("/metrics", headers=headers)[2]
    )
    assert server.ask("/health")[0] == 200


def test_too_many_at_a_time_are_told_when_to_come_again(server: Server, client: OpenAI) -> None:
    def ask(seed: int) -> tuple[int, str | None]:
        body: Any = {"ignore_eos": True}
        try:
            client.completions.create(model="film", prompt="the", max_tokens=100, seed=seed, n=4, extra_body=body)
        except APIStatusError as error:
            return error.status_code, error.response.headers["retry-after"]
        return 200, None

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, range(24)))
    assert set(found) == {(200, None), (429, "1")}
    assert found.count((200, None)) >= 12


@pytest.mark.slow
def test_an_engine_that_is_killed_comes_back(server: Server, client: OpenAI) -> None:
    """Whoever comes at once is told to come again; who comes while the replica is replaced waits for the new one."""
    (engine,) = server.below("EngineCore")
    engine.kill()
    seen, ends = list[int](), time.monotonic() + 200
    while time.monotonic() < ends and 200 not in seen:
        try:
            client.completions.create(model="film", prompt="the", max_tokens=2, timeout=200)
            seen.append(200)
        except APIStatusError as error:
            seen.append(error.status_code)
    assert set(seen) <= {503, 200}, seen
    assert seen[0] == 503
    assert engine.pid not in {process.pid for process in server.below("EngineCore")}
    assert "0 of 1 replicas answer" in server.said()


@pytest.mark.slow
def test_dtype_is_what_it_computes_in(folder: Path) -> None:
    ids = [[5, 9, 12], [7, 30, 2, 41], [16, 8]]
    with served(
        folder, "policy", "name=half", "serve.name=half", "serve.engine=vllm", "serve.dtype=bfloat16"
    ) as server:
        client = OpenAI(base_url=f"{server.base}/v1", api_key="none", max_retries=0, timeout=60)
        made = client.completions.create(model="half", prompt=ids, max_tokens=1, temperature=0, logprobs=1)
    found = torch.tensor([choice.logprobs.token_logprobs[0] for choice in made.choices if choice.logprobs])
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    with torch.inference_mode():
        rows = [model(torch.tensor([row])).logits[0, -1].log_softmax(-1).max() for row in ids]
    error = float((found - torch.stack(rows)).abs().max())
    assert 1e-3 < error < 0.1  # bfloat16 rounds logits of about 5 to 0.02; float32 is within 1e-5
