"""lm-eval's view of a model that other processes hold: what it asks goes out in slices, and comes back in its order."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from lm_eval.api.model import LM

from raytrl.errors import NonFiniteError, RunError

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Answered:
    """What a model makes of one slice."""

    answers: list[Any]  # one a request: (log-probability, whether greedy), log-probability, or text
    cut: int  # requests that were too long and lost their beginning


Ask = Callable[[str, Sequence[Sequence[Arguments]]], Sequence[Answered]]  # (method, slices) → one `Answered` a slice


class SlicedLM(LM):  # type: ignore[misc]
    """Requests of one document stay together, since its choices share their context."""

    def __init__(self, ask: Ask, tokenizer: Any, slice_requests: int) -> None:
        """
        Args:
            ask: answers every slice, in order.
            tokenizer: the model's, for chat templates.
            slice_requests: that a slice has at least, but for the last.
        """
        super().__init__()
        self._ask, self._tokenizer, self._slice_requests = ask, tokenizer, slice_requests
        self.cut = 0  # requests that lost their beginning, so far

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return self._answers("loglikelihood", requests, lambda answer: float(answer[0]))

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return self._answers("loglikelihood_rolling", requests, float)

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self._answers("generate_until", requests, None)

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self._tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As lm-eval's own models: a template that refuses a system message is given the others."""
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return str(self._tokenizer.apply_chat_template(chat_history, tokenize=False, **options))
        except jinja2.TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            return str(self._tokenizer.apply_chat_template(others, tokenize=False, **options))

    def _answers(self, method: str, requests: list[Any], logprob: Callable[[Any], float] | None) -> list[Any]:
        for request in requests if method == "loglikelihood" else ():
            if not request.args[1]:
                raise RunError(
                    f"benchmark: {request.task_name}: document {request.doc_id}: an answer is empty, of which there is no "
                    f"log-probability; look at doc_to_choice or doc_to_target"
                )
        slices = list(sliced(requests, self._slice_requests))
        found = self._ask(method, [[request.args for request in part] for part in slices])
        self.cut += sum(each.cut for each in found)
        answers = [answer for each in found for answer in each.answers]
        assert len(answers) == len(requests)
        for request, answer in zip(requests, answers, strict=True):
            if logprob is not None and math.isnan(logprob(answer)):
                raise NonFiniteError(
                    f"benchmark: {request.task_name}: document {request.doc_id}: the model gave no log-probability; found: "
                    f"nan; expected: a number; look at its weights and at model.dtype"
                )
        return answers


def sliced(requests: Sequence[Any], least: int) -> Iterator[list[Any]]:
    """Consecutive requests in lists of at least so many, but for the last; none ends within a document."""
    part: list[Any] = []
    for request in requests:
        if len(part) >= least and _document(part[-1]) != _document(request):
            yield part
            part = []
        part.append(request)
    if part:
        yield part


def _document(request: Any) -> tuple[Any, Any]:
    return request.task_name, request.doc_id
