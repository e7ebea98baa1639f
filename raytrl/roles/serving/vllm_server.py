"""A policy on vLLM behind OpenAI's API: vLLM's own serving classes, with our routes, limits and defaults.

All of what vLLM keeps moving from release to release is imported here; tests/ray/test_serve_policy.py holds it to the pinned
one.
"""

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from transformers import AutoConfig, AutoTokenizer

from raytrl.config.runs.serve import ServeRun
from raytrl.errors import RunError
from raytrl.roles.device import VLLM_ENVIRONMENT
from raytrl.roles.models.base import torch_dtype
from raytrl.roles.models.positions import positions_of
from raytrl.roles.models.tokenizer import turn_end
from raytrl.roles.rollout.vllm.adapters import adapter_arguments
from raytrl.roles.rollout.vllm.engine import cpu_arguments, gpu_arguments
from raytrl.roles.serving.answers import App, RefusalError, no_such, post, refused
from raytrl.roles.serving.requests import check_limits, json_of

# Ours come first, and say which key they are of.
_OWN_LIMITS = {"VLLM_MAX_N_SEQUENCES": str(2**30), "VLLM_MAX_COMPLETION_PROMPTS": str(2**30)}
_WARM_UP = {"max_tokens": 2, "n": 2, "logprobs": 1, "seed": 0, "temperature": 1.0}


class VllmServer:
    """vLLM's engine, in a process of its own, and the application in front of it."""

    def __init__(self, run: ServeRun) -> None:
        self._run = run
        self._engine: Any = None

    async def application(self) -> App:
        """What answers; the engine has answered once before, with all that a first request would wait for."""
        for name, value in (VLLM_ENVIRONMENT | _OWN_LIMITS).items():
            os.environ.setdefault(name, value)
        from fastapi import Depends, FastAPI, Request
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.api_router import create_completion
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.openai.models.api_router import show_available_models
        from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
        from vllm.entrypoints.serve.utils.api_utils import validate_json_request
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(self._words())
        vars(arguments).update(self._arguments())
        context = UsageContext.OPENAI_API_SERVER
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs.from_cli_args(arguments), usage_context=context, stat_loggers=_stat_loggers()
        )
        # Of a stream that fails they would log what was asked.
        logging.getLogger("vllm.entrypoints").setLevel(logging.CRITICAL)
        app = FastAPI(redirect_slashes=False, openapi_url=None, docs_url=None, redoc_url=None)
        app.state.args = arguments
        init_exception_handler(app)
        app.exception_handler(RefusalError)(refused)
        app.exception_handler(HTTPException)(no_such)
        await init_app_state(self._engine, app.state, arguments, await self._engine.get_supported_tasks())
        app.state.server = None
        ends_turns = _ends_of_turns(self._run.model_path)
        # vLLM shields its work from the cancellation by which Ray Serve tells that a client has left.
        complete, chat = _unshielded(create_completion), _unshielded(create_chat_completion)

        async def whole_text(raw_request: Request) -> None:
            if b"\\u" in (body := await raw_request.body()):
                json_of(body)

        checked = [Depends(validate_json_request), Depends(whole_text)]

        @app.post("/v1/completions", dependencies=checked)
        async def completions(request: CompletionRequest, raw_request: Request) -> Any:
            prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
            rows = 1 if prompts and isinstance(prompts[0], int) else len(prompts)
            self._check(request, rows, request.max_tokens)
            return await self._constrained(complete, request, raw_request)

        @app.post("/v1/chat/completions", dependencies=checked)
        async def chat_completions(request: ChatCompletionRequest, raw_request: Request) -> Any:
            self._check(request, 1, request.max_completion_tokens or request.max_tokens)
            request.stop_token_ids = [*(request.stop_token_ids or ()), *ends_turns]
            return await self._constrained(chat, request, raw_request)

        @app.get("/v1/models")
        async def models(raw_request: Request) -> Any:
            return _without_paths(await show_available_models(raw_request))

        await _warm_up(app, self._run)
        return app

    def is_alive(self) -> bool:
        """Whether the engine's process works."""
        return self._engine is not None and not self._engine.errored

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()

    async def _constrained(self, route: Callable[..., Awaitable[Any]], request: Any, raw_request: Any) -> Any:
        """The answer; a grammar that cannot be compiled fails in the engine, which calls that a fault of its own."""
        from vllm.v1.engine.exceptions import EngineGenerateError

        try:
            answer = await route(request, raw_request)
        except EngineGenerateError:
            given = [
                name for name in ("structured_outputs", "response_format") if _constrains(getattr(request, name, None))
            ]
            if not given or not self.is_alive():
                raise
            raise RefusalError(
                400, "invalid_constraint", f"{given[0]}: cannot be kept to; expected: a valid grammar", param=given[0]
            ) from None

        task = asyncio.current_task()
        if task is not None and task.cancelling():  # vLLM makes a refusal of it, which nobody asked for
            raise asyncio.CancelledError
        return answer

    def _check(self, request: Any, rows: int, max_tokens: int | None) -> None:
        unknown = request.model_extra or ()
        check_limits(self._run.serve, rows=rows, n=request.n, max_tokens=max_tokens, unknown=unknown)

    def _words(self) -> list[str]:
        """As vLLM's own server is told; what has a field of EngineArgs is in `_arguments`."""
        run = self._run
        words = ["--model", run.model_path, "--served-model-name", run.served_name]
        if run.serve.adapters:
            adapters = [json.dumps({"name": name, "path": path}) for name, path in run.serve.adapters.items()]
            words += ["--enable-lora", "--lora-modules", *adapters]
        return words

    def _arguments(self) -> dict[str, Any]:
        run = self._run
        dtype = torch_dtype(run.serve.dtype, run.uses_gpu)
        chosen: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "generation_config": "vllm",  # OpenAI's defaults, as in training; not those of the model's authors
            "seed": run.seed,
        }
        if run.uses_gpu:
            chosen |= gpu_arguments(run.sampling)
        else:
            config = AutoConfig.from_pretrained(run.model_path).get_text_config()
            positions = positions_of(config)
            assert positions is not None, "refused before the start"
            chosen |= cpu_arguments(run.sampling, config, dtype, positions.most)
        if ranks := [_rank_of(path) for path in run.serve.adapters.values()]:
            chosen |= adapter_arguments({"r": max(ranks)}, len(ranks))
        chosen |= run.serve.engine_args
        if run.serve.max_tokens is not None:  # what a chat has that asks for no number
            own = {"max_new_tokens": run.serve.max_tokens}
            chosen["override_generation_config"] = {**chosen.get("override_generation_config", {}), **own}
        return chosen


def _stat_loggers() -> list[Any]:
    """vLLM's own metrics: at /metrics, and within Ray Serve to Ray as well."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    return [PrometheusStatLogger, RayPrometheusStatLogger]


def _unshielded(route: Any) -> Callable[..., Awaitable[Any]]:
    """vLLM's route without `with_cancellation`, whose inner task outlives a cancellation."""
    inner: Callable[..., Awaitable[Any]] = route.__wrapped__
    return inner


def _constrains(asked: Any) -> bool:
    """Whether a request's field holds the text to a form."""
    return asked is not None and getattr(asked, "type", None) != "text"


def _ends_of_turns(model_path: str) -> list[int]:
    """What ends an assistant's turn beside the end token, as where the policy was sampled in training."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    turn = turn_end(tokenizer)
    return [] if turn is None or turn[0] == tokenizer.eos_token_id else [turn[0]]


def _rank_of(adapter: str) -> int:
    config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    return max([int(config.get("r", 8)), *map(int, (config.get("rank_pattern") or {}).values())])


def _without_paths(answer: Any) -> Any:
    """vLLM tells where on this machine the models lie."""
    from fastapi.responses import JSONResponse

    said = json.loads(answer.body)
    for model in said["data"]:
        model["root"] = model["id"]
    return JSONResponse(said)


async def _warm_up(app: App, run: ServeRun) -> None:
    """One request of each kind that is served otherwise at first only."""
    body = {"model": run.served_name, "prompt": "a", **_WARM_UP}
    status = await post(app, "/v1/completions", body)
    if status != 200:
        raise RunError(f"serve: the engine did not answer its first request; found: HTTP {status}; expected: 200")
