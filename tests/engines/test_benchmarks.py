"""raytrl's way through lm-eval against lm-eval alone, vLLM against transformers, and pairs against TRL's own evaluation."""

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from raytrl.config.sections.benchmark import BenchmarkSection
from raytrl.config.sections.reward import SourceSection
from raytrl.errors import RunError
from raytrl.roles.benchmark.compared import SWAPS, compared
from raytrl.roles.benchmark.harness import Harness, load_harness
from raytrl.roles.benchmark.measure import measure, rows_of, samples_of
from raytrl.roles.benchmark.sliced import SlicedLM
from raytrl.roles.benchmark.tasks import Tasks, load_tasks
from raytrl.roles.paired import SIGN_TEST
from raytrl.roles.reward.model import ModelSource
from raytrl.roles.reward.pairs import PairScorer, summarize_pairs
from tests.benchmark_files import TASKS, make_tasks
from tests.ppo_files import make_policy
from tests.runs import sentence

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def _no_facts_about_the_machine() -> Iterator[None]:
    """Which `simple_evaluate` collects for seconds, after all numbers are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    make_policy(folder, head_size=32)
    (folder / "second").mkdir()
    make_policy(folder / "second", head_size=32, spread=0.4)
    make_tasks(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "chat")
    return folder


def section(folder: Path, **more: Any) -> BenchmarkSection:
    values = {"tasks": list(TASKS), "include": str(folder / "tasks"), "engine": "transformers", "batch_size": 4}
    return BenchmarkSection(**values | more)


class Actors:
    """Harnesses that take turns: slice n goes to the n-th of them, each in a thread of its own."""

    def __init__(
        self, folder: Path, settings: BenchmarkSection, count: int, tokenizer: str = "policy", model: str = "policy"
    ) -> None:
        load = functools.partial(load_harness, dtype=torch.float32, trust_remote_code=False)
        self.harnesses: list[Harness] = [
            load(str(folder / model), str(folder / tokenizer), settings) for _ in range(count)
        ]

    def ask(self, method: str, slices: Sequence[Any]) -> list[Any]:
        threads = [ThreadPoolExecutor(1) for _ in self.harnesses]
        flying = [
            threads[number % len(threads)].submit(self.harnesses[number % len(threads)].answer, method, number, part)
            for number, part in enumerate(slices)
        ]
        return [future.result() for future in flying]


def measured(
    folder: Path, settings: BenchmarkSection, count: int, chat: bool = False, model: str = "policy"
) -> tuple[Tasks, dict[str, Any]]:
    tasks, place = load_tasks(settings), "chat" if chat else "policy"
    tokenizer = AutoTokenizer.from_pretrained(folder / place)
    lm = SlicedLM(Actors(folder, settings, count, place, model).ask, tokenizer, settings.slice_requests)
    return tasks, measure(tasks.loaded, lm, settings, chat=chat, seed=0)


def alone(folder: Path, settings: BenchmarkSection, chat: bool = False) -> dict[str, Any]:
    """lm-eval, as its users call it."""
    lm = HFLM(
        pretrained=str(folder / "policy"),
        tokenizer=str(folder / ("chat" if chat else "policy")),
        device="cpu",
        dtype="float32",
        batch_size=settings.batch_size,
        max_length=settings.max_length,
    )
    found: dict[str, Any] = simple_evaluate(
        model=lm,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=settings.include, include_defaults=False),
        num_fewshot=settings.fewshot,
        limit=settings.limit,
        apply_chat_template=chat,
        bootstrap_iters=1000,
    )
    return found


def numbers(found: dict[str, Any]) -> dict[tuple[str, str, str], Any]:
    return {
        (row["task"], row["metric"], row["filter"]): (row["value"], row["stderr"], row["n"])
        for row in rows_of(found, "m", None)
    }


def near(value: Any) -> Any:
    """Sums over batches that are cut otherwise differ in the last digits of float32."""
    return None if value is None else pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("more", "chat"),
    [
        ({}, False),
        ({"fewshot": 2, "limit": 10}, False),
        ({"fewshot": 1, "limit": 10}, True),
        ({"limit": 10, "max_length": 24}, False),
    ],
    ids=["all", "fewshot", "chat", "cut"],
)
def test_the_numbers_are_lm_evals(folder: Path, more: dict[str, Any], chat: bool) -> None:
    settings = section(folder, **more)
    _, one = measured(folder, settings, 1, chat)
    _, two = measured(folder, settings, 2, chat)
    expected = alone(folder, settings, chat)
    assert numbers(one) == numbers(two)  # bit by bit, whoever answers
    assert samples_of(one, "m") == samples_of(two, "m")
    assert numbers(one) == {key: tuple(map(near, values)) for key, values in numbers(expected).items()}
    assert len(numbers(one)) == 4
    for task, samples in expected["samples"].items():
        for ours, theirs in zip(one["samples"][task], samples, strict=True):
            assert (ours["doc_id"], ours["doc_hash"]) == (theirs["doc_id"], theirs["doc_hash"])
            assert ours["arguments"] == theirs["arguments"]
            if task == "choose":
                assert [answer[0] for answer in ours["filtered_resps"]] == [
                    near(answer[0]) for answer in theirs["filtered_resps"]
                ]
            if task == "write":
                assert ours["filtered_resps"] == theirs["filtered_resps"]


def test_what_lost_its_beginning_is_counted(folder: Path) -> None:
    """Against the tokens of each request, counted here."""
    settings = section(folder, tasks=["choose"], max_length=24)
    tasks, tokenizer = load_tasks(settings), AutoTokenizer.from_pretrained(folder / "policy")
    lm = SlicedLM(Actors(folder, settings, 1).ask, tokenizer, settings.slice_requests)
    measure(tasks.loaded, lm, settings, chat=False, seed=0)
    lengths = [
        len(tokenizer("".join(request.args))["input_ids"]) for request in tasks.loaded["tasks"]["choose"].instances
    ]
    assert lm.cut == sum(length > 25 for length in lengths)
    assert 0 < lm.cut < len(lengths)


@pytest.mark.parametrize(
    ("name", "max_length", "message"),
    [
        ("choose", 2, "an answer alone has .* tokens; expected: at most 2"),
        ("write", 6, "6 tokens are to be written; expected: fewer than 6"),
    ],
)
def test_what_a_model_has_no_room_for_is_told(folder: Path, name: str, max_length: int, message: str) -> None:
    with pytest.raises(RunError, match=f"benchmark: {message}"):
        measured(folder, section(folder, tasks=[name], max_length=max_length), 1)


def test_two_models_are_paired_by_document(folder: Path) -> None:
    settings = section(folder)
    tasks, first = measured(folder, settings, 1)
    _, second = measured(folder, settings, 1, model="second/policy")
    rows = {(row["task"], row["metric"]): row for row in compared(tasks.loaded, first, second)}
    own, others = numbers(first), numbers(second)
    for (task, metric), row in rows.items():
        expected = own[task, metric, "none"][0] - others[task, metric, "none"][0]
        assert row["difference"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert 0 < row["p"] <= 1
    acc = rows["choose", "acc"]
    right = [(a["acc"], b["acc"]) for a, b in zip(first["samples"]["choose"], second["samples"]["choose"], strict=True)]
    assert (acc["better"], acc["worse"]) == (right.count((1.0, 0.0)), right.count((0.0, 1.0)))
    assert acc["better"] + acc["worse"] > 0
    assert (acc["test"], rows["surprise", "word_perplexity"]["test"]) == (SIGN_TEST, SWAPS)
    surprise = rows["surprise", "word_perplexity"]
    assert surprise["stderr"] > 0 and surprise["better"] is None
    second["samples"]["choose"][3]["doc_hash"] = "another"
    with pytest.raises(
        Exception, match="choose: the two models were not asked about the same documents; found: document 3"
    ):
        compared(tasks.loaded, first, second)


def test_vllm_says_the_same(folder: Path) -> None:
    _, plain = measured(folder, section(folder), 1)
    tasks, settings = load_tasks(section(folder)), section(folder, engine="vllm")
    actors, tokenizer = Actors(folder, settings, 1), AutoTokenizer.from_pretrained(folder / "policy")
    lm = SlicedLM(actors.ask, tokenizer, settings.slice_requests)
    vllm = measure(tasks.loaded, lm, settings, chat=False, seed=0)
    assert numbers(vllm)["choose", "acc", "none"] == numbers(plain)["choose", "acc", "none"]
    assert numbers(vllm)["choose", "acc_norm", "none"] == numbers(plain)["choose", "acc_norm", "none"]
    assert numbers(vllm)["surprise", "word_perplexity", "none"][0] == pytest.approx(
        numbers(plain)["surprise", "word_perplexity", "none"][0], rel=1e-4
    )
    for ours, theirs in zip(vllm["samples"]["write"], plain["samples"]["write"], strict=True):
        assert _plain_text(ours["filtered_resps"][0]) == _plain_text(theirs["filtered_resps"][0])
    said_nothing = [("the film", {"until": ["\n"], "max_gen_toks": 12})]  # greedy, says lm-eval; vLLM would draw
    (plain_harness,) = Actors(folder, section(folder), 1).harnesses
    asked = [(each, number) for each in (*actors.harnesses, plain_harness) for number in (0, 1)]
    greedy = [each.answer("generate_until", number, said_nothing).answers[0] for each, number in asked]
    assert len({_plain_text(text) for text in greedy}) == 1
    _take_what_there_is_room_for(plain_harness, actors.harnesses[0], tokenizer)
    _draw_by_place(actors.harnesses[0])


def _plain_text(text: str) -> str:
    """vLLM withholds a last character of which it has some bytes only, and lm-eval has it write special tokens."""
    return text.replace("<|pad|>", "").rstrip("\ufffd")


def _take_what_there_is_room_for(plain: Harness, vllm: Harness, tokenizer: Any) -> None:
    """The longest answer whose every token vLLM has a log-probability of, and one that is longer by a token."""
    ids = [5 + i % 9 for i in range(126)]
    word, texts = tokenizer.decode([5]), [tokenizer.decode(ids), tokenizer.decode([*ids, 7])]
    assert [len(tokenizer(text)["input_ids"]) for text in texts] == [126, 127]
    (found,), (expected,) = (each.answer("loglikelihood", 0, [("", texts[0])]).answers for each in (vllm, plain))
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    with pytest.raises(RunError, match="an answer alone has 127 tokens; expected: at most 126"):
        vllm.answer("loglikelihood", 0, [(word, texts[1])])


def _draw_by_place(harness: Harness) -> None:
    """Whatever was asked before."""
    asked = [("the film", {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 12})] * 3
    first, other, again = (harness.answer("generate_until", number, asked).answers for number in (3, 4, 3))
    assert first == again != other
    assert len(set(first)) > 1


# --- Pairs --------------------------------------------------------------------------------------------------------


def pairs(count: int = 32) -> list[dict[str, Any]]:
    import random

    rng = random.Random(3)
    return [
        {"prompt": sentence(rng), "chosen": f" {sentence(rng)}", "rejected": f" {sentence(rng)}"} for _ in range(count)
    ]


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
    }


@pytest.fixture(scope="module")
def judge(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder / "chat")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        num_labels=1,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    return str(folder / "judge")


def scores_of(judge: str, rows: list[dict[str, Any]]) -> list[Any]:
    source = ModelSource(SourceSection(name="judge", model=judge), "cpu")
    return PairScorer(source, 8).answer("score", 0, rows)


@pytest.mark.parametrize("form", ["text", "chat", "without a prompt"])
def test_accuracy_and_margin_are_trls(folder: Path, judge: str, form: str) -> None:
    rows = [as_chat(row) for row in pairs()] if form == "chat" else pairs()
    if form == "without a prompt":
        rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    arguments = RewardConfig(
        output_dir=str(folder / "trl"),
        per_device_eval_batch_size=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(judge)
    model = LlamaForSequenceClassification.from_pretrained(judge, num_labels=1)
    data = Dataset.from_list(rows)
    trainer = RewardTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    theirs = trainer.evaluate(data)
    (ours,) = summarize_pairs(scores_of(judge, rows), None)
    assert ours["accuracy"] == theirs["eval_accuracy"]
    assert ours["margin"] == pytest.approx(theirs["eval_margin"], abs=1e-5)
    assert (ours["n"], ours["ties"]) == (32, 0)
    assert 0 < ours["wrong"] < 32


def test_a_tie_is_wrong_for_trl_and_half_here(judge: str) -> None:
    """TRL's accuracy is the share of chosen scores that are above the rejected ones."""
    rows = [*pairs(7), {"prompt": "a", "chosen": " the film", "rejected": " the film"}]
    scores = scores_of(judge, rows)
    (ours,) = summarize_pairs(scores, None)
    above = [chosen > rejected for chosen, rejected in scores]
    assert ours["ties"] == 1
    assert ours["accuracy"] == pytest.approx(sum(above) / 8 + 0.5 / 8)


def test_what_is_too_long_is_apart(judge: str) -> None:
    rows = [*pairs(4), {"prompt": "a " * 200, "chosen": "b", "rejected": "c"}]
    scores = scores_of(judge, rows)
    (ours,) = summarize_pairs(scores, None)
    assert (ours["n"], ours["too_long"], ours["unscored"]) == (4, 1, 0)
    assert not any(isinstance(side, float) and math.isnan(side) for pair in scores for side in pair)
