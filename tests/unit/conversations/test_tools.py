"""Tools and environments in processes of their own: what each failure costs, what they see, what they remember."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrl.config.sections.rollout import RolloutSection
from raytrl.errors import ConfigError
from raytrl.records.tools import Call, ConversationError, Result, ScoreRequest, Start, longest_text
from raytrl.roles.environment.tools import Room, Tools, environment_of_tools
from tests import user_tools

FILE = str(Path(user_tools.__file__))
LIMIT_S = 1.5


def section(**changes: Any) -> RolloutSection:
    base = {"tools": [f"{FILE}:{name}" for name in ("multiply", "wait", "fail")], "environment": f"{FILE}:Counter"}
    return RolloutSection(**{**base, "tool_timeout_s": LIMIT_S, **changes})


@pytest.fixture(scope="module")
def tools() -> Iterator[Tools]:
    found = Tools(section(), {"near": f"{FILE}:near", "length": f"{FILE}:length"})
    yield found
    found.close()


def begin(tools: Tools, row_seed: int = 1, seed: int = 2, name: str | None = None, **row: Any) -> tuple[Room, Any]:
    return tools.start(Start(name, row, row_seed, seed)).result()


def one(room: Room, name: str, **arguments: Any) -> Result:
    (result,) = room.call([Call(name, arguments)]).result()
    return result


def test_schemas_are_those_that_transformers_makes(tools: Tools) -> None:
    (kind,) = tools.toolbox.kinds.values()
    assert [tool["function"]["name"] for tool in kind.tools] == ["multiply", "wait", "fail", "increment", "misbehave"]
    assert kind.tools[0]["function"]["parameters"]["properties"]["a"] == {
        "type": "integer",
        "description": "The first integer.",
    }
    assert kind.environment == "Counter" and tools.toolbox.rewards == ("Counter",)
    assert tools.toolbox.functions == ("near",), "the other asks for no environments"


def test_results_come_in_the_order_of_the_calls(tools: Tools) -> None:
    room, said = begin(tools)
    assert said == " Begin at 0."
    calls = [
        Call("wait", {"seconds": 0.05}),
        Call("multiply", {"a": 6, "b": 7}),
        Call("nobody", {}),
        Call("fail", {"why": "no"}),
        Call("multiply", {"a": 6}),
        Call("wait", {"minutes": 1}),
        Call("increment", {"step": 4}),
    ]
    results = room.call(calls).result()
    room.close()
    assert results[0] == Result("waited 0.05") and results[1] == Result("42") and results[6] == Result("4")
    assert results[2] == Result("{'error': 'Tool nobody not found.'}", failed=True)
    assert results[3] == Result("{'error': 'no'}", failed=True)
    assert "missing 1 required positional argument: 'b'" in str(results[4].content) and results[4].failed
    assert "missing a required argument: 'seconds'" in str(results[5].content) and results[5].failed


def test_async_calls_of_one_message_run_side_by_side() -> None:
    own = Tools(section(tools=[f"{FILE}:meet"]))
    room, _ = begin(own)
    met = room.call([Call("meet", {"name": "a"}), Call("meet", {"name": "b"})]).result()
    own.close()
    assert [result.content for result in met] == ["a and b"] * 2, "one after the other would wait for ever"


@pytest.mark.parametrize("how", ["sleep", "loop", "c", "flood"])
def test_a_hang_costs_one_conversation(tools: Tools, how: str) -> None:
    room, _ = begin(tools)
    other, _ = begin(tools)
    hanging = room.call([Call("misbehave", {"how": how})])
    assert one(other, "increment", step=2) == Result("2"), "beside it the others go on"
    with pytest.raises(ConversationError, match=r"misbehave: gave no answer within 1.5 s .rollout.tool_timeout_s") as e:
        hanging.result()
    assert e.value.timed_out
    assert one(other, "increment", step=2) == Result("4")
    process = room._process
    other.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize(("how", "status"), [("exit", 3), ("quit", 4)])
def test_a_process_that_ends_costs_one_conversation(tools: Tools, how: str, status: int) -> None:
    room, _ = begin(tools)
    other, _ = begin(tools)
    with pytest.raises(ConversationError, match=f"misbehave: ended its process, with exit status {status}") as e:
        one(room, "misbehave", how=how)
    assert not e.value.timed_out
    assert one(other, "increment", step=1) == Result("1")
    other.close()


def test_of_a_large_answer_little_is_taken(tools: Tools) -> None:
    room, _ = begin(tools)
    assert len(one(room, "misbehave", how="large").content) == longest_text(1024)
    with pytest.raises(ConversationError, match="gave content that is not text"):
        one(room, "misbehave", how="image")
    room.close()


def test_nothing_is_remembered_and_nothing_is_shared(tools: Tools) -> None:
    def told(row_seed: int, seed: int) -> str:
        room, _ = begin(tools, row_seed, seed, word="a", prompt=[])
        found = one(room, "misbehave", how="made")
        room.close()
        return str(found.content)

    first, again, other_sample, other_row = told(1, 2), told(1, 2), told(1, 3), told(5, 2)
    assert first == again, "each begins as if it were the first, whatever ran before it"
    made, drawn, later, seed, *row = first.split(" ", 4)
    assert made == "1" and seed == "1" and row == ["['prompt', 'word']"], "reset has the row's seed and the row"
    assert other_sample.split()[:2] == [made, drawn], "all responses to a prompt begin in one state"
    assert other_sample.split()[2] != later, "and each goes on by itself"
    assert other_row.split()[1] != drawn


def test_secrets_and_gpus_are_not_theirs(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "HF_TOKEN": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "WANDB_API_KEY": "c",
        "DATABASE": "postgres://me:pw@host/db",
        "RAYTRL_SECRETS": "JUDGE=/run/judge,PLAIN",
        "JUDGE": "d",
        "SEARCH_KEY": "e",
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    seen = environment_of_tools(variables, ["SEARCH_KEY"])
    assert seen.keys() - {"PYTHONPATH"} == {
        "SEARCH_KEY",
        "HOME",
        "CUDA_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "PYTHONHASHSEED",
    }
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("HF_TOKEN", "a")
    own = Tools(section(tools=[]))
    room, _ = begin(own)
    names = str(one(room, "misbehave", how="environment").content)
    own.close()
    assert "HOME" in names and "HF_TOKEN" not in names


def test_each_has_a_folder_of_its_own(tools: Tools) -> None:
    rooms = [begin(tools)[0] for _ in range(2)]
    folders = [str(one(room, "misbehave", how="folder").content) for room in rooms]
    assert folders[0] != folders[1] and all(Path(folder).is_dir() for folder in folders)
    for room in rooms:
        room.close()
    assert not any(Path(folder).exists() for folder in folders)


def test_rewards_are_asked_where_the_environment_is(tools: Tools) -> None:
    request = ScoreRequest([], [], [], {"target": 10}, 3)
    room, _ = begin(tools)
    one(room, "increment", step=4)
    scores = room.score(request).result()
    assert scores.values == {"Counter": 4.0, "near": -6} and scores.problems == {}
    one(room, "increment", step=9)
    scores = room.score(request).result()
    assert scores.values == {"near": -3}
    assert "raised RuntimeError: unlucky" in scores.problems["Counter"]
    room.close()


def test_a_dead_nursery_is_replaced() -> None:
    own = Tools(section(tools=[]))
    room, _ = begin(own)
    assert own._nursery is not None
    own._nursery._process.kill()
    own._nursery._process.wait()
    with pytest.raises(ConversationError, match="ended its process, with the one that started it"):
        one(room, "misbehave", how="loop")
    again, _ = begin(own)
    assert one(again, "increment", step=1) == Result("1")
    own.close()


def test_several_environments_and_what_reset_raises() -> None:
    both = Tools(section(tools=[], environment={"count": f"{FILE}:Counter", "look": f"{FILE}:Silent"}))
    assert {name: kind.has_reward for name, kind in both.toolbox.kinds.items()} == {"count": True, "look": False}
    room, said = begin(both, name="look", word="a")
    assert said is None and one(room, "look") == Result("nothing")
    assert one(room, "increment", step=1).failed, "another environment's"
    with pytest.raises(ConversationError, match=r"reset: raised KeyError: 'word' \(.*user_tools.py:\d+\)"):
        begin(both, name="look", word="broken")
    both.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tools": [f"{FILE}:nothing"]}, "rollout.tools.0: no function 'nothing'"),
        ({"tools": ["nowhere.py:f"]}, "rollout.tools.0: no such file"),
        ({"tools": [f"{FILE}:multiply", f"{FILE}:multiply"]}, "two tools share a name; found: ..multiply"),
        ({"environment": f"{FILE}:NoReset"}, "NoReset has no method reset"),
        (
            {"environment": f"{FILE}:Undocumented"},
            "Undocumented: close: is no tool: .* begins with an underscore: _close",
        ),
        ({"environment": {"a": f"{FILE}:NoReset"}}, "rollout.environment.a: "),
    ],
)
def test_what_is_no_tool_is_refused_with_what_to_do(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Tools(section(**changes))
