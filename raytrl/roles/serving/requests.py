"""Bodies of requests: JSON of a known form, within the limits of `serve`; else a refusal."""

import json
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from raytrl.config.sections.serve import ServeSection
from raytrl.roles.serving.answers import RefusalError

Form = TypeVar("Form", bound=BaseModel)


def json_of(body: bytes) -> Any:
    """What the body says; raises RefusalError where it is no JSON, or holds what is no text."""
    try:
        found = json.loads(body)
        if b"\\u" in body:  # half of a surrogate pair is JSON, but no tokenizer takes it
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RefusalError(400, "invalid_json", f"the body is no JSON: {type(error).__name__}") from None
    return found


def of_form(form: type[Form], found: Any) -> Form:
    """As a request; raises RefusalError with the name of the first field that is wrong, never with what was in it."""
    try:
        return form.model_validate(found)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        # Names of the types of a union stand between the fields.
        parts = [str(part) for part in problem["loc"]]
        place = ".".join(part for part in parts if (part.isidentifier() and part != "str") or part.isdigit())
        if problem["type"] == "extra_forbidden":
            raise unknown_field(place) from None
        raise RefusalError(400, "invalid_body", f"{place or 'body'}: {problem['msg']}", param=place or None) from None


def unknown_field(name: str) -> RefusalError:
    """A field that nobody reads is refused, as at OpenAI, not passed over."""
    return RefusalError(400, "unknown_field", f"{name}: unknown; expected: no such field", param=name)


def check_limits(
    serve: ServeSection, *, rows: int, n: int | None, max_tokens: int | None, unknown: Iterable[str] = ()
) -> None:
    """Refuses what is beyond our own limits.

    Args:
        rows: prompts of one request.
        unknown: names of fields that nobody reads.
    """
    for name in sorted(unknown):
        raise unknown_field(name)
    if rows > serve.max_rows:
        raise RefusalError(
            413,
            "too_many_rows",
            f"{rows} prompts in one request; expected: at most {serve.max_rows} (serve.max_rows)",
        )
    if (n or 1) > serve.max_n:
        raise RefusalError(
            400, "n_too_large", f"n: found: {n}; expected: at most {serve.max_n} (serve.max_n)", param="n"
        )
    if serve.max_tokens is not None and (max_tokens or 0) > serve.max_tokens:
        raise RefusalError(
            400,
            "max_tokens_too_large",
            f"max_tokens: found: {max_tokens}; expected: at most {serve.max_tokens} (serve.max_tokens)",
            param="max_tokens",
        )
