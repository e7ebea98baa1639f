"""POST /score: a reward model as PPO asks it, bit for bit."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StrictBool, StrictStr, model_validator
from pydantic import Field as PydanticField
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from raytrl.config.runs.serve import ServeRun
from raytrl.config.sections.reward import SourceSection
from raytrl.roles.reward.call import MODEL_BATCH_SIZE, Asked, Failure, check_value
from raytrl.roles.reward.model import ModelSource
from raytrl.roles.serving.answers import App, RefusalError, failed, no_such, refused
from raytrl.roles.serving.requests import json_of, of_form

_FAILURES = 3


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: StrictStr


_Text = StrictStr | Annotated[list[_Message], PydanticField(min_length=1)]


class ScoreRequest(BaseModel):
    """What a reward source with a url sends."""

    model_config = ConfigDict(extra="forbid")

    prompts: Annotated[list[_Text], PydanticField(min_length=1)]
    completions: list[_Text]
    ended: list[StrictBool] | None = None

    @model_validator(mode="after")
    def _agreement(self) -> "ScoreRequest":
        lengths = {len(self.prompts), len(self.completions), len(self.prompts if self.ended is None else self.ended)}
        if len(lengths) > 1:
            raise ValueError("prompts, completions and ended differ in length; expected: one of each a response")
        for i, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True)):
            if isinstance(prompt, str) != isinstance(completion, str):
                raise ValueError(
                    f"row {i}: one of prompt and completion is a text, the other a list of messages; expected: two of a kind"
                )
        return self

    def rows(self) -> list[Asked]:
        """What the model is asked; responses of which nothing was said have ended."""
        ended = [True] * len(self.prompts) if self.ended is None else self.ended
        texts = zip(self.prompts, self.completions, ended, strict=True)
        return [Asked(_plain(prompt), _plain(completion), whole) for prompt, completion, whole in texts]


class ScoreServer:
    """A reward model and its application.

    A call is scored by itself, in batches as a reward actor makes them: what shares a batch with a text may change the last
    bits of its score. Calls take turns, batch by batch.
    """

    def __init__(self, run: ServeRun) -> None:
        """Loads the model; raises ConfigError where it cannot be."""
        section = SourceSection(
            name=run.served_name, model=run.model_path, label=run.serve.label, dtype=run.serve.dtype
        )
        self._max_rows = run.serve.max_rows
        self._source = ModelSource(section, keys=("run", "serve.label"))
        self._thread = ThreadPoolExecutor(1, "score")
        self._failures = 0  # in a row

    async def application(self) -> App:
        """What answers; the model has scored once before."""
        await self._in_turn([Asked("a", "b", True)])
        app = Starlette(
            routes=[
                Route("/score", self._score, methods=["POST"]),
            ],
            exception_handlers={RefusalError: refused, HTTPException: no_such, Exception: failed},
        )
        app.router.redirect_slashes = False  # to an address that the client made up
        return app

    def is_alive(self) -> bool:
        """Its engine is this process; after some failures in a row it is not what was asked that fails."""
        return self._failures < _FAILURES

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _score(self, request: Request) -> Response:
        asked = of_form(ScoreRequest, json_of(await request.body()))
        rows = asked.rows()
        if len(rows) > self._max_rows:
            raise RefusalError(
                413,
                "too_many_rows",
                f"{len(rows)} responses in one call; expected: at most {self._max_rows} (serve.max_rows); a reward source asks "
                f"in smaller calls with batch_size",
            )
        found: list[object] = []
        for start in range(0, len(rows), MODEL_BATCH_SIZE):
            found += await self._in_turn(rows[start : start + MODEL_BATCH_SIZE])
        return JSONResponse({"scores": list(map(_as_json, found))})

    async def _in_turn(self, rows: list[Asked]) -> list[object]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._scores, rows)

    def _scores(self, rows: list[Asked]) -> list[object]:
        try:
            found = list(self._source.scores([self._source.token_ids(row) for row in rows]))
        except Exception:
            self._failures += 1
            raise
        self._failures = 0
        return found


def _plain(text: Any) -> Any:
    return text if isinstance(text, str) else [message.model_dump() for message in text]


def _as_json(value: object) -> object:
    """A number, or why there is none; JSON has no NaN."""
    outcome = check_value(value)
    return {"error": outcome.reason, "retry": outcome.retry} if isinstance(outcome, Failure) else outcome
