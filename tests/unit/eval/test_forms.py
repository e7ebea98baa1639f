"""The three forms of an eval file: which is meant, and what is refused."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raytrl.config.kinds import forms_of
from raytrl.config.load import load_run
from raytrl.config.runs.benchmark import BenchmarkRun
from raytrl.config.runs.evaluation import EvalRun
from raytrl.config.runs.pairs import PairsRun
from raytrl.config.schema import json_schema
from raytrl.errors import ConfigError
from raytrl.report.config import described_values

MODEL = {"kind": "eval", "name": "e", "model": {"path": "some/model"}}
REWARD = {"data": {"eval": "p.jsonl"}, "reward": {"sources": [{"name": "rule", "function": "rule.py:rule"}]}}
BENCHMARK = {"benchmark": {"tasks": ["arc_easy", "tasks/own.yaml"]}}
PAIRS = {"pairs": {"data": "pairs.jsonl"}}


def load(folder: Path, *overrides: str, **sections: Any) -> Any:
    path = folder / "e.yaml"
    path.write_text(yaml.safe_dump(MODEL | sections))
    return load_run(str(path), list(overrides), "eval")


@pytest.mark.parametrize(
    ("sections", "form"),
    [(REWARD, EvalRun), (BENCHMARK, BenchmarkRun), (PAIRS, PairsRun), (PAIRS | {"reward": None}, PairsRun)],
)
def test_the_section_decides(tmp_path: Path, sections: dict[str, Any], form: type) -> None:
    assert type(load(tmp_path, **sections).run) is form


@pytest.mark.parametrize("sections", [REWARD, BENCHMARK, PAIRS])
@pytest.mark.parametrize("compare", ["compare=other", "compare={path: other}", "compare.path=other"])
def test_a_second_model_in_either_form(tmp_path: Path, sections: dict[str, Any], compare: str) -> None:
    run = load(tmp_path, compare, **sections).run
    assert run.compare == "other"
    assert list(run.evaluated) == ["model", "compare"]
    with pytest.raises(ConfigError, match=r"compare: found: \{'pth': 'a'\}; expected: a Hugging Face id or folder"):
        load(tmp_path, "compare={pth: a}", **sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "found: none of reward, benchmark, pairs; expected: exactly one"),
        (REWARD | PAIRS, "found: reward and pairs of reward, benchmark, pairs"),
        (BENCHMARK | {"data": {"eval": "p.jsonl"}}, "data: unknown key"),
        (BENCHMARK | {"rollout": {"actors": 2}}, "rollout: unknown key"),
        (PAIRS | {"rows": 3}, "rows: unknown key"),
        ({"benchmark": {"tasks": []}}, "benchmark.tasks: value should have at least 1 item"),
        ({"benchmark": {"tasks": ["a", "a"]}}, r"benchmark.tasks: found: \['a'\], more than once"),
        ({"benchmark": {"tasks": "a", "limit": 0}}, "benchmark.limit: input should be greater than 0"),
        ({"benchmark": {"tasks": "a", "chat": "yes"}}, "benchmark.chat"),
        ({"benchmark": {"tasks": "a", "batchsize": 2}}, "batchsize: unknown key; nearest known key: batch_size"),
        (
            {"benchmark": {"tasks": "a", "engine": "transformers", "resources": {"GPU": 2}}},
            "benchmark.resources.GPU: a transf",
        ),
        (BENCHMARK | {"model": {"path": "a", "revision": "main"}}, "model.revision: does nothing for eval"),
        (PAIRS | {"model": {"path": "a", "tokenizer": "b"}}, "model.tokenizer: does nothing for a reward model"),
        (
            {"pairs": {"data": "p.jsonl", "resources": {"GPU": 2}}},
            "pairs.resources.GPU: a reward model computes on one GPU",
        ),
    ],
)
def test_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **sections)


def test_auto_becomes_a_name_that_nobody_wrote(tmp_path: Path) -> None:
    loaded = load(tmp_path, **BENCHMARK)
    values = {key: (value, origin) for key, value, origin in loaded.values()}
    assert values["benchmark.engine"][0] in ("vllm", "transformers")
    assert values["benchmark.engine"][1] == "default"


@pytest.mark.parametrize("sections", [REWARD, BENCHMARK, PAIRS])
def test_schema_and_descriptions_know_every_form(tmp_path: Path, sections: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(json_schema("eval"))
    for compare in ("other", {"path": "other"}, None):
        validator.validate(MODEL | sections | {"compare": compare})
    assert not validator.is_valid(MODEL | sections | {"nonsense": 1})
    loaded = load(tmp_path, **sections)
    undescribed = [line for line in described_values(loaded, True) if str(line).endswith("  ")]
    assert undescribed == []
    assert type(loaded.run) in forms_of("eval")
