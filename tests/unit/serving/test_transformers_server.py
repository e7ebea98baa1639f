"""A policy on transformers behind OpenAI's API: what clients get, against transformers itself."""

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI
from prometheus_client import CollectorRegistry
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytrl.config.runs.serve import ServeRun
from raytrl.errors import ConfigError
from raytrl.roles.serving.answers import App, Message
from raytrl.roles.serving.batches import Batches
from raytrl.roles.serving.guard import Guard
from raytrl.roles.serving.metrics import ServerMetrics
from raytrl.roles.serving.transformers_server import TransformersServer
from tests.ppo_files import make_policy

CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }} {{ m['content'] }}<|end|>{% endfor %}"
    "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('a user has to speak') }}{% endif %}"
    "{% if add_generation_prompt %}<|turn|>assistant {% endif %}"
)
LEAST = {"top_p": 5e-324, "extra_body": {"top_k": 1}}
JSON = {"Content-Type": "application/json"}
PROMPTS = ["the film", " good actor is", "a", "the plot of the story was slow and the scene looks"]


def made(folder: Path, family: str = "llama", chat: bool = False, ended: bool = True) -> str:
    """A model; `ended`: without it no response ends by itself."""
    path = make_policy(folder, family)
    if chat:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
        torch.manual_seed(1)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(path)
    if not ended:
        for name in ("config.json", "generation_config.json"):
            file = Path(path) / name
            file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))
        file = Path(path) / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": None}))
    return path


def adapter(base: str, folder: Path, seed: int) -> str:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.5)
    model.save_pretrained(str(folder))
    return str(folder)


class Served:
    """An application in this process, asked by the real client."""

    def __init__(self, path: str, **serve: Any) -> None:
        run = ServeRun.model_validate({"run": path, "serve": {"engine": "transformers", "name": "policy"} | serve})
        metrics = ServerMetrics(CollectorRegistry())
        self.server = TransformersServer(run)
        self.run, self.path = run, path
        app = asyncio.run(self.server.application())
        self.app: App = Guard(app, run.serve, [], self.server.is_alive, metrics)

    def do(self, work: Callable[[AsyncOpenAI], Any]) -> Any:
        async def inside() -> Any:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app)) as http:
                return await work(
                    AsyncOpenAI(base_url="http://localhost/v1", api_key="-", http_client=http, max_retries=0)
                )

        return asyncio.run(inside())

    def complete(self, prompt: Any, **asked: Any) -> Any:
        asked = {"model": "policy", "max_tokens": 24, "extra_body": {}} | asked
        return self.do(lambda client: client.completions.create(prompt=prompt, **asked))

    def texts(self, prompt: Any, **asked: Any) -> list[str]:
        return [choice.text for choice in self.complete(prompt, **asked).choices]

    def streamed(self, prompt: Any, **asked: Any) -> list[Any]:
        async def work(client: AsyncOpenAI) -> list[Any]:
            asked_of = {"model": "policy", "max_tokens": 24} | asked
            stream = await client.completions.create(prompt=prompt, stream=True, **asked_of)
            return [chunk async for chunk in stream]

        found: list[Any] = self.do(work)
        return found

    def post(self, body: Any, path: str = "/v1/completions") -> httpx.Response:
        async def inside() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app)) as http:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                return await http.post(f"http://localhost{path}", content=content, headers=JSON)

        return asyncio.run(inside())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made(tmp_path_factory.mktemp("base"), ended=False)


@pytest.fixture(scope="module")
def served(base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adapters")
    found = Served(
        base, adapters={"one.v1": adapter(base, folder / "1", 1), "two": adapter(base, folder / "2", 2)}, max_tokens=100
    )
    yield found
    found.server.close()


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(made(tmp_path_factory.mktemp("chat"), chat=True))
    yield found
    found.server.close()


def greedy(model: Any, path: str, prompt: str, tokens: int = 24) -> str:
    """By transformers' own generate, alone; as text that goes on."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_greedy_text_is_that_of_transformers(served: Served) -> None:
    model = AutoModelForCausalLM.from_pretrained(served.path)
    assert served.texts(PROMPTS, temperature=0) == [greedy(model, served.path, prompt) for prompt in PROMPTS]


def test_greedy_text_of_a_table_of_positions(tmp_path: Path) -> None:
    served = Served(made(tmp_path, "gpt2"))
    model = AutoModelForCausalLM.from_pretrained(served.path)
    expected = [greedy(model, served.path, prompt, 100) for prompt in PROMPTS]
    assert served.texts(PROMPTS, temperature=0, max_tokens=100) == expected
    assert served.post({"prompt": [5] * 128}).status_code == 400
    assert served.complete([[5] * 127], max_tokens=None).usage.completion_tokens == 1
    answer = served.post({"messages": [{"role": "user", "content": "a"}]}, "/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")
    served.server.close()


def test_adapters_are_the_merged_models(served: Served) -> None:
    from peft import PeftModel

    found = {}
    for name, folder in served.run.serve.adapters.items():
        base = AutoModelForCausalLM.from_pretrained(served.path)
        merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
        found[name] = served.texts(PROMPTS, model=name, temperature=0)
        assert found[name] == [greedy(merged, served.path, prompt) for prompt in PROMPTS]
    assert found["one.v1"] != found["two"] != served.texts(PROMPTS, temperature=0)


def test_requests_for_several_models_at_once(served: Served) -> None:
    names = ["policy", "one.v1", "two"] * 4

    async def work(client: AsyncOpenAI) -> list[str]:
        asked = [
            client.completions.create(model=name, prompt="the film", temperature=0, max_tokens=12) for name in names
        ]
        return [(await each).choices[0].text for each in [asyncio.ensure_future(each) for each in asked]]

    alone = {name: served.texts("the film", model=name, temperature=0, max_tokens=12)[0] for name in set(names)}
    assert served.do(work) == [alone[name] for name in names]


def test_models_are_named_without_paths(served: Served) -> None:
    models = served.do(lambda client: client.models.list()).data
    assert [model.id for model in models] == ["policy", "one.v1", "two"]
    assert served.path not in str(models)


def test_streams_are_the_plain_text(served: Served) -> None:
    whole = served.complete(PROMPTS, seed=3, n=2)
    chunks = served.streamed(PROMPTS, seed=3, n=2, stream_options={"include_usage": True})
    joined = [""] * 8
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        joined[choice.index] += choice.text
        assert chunk.usage is None
    assert joined == [choice.text for choice in whole.choices]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    finished = [chunk.choices[0].index for chunk in chunks[:-1] if chunk.choices[0].finish_reason == "length"]
    assert sorted(finished) == list(range(8))


def test_a_seed_decides(served: Served) -> None:
    first = served.texts("the film", seed=1, n=3)
    assert served.texts("the film", seed=1, n=3) == first and len(set(first)) == 3
    assert served.texts("the film", seed=1) == first[:1]
    assert served.texts("the film", seed=2) != first[:1]
    assert served.texts("the film") != served.texts("the film")


def test_a_row_does_not_depend_on_its_batch(served: Served) -> None:
    together = served.texts(PROMPTS * 10, seed=5)  # more than one batch
    assert together == [served.texts(prompt, seed=5)[0] for prompt in PROMPTS] * 10


def test_prompts_of_a_batch_have_a_limit_together(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer one is alone; nothing else changes."""
    prompts = [[5 + i % 7] * length for i, length in enumerate((30, 3, 50, 8, 12, 1, 20, 10))]
    expected = served.texts(prompts, seed=3)
    monkeypatch.setattr("raytrl.roles.serving.batches.BATCH_PROMPT_TOKENS", 40)
    batches, sample = [], Batches._sample

    def recorded(self: Batches, batch: Any) -> None:
        batches.append([len(row.token_ids) for _, _, row in batch])
        sample(self, batch)

    monkeypatch.setattr(Batches, "_sample", recorded)
    assert served.texts(prompts, seed=3) == expected
    assert sorted(length for batch in batches for length in batch) == sorted(map(len, prompts))
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 40 for batch in batches)
    assert max(map(len, batches)) > 1


def test_usage_and_finish(served: Served) -> None:
    found = served.complete([[1, 2, 3], [4]], max_tokens=7, n=2)
    assert found.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": 4,
        "completion_tokens": 28,
        "total_tokens": 32,
    }
    assert {choice.finish_reason for choice in found.choices} == {"length"}
    assert found.object == "text_completion" and found.model == "policy"
    assert served.complete("a", max_tokens=None).usage.completion_tokens == 16


def test_an_end_token_ends(chatty: Served) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatty.path)
    found = chatty.complete(["the film"] * 30, n=8, max_tokens=60)
    stopped = [choice for choice in found.choices if choice.finish_reason == "stop"]
    assert all(tokenizer.eos_token not in choice.text for choice in found.choices)
    assert stopped and found.usage.completion_tokens < 30 * 8 * 60


def test_stop_strings_across_tokens(served: Served) -> None:
    (text,) = served.texts("the film", temperature=0, max_tokens=60)
    word = text[10:15]  # wherever tokens begin
    expected = text[: text.index(word)]
    for stop in (word, [word, "no such text"]):
        found = served.complete("the film", temperature=0, max_tokens=60, stop=stop)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop")
        assert found.usage.completion_tokens < 60
    chunks = served.streamed("the film", temperature=0, max_tokens=60, stop=word)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_logprobs_are_those_of_a_forward_pass(served: Served) -> None:
    prompt = [5, 9, 12]
    found = served.complete(prompt, seed=4, max_tokens=10, logprobs=3, temperature=0.7, top_p=0.9)
    told = found.choices[0].logprobs
    model, tokenizer = (each.from_pretrained(served.path) for each in (AutoModelForCausalLM, AutoTokenizer))
    vocabulary = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    ids = list(prompt)
    for text, logprob, likeliest in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        with torch.inference_mode():
            logprobs_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        best = [i for i in logprobs_V.topk(3).indices.tolist() if "\N{REPLACEMENT CHARACTER}" not in vocabulary[i]]
        assert [likeliest[vocabulary[i]] for i in best] == pytest.approx(logprobs_V[best].tolist(), abs=1e-4)
        ids.append(
            min((i for i, each in enumerate(vocabulary) if each == text), key=lambda i: abs(logprobs_V[i] - logprob))
        )
        assert logprob == pytest.approx(float(logprobs_V[ids[-1]]), abs=1e-4)
    assert tokenizer.decode(ids[3:], skip_special_tokens=True) == found.choices[0].text
    assert told.text_offset[0] == 0 and told.text_offset == sorted(told.text_offset)
    chunks = served.streamed(prompt, seed=4, max_tokens=10, logprobs=3, temperature=0.7, top_p=0.9)
    assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == told.tokens


def test_dtype_is_what_it_computes_in(base: str) -> None:
    served = Served(base, dtype="bfloat16")
    found = served.complete([[5, 9, 12]], temperature=0, max_tokens=1, logprobs=1).choices[0].logprobs.token_logprobs
    logprobs = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        with torch.inference_mode():
            logits_V = model(torch.tensor([[5, 9, 12]])).logits[0, -1].float()
        logprobs[dtype] = float(logits_V.log_softmax(-1).max())
    assert found == [logprobs[torch.bfloat16]] != [logprobs[torch.float32]]
    assert len(served.texts(PROMPTS, temperature=0)) == len(PROMPTS)
    served.server.close()


def test_top_k_and_top_p_cut_off(served: Served) -> None:
    likeliest = served.texts("the film", temperature=0)
    for cut in ({"extra_body": {"top_k": 1}}, {"top_p": 1e-9}, {"temperature": 1e-300}, LEAST):
        assert served.texts("the film", **cut) == likeliest
    two = {token for text in served.texts("a", n=8, max_tokens=1, extra_body={"top_k": 2}) for token in [text]}
    assert 1 <= len(two) <= 2


def test_chats(chatty: Served) -> None:
    messages = [{"role": "user", "content": "the film is"}]
    tokenizer = AutoTokenizer.from_pretrained(chatty.path)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    model = AutoModelForCausalLM.from_pretrained(chatty.path)
    asked: dict[str, Any] = {"model": "policy", "messages": messages, "temperature": 0}
    expected = greedy(model, chatty.path, text, 20)
    found = chatty.do(
        lambda client: client.chat.completions.create(max_tokens=20, logprobs=True, top_logprobs=2, **asked)
    )
    assert found.choices[0].message.content == expected and found.choices[0].message.role == "assistant"
    assert len(found.choices[0].logprobs.content) == found.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in found.choices[0].logprobs.content)
    prompt_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert found.usage.prompt_tokens == prompt_tokens

    async def stream(client: AsyncOpenAI) -> list[Any]:
        options = {"include_usage": True}
        chunks = await client.chat.completions.create(
            max_completion_tokens=20, stream=True, stream_options=options, **asked
        )
        return [chunk async for chunk in chunks]

    chunks = chatty.do(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-1].usage == found.usage
    # Without a number, as many as there is room for.
    full = chatty.do(lambda client: client.chat.completions.create(seed=0, **(asked | {"temperature": 1.0})))
    assert full.choices[0].finish_reason == "stop" or full.usage.total_tokens == 128


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_stops_the_work(served: Served, stream: bool) -> None:
    async def leave() -> None:
        body = json.dumps({"prompt": "the film", "max_tokens": 100, "n": 8, "stream": stream}).encode()
        begun, messages = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def hear() -> Message:
            return messages.pop() if messages else await asyncio.get_running_loop().create_future()

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.body":
                begun.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
        scope |= {"headers": [(b"content-type", b"application/json")]}
        before = served.server._batches.num_sampled
        task = asyncio.create_task(served.app(scope, hear, tell))
        while served.server._batches.num_sampled == before and not task.done():
            await asyncio.sleep(0)
        if stream:
            await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = served.server._batches.num_sampled
    asyncio.run(leave())
    served.complete("a", max_tokens=1)  # what was left of the batch is done
    assert served.server._batches.num_sampled - before < 8 * 100 - 8


def test_rows_that_have_ended_leave_their_batch(served: Served) -> None:
    async def work(client: AsyncOpenAI) -> None:
        for asked in [asyncio.ensure_future(completed(client, tokens)) for tokens in (3, 50, 7)]:
            await asked

    def completed(client: AsyncOpenAI, tokens: int) -> Any:
        return client.completions.create(model="policy", prompt="a", max_tokens=tokens)

    before = served.server._batches.num_sampled
    served.do(work)
    assert served.server._batches.num_sampled - before == 60


def test_a_large_request_does_not_hold_up_a_small_one(served: Served) -> None:
    async def work(client: AsyncOpenAI) -> None:
        large = asyncio.ensure_future(client.completions.create(model="two", prompt=["a"] * 40, n=8, max_tokens=40))
        while not served.server._batches.num_sampled > before:
            await asyncio.sleep(0)
        await client.completions.create(model="policy", prompt="a", max_tokens=2)
        assert not large.done()
        assert len((await large).choices) == 320

    before = served.server._batches.num_sampled
    served.do(work)


def test_adapters_that_do_not_fit_are_refused(base: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    good = load_file(f"{adapter(base, tmp_path / 'good', 1)}/adapter_model.safetensors")
    name = sorted(good)[0]
    for wrong in (
        {key: value for key, value in good.items() if key != name},
        good | {name.replace("layers.0", "layers.7"): good[name].clone()},
        good | {name: good[name][:, :-1].clone()},
    ):
        save_file(wrong, tmp_path / "good/adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=r"serve\.adapters\.wrong: .*does not fit the model"):
            Served(base, adapters={"wrong": str(tmp_path / "good")})


def test_models_that_cannot_be_loaded_are_refused(base: str) -> None:
    with pytest.raises(ConfigError, match=r"run: .*cannot be loaded"):
        Served(base, engine_args={"no_such_argument": 1})
    short = Served(base, engine_args={"max_model_len": 20})
    assert short.complete([5] * 10, max_tokens=10).usage.total_tokens == 20
    assert short.post({"prompt": [5] * 10, "max_tokens": 11}).status_code == 400
    short.server.close()


def test_time_that_is_up_stops_the_work(base: str) -> None:
    served = Served(base, request_timeout_s=1.0)
    served.complete("a", max_tokens=1)
    answer = served.post({"prompt": ["a"] * 100, "n": 8, "max_tokens": 100})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    served.complete("a", max_tokens=1)
    assert served.server._batches.num_sampled < 800 * 100 / 2
    served.server.close()


BAD: list[tuple[Any, int, str | None]] = [
    (b"{", 400, None),
    (b'"text"', 400, None),
    (b"[" * 100000, 400, None),
    (b'{"prompt": "\\ud800"}', 400, None),
    ({}, 400, "prompt"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": 5}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": ["a", ""]}, 400, "prompt"),
    ({"prompt": [True]}, 400, "prompt"),
    ({"prompt": [1, "a"]}, 400, "prompt"),
    ({"prompt": [1e9]}, 400, "prompt"),
    ({"prompt": [10**9]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [5] * 128}, 400, "prompt"),
    ({"prompt": [5] * 100, "max_tokens": 29}, 400, "prompt"),
    ({"prompt": ["a"] * 1025}, 413, None),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    ({"prompt": "a", "max_tokens": 101}, 400, "max_tokens"),
    ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens"),
    ({"prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
    (b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
    (b'{"prompt": "a", "temperature": Infinity}', 400, "temperature"),
    ({"prompt": "a", "temperature": -0.1}, 400, "temperature"),
    ({"prompt": "a", "temperature": True}, 400, "temperature"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p"),
    ({"prompt": "a", "top_p": 1.1}, 400, "top_p"),
    ({"prompt": "a", "top_k": 2**70}, 400, "top_k"),
    ({"prompt": "a", "seed": 2**63}, 400, "seed"),
    ({"prompt": "a", "n": 0}, 400, "n"),
    ({"prompt": "a", "n": 9}, 400, "n"),
    ({"prompt": "a", "n": 10**30}, 400, "n"),
    ({"prompt": "a", "stop": ""}, 400, "stop"),
    ({"prompt": "a", "stop": ["a"] * 5}, 400, "stop"),
    ({"prompt": "a", "stop": [1]}, 400, "stop"),
    ({"prompt": "a", "logprobs": 6}, 400, "logprobs"),
    ({"prompt": "a", "stream": "yes"}, 400, "stream"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, None),
    ({"prompt": "a", "stream": True, "stream_options": {"more": 1}}, 400, "stream_options.more"),
    ({"prompt": "a", "model": "other"}, 404, "model"),
    ({"prompt": "a", "model": 5}, 400, "model"),
    ({"prompt": "a", "echo": True}, 400, "echo"),
    ({"prompt": "a", "best_of": 2}, 400, "best_of"),
    ({"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ({"prompt": "a", "max_token": 5}, 400, "max_token"),
]


@pytest.mark.parametrize(("body", "status", "param"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests_are_refused(served: Served, body: Any, status: int, param: str | None) -> None:
    answer = served.post(body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["code"] and error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "a"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, "tools"),
        (
            {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, None),
        ({"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 128}, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 200}]}, "messages"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_chats_are_refused(chatty: Served, body: Any, param: str | None) -> None:
    answer = chatty.post(body, "/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_what_asks_for_nothing_is_taken(chatty: Served) -> None:
    nothing = {"tools": None, "frequency_penalty": 0, "presence_penalty": 0.0, "user": "somebody", "logit_bias": None}
    parts = [{"type": "text", "text": "the film"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 2, **nothing}
    assert chatty.post(body, "/v1/chat/completions").status_code == 200
    assert chatty.post({"prompt": "a", "max_tokens": 2, "echo": False, "best_of": 1, "n": 1}).status_code == 200


def test_paths(served: Served) -> None:
    assert served.post({}, "/v1/nothing").status_code == 404

    async def get(path: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(served.app)) as http:
            return await http.get(f"http://localhost{path}")

    assert asyncio.run(get("/health")).status_code == 200
    assert "raytrl_serve_answers" in asyncio.run(get("/metrics")).text
    assert asyncio.run(get("/v1/completions")).status_code == 405


def test_a_model_that_fails_is_told_and_ends_the_server(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(base)
    broken = threading.Event()
    forward = served.server._batches._model.forward

    def breaking(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if broken.is_set():
            out.logits = out.logits * math.nan
        return out

    monkeypatch.setattr(served.server._batches._model, "forward", breaking)
    assert served.post({"prompt": "a"}).status_code == 200
    broken.set()
    answers = [served.post({"prompt": "a"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [500, 500] and served.server.is_alive()
    assert answers[0].json()["error"]["code"] == "internal_error"
    assert served.post({"prompt": "a", "stream": True}).status_code in (500, 503)  # the third in a row
    served.server._batches._thread.join(10)
    assert not served.server.is_alive()
    answer = served.post({"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_gone")
