"""Reward functions: TRL's convention, and what each way of failing costs."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrl.config.sections.reward import SourceSection
from raytrl.errors import ConfigError
from raytrl.roles.reward.call import Failure, Outcome, ask
from raytrl.roles.reward.function import FunctionSource

FUNCTIONS = """
import asyncio, os, signal, time
import numpy
from neighbour import SCALE

calls = 0

def echo(prompts, completions, completion_ids, gold, trainer_state, log_extra, log_metric, **kwargs):
    assert sorted(kwargs) == ["topic"], kwargs
    assert completion_ids == [[5, 6, 7]] * len(prompts)
    assert trainer_state.global_step == 7
    log_extra("gold", gold)
    log_metric("mean", 1.0)
    print("a print goes to the log")
    return [len(p) + SCALE * len(c) + g for p, c, g in zip(prompts, completions, gold)]

def only_completions(completions):
    return [len(text) for text in completions]

async def later(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [0.5 if text else None for text in completions]

def chat(prompts, completions, **kwargs):
    assert completions == [[{"role": "assistant", "content": "yes"}]]
    return [float(len(prompts[0]))]

def scalars(completions, **kwargs):
    return numpy.array([1.5, 2.5], dtype=numpy.float32)

def hang(completions, **kwargs):
    while True:
        time.sleep(0.01)

def hangs_on_x(completions, **kwargs):
    while completions == ["x"]:
        pass
    return [1.0]

def raises(completions, **kwargs):
    raise KeyError("no such key")

def dies(completions, **kwargs):
    os._exit(3)

def alarmed(completions, **kwargs):
    signal.signal(signal.SIGALRM, lambda *_: None)
    return [1.0 for _ in completions]

def second_time(completions, **kwargs):
    global calls
    calls += 1
    return [1.0 if calls == 2 else float("nan") for _ in completions]

def pid(completions, **kwargs):
    return [os.getpid() for _ in completions]

def returns(completions, answer, **kwargs):
    return eval(answer[0])

not_callable = 3
"""


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., FunctionSource]]:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "neighbour.py").write_text("SCALE = 10\n")
    loaded: list[FunctionSource] = []

    def make(name: str, **more: Any) -> FunctionSource:
        section = SourceSection(name="mine", function=f"{tmp_path / 'mine.py'}:{name}", **{"retries": 0, **more})
        loaded.append(FunctionSource(section))
        return loaded[-1]

    yield make
    for source in loaded:
        source.close()


def test_it_is_called_as_trl_calls_it(load: Any, pair: Any) -> None:
    pairs = [pair("ab", "c", gold=1, topic="x", prompt="old"), pair("abc", "de", row=1, gold=2, topic="y")]
    assert ask(load("echo"), pairs) == [13.0, 25.0]


def test_a_function_without_kwargs_gets_what_it_names(load: Any, pair: Any) -> None:
    assert ask(load("only_completions"), [pair("p", "four", extra=1)]) == [4.0]


def test_async_and_none_for_not_applicable(load: Any, pair: Any) -> None:
    source = load("later")
    assert ask(source, [pair("p", "x"), pair("p", "")]) == [0.5, None]
    assert ask(source, [pair("p", "x")]) == [0.5]  # the loop serves a second call


def test_chat_completions_are_messages(load: Any, pair: Any) -> None:
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert ask(load("chat"), [pair(prompt, "yes")]) == [2.0]


def test_numpy_scalars_are_numbers(load: Any, pair: Any) -> None:
    assert ask(load("scalars"), [pair("p", "x"), pair("p", "y")]) == [1.5, 2.5]


def test_a_hang_costs_its_limit_and_is_killed(load: Any, pair: Any) -> None:
    source = load("hang", timeout_s=0.3, retries=1)
    process = source._process
    (outcome,) = ask(source, [pair("p", "x")])
    assert outcome == Failure("gave no answer within 0.3 s and was stopped")
    assert process.poll() is not None  # nothing is left running


def test_an_answer_that_nobody_reads_is_no_error(load: Any, pair: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The actor that asked has ended."""
    source = load("only_completions")
    process, connection = source._process, source._connection
    connection.send({"prompts": ["p"], "completions": ["four"]})
    assert connection.poll(60)
    connection.close()
    assert process.wait(60) == 0
    assert capfd.readouterr().err == ""


def test_after_a_hang_the_next_call_works(load: Any, pair: Any) -> None:
    source = load("hangs_on_x", timeout_s=1.0)
    assert isinstance(ask(source, [pair("p", "x")])[0], Failure)
    assert ask(source, [pair("p", "y")]) == [1.0]


def test_it_runs_in_a_main_thread_where_signals_work(load: Any, pair: Any) -> None:
    assert ask(load("alarmed"), [pair("p", "x")]) == [1.0]


def test_it_stays_up_between_calls_and_close_ends_it(load: Any, pair: Any) -> None:
    source = load("pid")
    (first,), (second,) = ask(source, [pair("p", "x")]), ask(source, [pair("p", "x")])
    assert isinstance(first, float)
    assert first == second != os.getpid()
    source.close()
    source.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)


def test_a_raise_names_the_error_and_its_line(load: Any, pair: Any) -> None:
    (outcome,) = ask(load("raises"), [pair("p", "x")])
    assert isinstance(outcome, Failure)
    assert "KeyError: 'no such key'" in outcome.reason
    assert "mine.py:" in outcome.reason


def test_a_crash_is_a_failure_and_the_next_call_gets_a_new_process(load: Any, pair: Any) -> None:
    source = load("dies")
    for _ in range(2):
        (outcome,) = ask(source, [pair("p", "x")])
        assert isinstance(outcome, Failure)
        assert "ended its process, with exit status 3" in outcome.reason


def test_a_second_try_can_succeed(load: Any, pair: Any) -> None:
    assert ask(load("second_time", retries=1), [pair("p", "x")]) == [1.0]
    (outcome,) = ask(load("second_time"), [pair("p", "x")])
    assert outcome == Failure("returned nan, not a finite number")


NONSENSE: list[tuple[str, Any]] = [
    ("[1.0]", "returned 1 scores for 2 responses"),
    ("[1.0, float('nan')]", [1.0, "returned nan, not a finite number"]),
    ("[float('-inf'), 1]", ["returned -inf, not a finite number", 1.0]),
    ("['good', 1.0]", ["returned 'good' (a str), not a number", 1.0]),
    ("[True, 1.0]", ["returned True (a bool), not a number", 1.0]),
    ("[numpy.bool_(True), 1.0]", ["returned True (a bool), not a number", 1.0]),
    ("[[1.0], 1.0]", ["returned '[1.0]' (a str), not a number", 1.0]),
    ("[10**400, 1.0]", ["returned an integer too large for a float", 1.0]),
    ("1.0", "returned 1.0 (a float), not a list"),
    ("'ab'", "returned 'ab' (a str), not a list"),
    ("None", "returned None (a NoneType), not a list"),
]


def test_nonsense_is_a_failure_that_shows_it(load: Any, pair: Any) -> None:
    source = load("returns")
    for answer, expected in NONSENSE:
        outcomes = ask(source, [pair("p", "x", answer=answer), pair("p", "y", answer=answer)])
        wanted = [expected, expected] if isinstance(expected, str) else expected
        for outcome, want in zip(outcomes, wanted, strict=True):
            if isinstance(want, str):
                assert isinstance(outcome, Failure), answer
                assert outcome.reason.startswith(want)
            else:
                assert outcome == want


def test_batches_keep_the_order(load: Any, pair: Any) -> None:
    pairs = [pair("p", "x" * length, row=length) for length in range(5)]
    outcomes: list[Outcome] = ask(load("only_completions", batch_size=2), pairs)
    assert outcomes == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nowhere.py:f", "no such file"),
        ("no_such_package.rewards:f", "No module named 'no_such_package'"),
        ("raytrl.film_reviews:no_such", "no function 'no_such' in raytrl.film_reviews"),
        ("raytrl.film_reviews:POSITIVE", "no function 'POSITIVE' in raytrl.film_reviews"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_a_config_error(function: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"reward\.sources\.mine\.function") as error:
        FunctionSource(SourceSection(name="mine", function=function))
    assert words in str(error.value)


def test_a_function_of_an_installed_module(pair: Any) -> None:
    source = FunctionSource(SourceSection(name="gold", function="raytrl.film_reviews:sentiment_reward"))
    assert ask(source, [pair("p", " moving and clumsy and tender.")]) == [1.0]
    source.close()


def test_files_named_like_modules_stand_in_for_nothing(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("signal", "types", "asyncio", "datasets", "functions", "function_process"):
        Path(f"{name}.py").write_text("raise RuntimeError('imported instead of the library')\n")
    Path("helper.py").write_text("VALUE = 2.0\n")
    Path("random.py").write_text(
        "import helper\n\ndef two(completions):\n    return [helper.VALUE] * len(completions)\n"
    )
    for function in ("random.py:two", str(tmp_path / "random.py") + ":two"):
        source = FunctionSource(SourceSection(name="two", function=function))
        assert ask(source, [pair("p", "x")]) == [2.0]
        source.close()


@pytest.mark.parametrize("words", [["-m", "raytrl", "--help"], ["-c", "import raytrl, datasets"]])
def test_the_working_directory_is_looked_in_last(words: list[str], tmp_path: Path) -> None:
    for name in ("typer", "datasets", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported instead of the library')\n")
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = {**os.environ, "PYTHONPATH": str(tmp_path)}  # somebody wants it so
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=asked, capture_output=True, text=True)
    assert "imported instead of the library" in done.stderr
