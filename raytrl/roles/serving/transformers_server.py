"""A policy on transformers behind OpenAI's API, by batches of the moment."""

import asyncio
import copy
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from transformers import AutoTokenizer

from raytrl.config.runs.serve import ServeRun
from raytrl.config.sections.serve import BATCH_ROWS
from raytrl.errors import ConfigError, RunError
from raytrl.roles.models.adapters import with_adapters
from raytrl.roles.models.base import torch_dtype
from raytrl.roles.models.loading import load_model
from raytrl.roles.models.positions import positions_of
from raytrl.roles.models.rendering import rendered
from raytrl.roles.rollout.engine import Endings, ending_token_ids, response_seed
from raytrl.roles.serving.answers import App, RefusalError, failed, no_such, post, refused
from raytrl.roles.serving.batches import Batches
from raytrl.roles.serving.bodies import Bodies, ChatBodies, CompletionBodies
from raytrl.roles.serving.protocol import ChatRequest, CompletionRequest, parsed
from raytrl.roles.serving.requests import check_limits
from raytrl.roles.serving.responses import Call, Piece, Row

_TAIL_TOKENS = 16  # of a prompt: enough for whole characters and a word
_WARM_UP = {"prompt": "a", "max_tokens": 2, "n": 2, "logprobs": 1, "seed": 0}


class TransformersServer:
    """The model in this process, and the application that answers for it."""

    def __init__(self, run: ServeRun) -> None:
        """Loads the model; raises ConfigError where it cannot be."""
        self._run, self._began = run, int(time.time())
        options = dict(run.serve.engine_args)
        limit = options.pop("max_model_len", None)  # vLLM's word, for models whose config has none
        try:
            # A tokenizer takes one caller at a time: this one is asked by the thread that encodes.
            self._tokenizer = AutoTokenizer.from_pretrained(
                run.model_path, trust_remote_code=options.get("trust_remote_code", False)
            )
            model = load_model(
                run.model_path, "causal", "run", **{"dtype": torch_dtype(run.serve.dtype, run.uses_gpu)} | options
            )
            if "device_map" not in options:
                model = model.to("cuda" if run.uses_gpu else "cpu")
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"run: {run.model_path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        lengths = [each for each in (limit, getattr(positions_of(model.config), "most", None)) if each is not None]
        if not lengths:
            raise ConfigError("serve.engine_args.max_model_len: how many tokens the model takes is not known")
        self._length, self._num_tokens = min(lengths), model.get_input_embeddings().num_embeddings
        ends = model.generation_config.eos_token_id
        more = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self._ends = frozenset(ending_token_ids(self._tokenizer, more))
        self._ends_of_chat = frozenset(Endings(self._tokenizer, more).of_chat)
        # Inside PEFT they have names of their own: those of users may have dots, which names of modules must not.
        self._adapters = {name: f"adapter_{i}" for i, name in enumerate(run.serve.adapters)}
        folders = {self._adapters[name]: (f"serve.adapters.{name}", path) for name, path in run.serve.adapters.items()}
        self._batches = Batches(
            with_adapters(model, folders).eval(),
            copy.deepcopy(self._tokenizer),
            min(run.serve.max_ongoing, BATCH_ROWS),
        )
        self._encoder = ThreadPoolExecutor(1, "tokens")

    async def application(self) -> App:
        """What answers; the model has answered once before."""
        app = Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
            ],
            exception_handlers={RefusalError: refused, HTTPException: no_such, Exception: failed},
        )
        app.router.redirect_slashes = False  # to an address that the client made up
        if (status := await post(app, "/v1/completions", _WARM_UP)) != 200:
            raise RunError(f"serve: the model did not answer its first request; found: HTTP {status}; expected: 200")
        return app

    def is_alive(self) -> bool:
        """Whether the thread that samples works."""
        return self._batches.is_alive()

    def close(self) -> None:
        self._batches.close()
        self._encoder.shutdown(wait=False, cancel_futures=True)

    async def _completions(self, request: Request) -> Response:
        asked = parsed(CompletionRequest, await request.body())
        check_limits(self._run.serve, rows=len(asked.prompt), n=asked.n, max_tokens=asked.max_tokens)
        adapter = self._adapter(asked.model)
        prompts = await self._encoding(self._ids_of_prompts, asked.prompt)
        rows = self._rows(asked, prompts, self._ends, _TAIL_TOKENS)
        bodies = CompletionBodies(*self._about(asked, prompts), asked.logprobs is not None)
        return await self._answer(Call(rows, adapter, bool(asked.stream)), bodies, len(rows))

    async def _chat(self, request: Request) -> Response:
        asked = parsed(ChatRequest, await request.body())
        check_limits(self._run.serve, rows=1, n=asked.n, max_tokens=asked.asked_tokens)
        adapter = self._adapter(asked.model)
        prompts = [await self._encoding(self._ids_of_chat, [message.plain() for message in asked.messages])]
        rows = self._rows(asked, prompts, self._ends_of_chat, 0)  # a turn begins a text of its own
        bodies = ChatBodies(*self._about(asked, prompts), bool(asked.logprobs))
        return await self._answer(Call(rows, adapter, bool(asked.stream)), bodies, len(rows))

    async def _models(self, _: Request) -> Response:
        base = self._run.served_name
        data = [
            {
                "id": name,
                "object": "model",
                "created": self._began,
                "owned_by": "raytrl",
                "root": name,
                "parent": None if name == base else base,
                "max_model_len": self._length,
            }
            for name in (base, *self._adapters)
        ]
        return JSONResponse({"object": "list", "data": data})

    def _adapter(self, model: str | None) -> str | None:
        """PEFT's name of what a request calls its model; None: the model itself."""
        if model is None or model == self._run.served_name:
            return None
        if model not in self._adapters:
            raise RefusalError(404, "model_not_found", "model: no such model; see /v1/models", param="model")
        return self._adapters[model]

    async def _encoding(self, encode: Any, said: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, encode, said)

    def _ids_of_prompts(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        return [self._tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in prompts]

    def _ids_of_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise RefusalError(400, "no_chat_template", "the model has no chat template; use /v1/completions")
        try:
            text = rendered(self._tokenizer, messages, add_generation_prompt=True)
        except Exception as error:  # a template is a program; it may raise anything, and says what it wants
            raise RefusalError(
                400, "invalid_messages", f"messages: the chat template refuses them: {error}", param="messages"
            ) from None
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _rows(
        self, asked: CompletionRequest | ChatRequest, prompts: Sequence[list[int]], ends: frozenset[int], tail: int
    ) -> list[Row]:
        """One a choice, prompt by prompt; the n-th choice has the same seed whatever else is asked with it."""
        rooms = [self._room(ids, asked) for ids in prompts]
        return [
            Row(
                ids,
                asked.sampling,
                room=room,
                seed=secrets.randbits(63) if asked.seed is None else response_seed(asked.seed, 0, 0, choice),
                ends=ends,
                before=ids[len(ids) - min(tail, len(ids)) :],
            )
            for ids, room in zip(prompts, rooms, strict=True)
            for choice in range(asked.choices)
        ]

    def _room(self, ids: Sequence[int], asked: CompletionRequest | ChatRequest) -> int:
        """Tokens of a response at most."""
        place = "prompt" if isinstance(asked, CompletionRequest) else "messages"
        if not ids:
            raise RefusalError(400, "empty_prompt", f"{place}: no token; expected: at least one", param=place)
        if min(ids) < 0 or max(ids) >= self._num_tokens:
            raise RefusalError(
                400, "unknown_token", f"{place}: ids of tokens go from 0 to {self._num_tokens - 1}", param=place
            )
        room, wanted = self._length - len(ids), asked.asked_tokens
        if room < 1 or (wanted or 0) > room:
            asks = f"and {wanted} are asked for" if wanted else "and a response needs one or more"
            raise RefusalError(
                400,
                "context_length_exceeded",
                f"{place}: has {len(ids)} tokens, {asks}; expected: at most {self._length} in all",
                param=place,
            )
        return wanted or min(room, asked.default_tokens(self._run.serve.max_tokens) or room)

    def _about(self, asked: CompletionRequest | ChatRequest, prompts: Sequence[Sequence[int]]) -> tuple[str, int, bool]:
        return asked.model or self._run.served_name, sum(map(len, prompts)), asked.with_usage

    async def _answer(self, call: Call, bodies: Bodies, rows: int) -> Response:
        self._batches.submit(call)
        if call.streams:
            return _Events(call, bodies, rows)
        try:
            found: dict[int, Piece] = {index: piece async for index, piece in call.pieces()}
        finally:
            call.is_wanted = False
        return JSONResponse(bodies.whole([found[index] for index in range(rows)]))


class _Events(StreamingResponse):
    """A stream whose rows end with it, however it ends."""

    def __init__(self, call: Call, bodies: Bodies, rows: int) -> None:
        self._call = call
        super().__init__(_events(call, bodies, rows), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.is_wanted = False


async def _events(call: Call, bodies: Bodies, rows: int) -> AsyncIterator[bytes]:
    if first := b"".join(map(bodies.begin, range(rows))):
        yield first
    async for index, piece in call.pieces():
        yield bodies.chunk(index, piece)
    yield bodies.end()
