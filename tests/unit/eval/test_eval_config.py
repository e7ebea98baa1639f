"""The eval run file: what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrl.config.kinds import RUNS
from raytrl.config.load import load_run
from raytrl.config.runs.evaluation import EvalRun
from raytrl.config.schema import json_schema
from raytrl.errors import ConfigError


def eval_file(folder: Path, **sections: Any) -> str:
    values: dict[str, Any] = {
        "kind": "eval",
        "name": "eval",
        "model": {"path": "some/model"},
        "data": {"eval": "prompts.jsonl"},
        "reward": {"sources": [{"name": "rule", "function": "rule.py:rule"}]},
    }
    path = folder / "eval.yaml"
    path.write_text(yaml.safe_dump(values | sections))
    return str(path)


def test_defaults(tmp_path: Path) -> None:
    run = load_run(eval_file(tmp_path), ["compare=other/model", "model.tokenizer=some/tokenizer"], "eval").run
    assert isinstance(run, EvalRun)
    assert run.evaluated == {"model": ("some/model", "some/tokenizer"), "compare": ("other/model", "other/model")}
    assert (run.rows, run.greedy, run.reference.path) == (64, False, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=null", "expected: one of path"),
        ("model.revision=main", "model.revision: does nothing for eval"),
        ("model.pad_token=<p>", "model.pad_token: does nothing for eval"),
        ("rollout.samples=3", "rollout.samples: does nothing for eval"),
        ("rollout.weight_transfer=broadcast", "rollout.weight_transfer: does nothing for eval"),
        ("rollout.resources={CPU: 0}", "rollout.resources: found"),
        ("rollout.actor=2", "rollout.actor: unknown key; nearest known key: actors"),
        ("comparee=x", "comparee: unknown key; nearest known key: compare"),
        ("rows=0", "rows: input should be greater than 0; found: 0"),
        ("data={}", "data.eval: missing"),
        ("reward.sources=[]", "reward.sources"),
    ],
)
def test_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run(eval_file(tmp_path), [override], "eval")


def test_greedy_goes_with_neither_temperature_nor_kl(tmp_path: Path) -> None:
    overrides = ["greedy=true", "rollout.sampling.temperature=0.7", "reference.path=x"]
    with pytest.raises(ConfigError) as caught:
        load_run(eval_file(tmp_path), overrides, "eval")
    assert "rollout.sampling.temperature: does nothing with greedy: true; found: 0.7" in str(caught.value)
    assert "reference.path: the KL is a mean over sampled responses" in str(caught.value)


def test_every_kind_has_a_schema() -> None:
    for kind in RUNS:
        assert json_schema(kind)["properties"]["kind"]["const"] == kind
