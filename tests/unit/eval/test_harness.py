"""What a benchmark actor refuses or counts, against a model of one token a character that takes eight."""

from types import SimpleNamespace
from typing import Any

import pytest

from raytrl.errors import RunError
from raytrl.roles.benchmark.harness import Harness

END = 0


class Characters:
    """Stands for lm-eval's model: eight tokens, of a question and what it writes."""

    max_length, max_gen_toks, prefix_token_id = 8, 256, END

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def tok_encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def _encode_pair(self, context: str, answer: str) -> tuple[list[int], list[int]]:
        return self.tok_encode(context), self.tok_encode(answer)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool) -> list[Any]:
        self.asked += requests
        return [(-1.0, True) for _ in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool) -> list[str]:
        self.asked += requests
        return ["x" for _ in requests]


def harness(longest: int, **more: Any) -> Harness:
    return Harness(Characters(), lambda: None, longest, **more)


TRANSFORMERS, VLLM = 9, 7  # nothing is predicted from the last token; vLLM makes a token more


@pytest.mark.parametrize(
    ("longest", "context", "answer", "cut"),
    [
        (TRANSFORMERS, "c" * 7, "aa", 0),
        (TRANSFORMERS, "c" * 8, "aa", 1),
        (TRANSFORMERS, "c", "a" * 8, 0),
        (TRANSFORMERS, "", "a" * 8, 0),
        (TRANSFORMERS, "", "\0" + "a" * 8, 0),  # begins with what would stand before it
        (VLLM, "c" * 5, "aa", 0),
        (VLLM, "c" * 6, "aa", 1),
        (VLLM, "c", "a" * 6, 0),
    ],
)
def test_what_is_cut_is_counted(longest: int, context: str, answer: str, cut: int) -> None:
    assert harness(longest).answer("loglikelihood", 0, [(context, answer)]).cut == cut


@pytest.mark.parametrize(("longest", "context"), [(TRANSFORMERS, "c"), (TRANSFORMERS, ""), (VLLM, "c"), (VLLM, "")])
def test_an_answer_without_room_for_a_token_before_it_is_refused(longest: int, context: str) -> None:
    """lm-eval raises nothing that says so, or with vLLM sums up a part of it."""
    with pytest.raises(RunError, match=f"an answer alone has {longest} tokens; expected: at most {longest - 1}"):
        harness(longest).answer("loglikelihood", 0, [(context, "a" * longest)])


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_each_of_lm_evals_names_for_what_is_written(name: str) -> None:
    settings = {"until": ["\n"], name: 6}
    assert harness(9).answer("generate_until", 0, [("qq", settings)]).cut == 0
    assert harness(9).answer("generate_until", 0, [("qqq", settings)]).cut == 1
    with pytest.raises(RunError, match="8 tokens are to be written; expected: fewer than 8"):
        harness(9).answer("generate_until", 0, [("q", settings | {name: 8})])


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"temperature": 0.7}, 0.7),
    ],
)
def test_the_temperature_is_said(settings: dict[str, Any], temperature: float) -> None:
    """To vLLM, which takes silence for 1, lm-eval says nothing where a task does not."""
    lm = Characters()
    Harness(lm, lambda: None, 9).answer("generate_until", 0, [("q", {"max_gen_toks": 2, **settings})])
    assert [request.args[1] for request in lm.asked] == [{"max_gen_toks": 2, **settings, "temperature": temperature}]


def test_who_samples_has_a_seed_of_its_own_that_follows_from_its_place() -> None:
    def seeds(number: int, **settings: Any) -> list[Any]:
        lm = Characters()
        asked = [("q", {"max_gen_toks": 2, **settings})] * 3
        Harness(lm, lambda: None, 7, seeds_requests=True).answer("generate_until", number, asked)
        return [request.args[1].get("seed") for request in lm.asked]

    drawn = {"do_sample": True, "temperature": 0.7}
    assert seeds(4, **drawn) == seeds(4, **drawn)
    assert len({*seeds(4, **drawn), *seeds(5, **drawn)}) == 6
    assert seeds(4, **drawn, seed=7) == [7, 7, 7]
    assert seeds(4) == [None, None, None]  # greedy


def test_what_any_actor_would_fail_of_ends_the_run_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, requests: list[Any], disable_tqdm: bool) -> list[Any]:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(Characters, "loglikelihood", broken)
    message = (
        r"cannot be answered: IndexError: index out of range in self.*; one of 1 requests, which begin with 'the film'"
    )
    with pytest.raises(RunError, match=message):
        harness(100).answer("loglikelihood", 0, [("the film", " is")])


def test_what_a_device_fails_of_is_left_to_the_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, requests: list[Any], disable_tqdm: bool) -> list[Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Characters, "loglikelihood", broken)
    with pytest.raises(RuntimeError, match="CUDA error") as raised:
        harness(100).answer("loglikelihood", 0, [("the film", " is")])
    assert not isinstance(raised.value, RunError)


def test_progress_is_shown_and_lm_evals_bars_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    from raytrl.roles.benchmark.measure import _quiet

    with _quiet():
        assert list(tqdm(range(3), disable=False)) == [0, 1, 2]
        print("slices 1 of 3")
    assert capsys.readouterr() == ("slices 1 of 3\n", "")
    list(tqdm(range(3)))
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "given", "response"),
    [
        ([("q", " yes"), ("q", " no"), ("", " yes"), ("", " no")], [-3.0, -2.0, -1.0, -5.0], " no"),
        ([("He is tall; he", " ran"), ("He is tall; she", " ran")], [-3.0, -2.0], "He is tall; she ran"),
        ([("q", " yes"), ("q", " no")], [-1.0, -2.0], " yes"),
    ],
    ids=["asked behind nothing, too", "several questions", "choices"],
)
def test_the_answer_that_is_told(arguments: list[Any], given: list[float], response: str) -> None:
    from raytrl.roles.benchmark.measure import _response

    sample = {"arguments": arguments, "filtered_resps": [(each, False) for each in given]}
    assert _response(sample) == response


def test_an_empty_answer_names_its_document() -> None:
    from raytrl.roles.benchmark.sliced import SlicedLM

    asked = [SimpleNamespace(task_name="quiz", doc_id=doc, args=("q", answer)) for doc, answer in ((0, " a"), (1, ""))]
    with pytest.raises(RunError, match="benchmark: quiz: document 1: an answer is empty"):
        SlicedLM(lambda method, parts: [], None, 4).loglikelihood(asked)
