"""The quickstart as a user types it, with fewer steps; and an evaluation by itself, with what it refuses."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.runs import metrics, raytrl
from tests.served import served

SMALL = [
    "sft.training.max_steps=4",
    "reward.training.max_steps=4",
    "ppo.ppo.steps=2",
    "ppo.ppo.batch_size=16",
    "ppo.ppo.epochs=1",
    "eval.rows=12",
    "eval.rollout.chunk_prompts=4",
    "ppo.rollout.engine=transformers",  # as where vLLM is not installed; test_ppo_vllm.py has the other
    "eval.rollout.engine=transformers",
]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quick") / "q"
    return folder, raytrl("quickstart", "--output-dir", str(folder), *SMALL, cwd=REPOSITORY)


def results_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text()))


def test_every_stage_is_a_run_of_its_own(small: tuple[Path, str]) -> None:
    folder, output = small
    assert "Traceback" not in output
    for stage in ("sft", "reward", "ppo", "eval"):
        manifest = json.loads((folder / stage / "manifest.json").read_text())
        assert manifest["state"] == "done"
        assert f"raytrl {stage} {folder}/{stage}.yaml" in output
        assert (folder / stage / "report.html").is_file()
    assert [row["step"] for row in metrics(folder / "ppo")] == [1, 2]
    policy = AutoModelForCausalLM.from_pretrained(folder / "ppo/model")
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "reward/model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "reward/model")
    assert policy.config.vocab_size != judge.config.vocab_size
    assert judge.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_it_ends_with_commands_that_serve_what_it_made(small: tuple[Path, str]) -> None:
    folder, output = small
    (serve,) = re.findall(r"^serve it +raytrl serve (.*)$", output, re.MULTILINE)
    (curl,) = re.findall(r"^and ask it +(curl .*)$", output, re.MULTILINE)
    assert serve == f"{folder}/ppo"
    with served(folder, *shlex.split(serve), "serve.engine=transformers") as server:
        assert "http://127.0.0.1:8000/v1/completions" in curl
        words = shlex.split(curl.replace("http://127.0.0.1:8000", server.base))
        answer = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert isinstance(answer["choices"][0]["text"], str)
    assert 0 < answer["usage"]["completion_tokens"] <= 24


def test_the_tables_hold_what_was_measured(small: tuple[Path, str]) -> None:
    folder, output = small
    results, scores = results_of(folder / "eval"), [row["objective/scores_raw"] for row in metrics(folder / "ppo")]
    line = next(line for line in output.splitlines() if "learned reward, as it trains" in line)
    assert f"{scores[0]:z.2f}" in line
    assert f"{scores[-1]:z.2f}" in line
    for name in ("learned", "gold"):
        line = next(line for line in output.splitlines() if f"{name} reward, unseen prompts" in line)
        for model in ("compare", "model"):
            assert f"{results[model]['by_source'][name]['mean']:z.2f}" in line
    assert f"{results['comparison']['win_rate']:.0%}" in output
    assert str(folder / "ppo/model") in output


def test_the_evaluation_holds_every_response(small: tuple[Path, str]) -> None:
    folder, _ = small
    results = results_of(folder / "eval")
    rows = [json.loads(line) for line in (folder / "eval/samples.jsonl").read_text().splitlines()]
    assert [(row["model"], row["row"]) for row in rows] == [(key, i) for key in ("model", "compare") for i in range(12)]
    for key in ("model", "compare"):
        own = [row for row in rows if row["model"] == key]
        assert results[key]["score"]["mean"] == pytest.approx(sum(row["score"] for row in own) / 12)
        assert results[key]["kl_mean"] == pytest.approx(sum(row["kl"] for row in own) / 12)
        assert results[key]["end_token_share"] == sum(row["ended"] for row in own) / 12
        assert all(row["score"] == pytest.approx(sum(row["scores"].values())) for row in own)
    # The reference is the very model that `compare` sampled from: a KL of nothing but rounding.
    assert all(abs(row["kl"]) < 1e-3 for row in rows if row["model"] == "compare")
    assert results["comparison"]["compared"] == 12


def test_again_does_nothing_again(small: tuple[Path, str]) -> None:
    folder, first = small
    again = raytrl("quickstart", "--output-dir", str(folder), *SMALL, cwd=REPOSITORY)
    assert again.count("done before") == 4
    assert "step 1/" not in again
    samples = [text[text.rindex("┃ prompt") : text.rindex("stage ")] for text in (first, again)]
    assert samples[0] == samples[1]
    assert "finished already" in raytrl("eval", *eval_words(folder), cwd=REPOSITORY)


def eval_words(folder: Path) -> list[str]:
    """The quickstart's evaluation as a command of its own."""
    manifest = json.loads((folder / "eval/manifest.json").read_text())
    assert manifest["kind"] == "eval"
    return [str(folder / "eval/config.yaml")]


@pytest.mark.slow
def test_greedy_by_two_actors_and_by_one(small: tuple[Path, str]) -> None:
    """How many actors there are changes no response; a run of other settings is refused, not overwritten."""
    folder, _ = small
    words = [*eval_words(folder), "greedy=true", "reference.path=null", "name=greedy", "rollout.resources={CPU: 0.25}"]
    raytrl("eval", *words, "rollout.actors=2", cwd=REPOSITORY)
    by_two = (folder / "greedy/samples.jsonl").read_text()
    raytrl("eval", *words, "--fresh", cwd=REPOSITORY)
    assert (folder / "greedy/samples.jsonl").read_text() == by_two
    assert results_of(folder / "greedy")["model"]["kl_mean"] is None
    assert "seed was 0, now 1" in raytrl("eval", *words, "seed=1", status=2, cwd=REPOSITORY)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare=no/where/model", "compare: "),
        ("data.eval.data_files=gone.jsonl", "data.eval: no such file; found: 'gone.jsonl'"),
        ("reward.sources.1.function=raytrl.film_reviews:nothing", "reward"),
        ("rollout.actors=4000", "rollout.actors: 4000 x CPU 0.5 + reward.actors: 1 x CPU 0.5 need 2000.5 CPU"),
        ("reference.path={reward}", "not a whole language model"),
    ],
)
def test_refused_before_anything_starts(small: tuple[Path, str], override: str, message: str) -> None:
    folder, _ = small
    words = [*eval_words(folder), "name=refused", override.format(reward=folder / "reward/model")]
    assert message in raytrl("eval", *words, status=2, cwd=REPOSITORY)
    assert not (folder / "refused/manifest.json").exists()
