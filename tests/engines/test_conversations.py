"""Conversations of real models with real tools on both engines: the learner finds the log-probs that the engine had."""

import json
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytrl.config.runs.ppo import PpoRun
from raytrl.config.sections.ppo import PpoSection
from raytrl.loop.protocols import Rollout
from raytrl.records.samples import Prompt, Response, Score
from raytrl.roles.environment.tools import Tools
from raytrl.roles.learner.build import assemble, build_backend
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.models.adapters import policy_parameters
from raytrl.roles.models.chat import Chat
from raytrl.roles.models.tokenizer import load_tokenizer
from raytrl.roles.rollout.engine import RolloutEngine
from raytrl.roles.rollout.engines import engine_class
from raytrl.roles.rollout.episodes import Episodes
from raytrl.roles.weights.buckets import Weights
from tests.conversation_files import QUESTION, TOOLS, make_caller

VLLM_SLOW = pytest.param(("vllm", "llama3.1"), marks=pytest.mark.slow)
CASES = [
    ("transformers", "qwen2.5"),
    ("transformers", "qwen3"),
    ("transformers", "llama3.1"),
    ("vllm", "qwen2.5"),
    VLLM_SLOW,
]
ROWS, SAMPLES = 4, 4


@pytest.fixture(params=CASES, ids="-".join)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, RolloutEngine]]:
    engine_name, template = request.param
    path = make_caller(tmp_path_factory.mktemp("caller"), template)
    run = PpoRun.model_validate(
        {
            "name": "a",
            "model": {"path": path},
            "data": {"train": "a.jsonl"},
            "rollout": {
                "engine": engine_name,
                "environment": f"{TOOLS}:Counter",
                "tools": [f"{TOOLS}:multiply"],
                "max_prompt_length": 2000,
                "sampling": {"max_new_tokens": 600},
                "chunk_prompts": 4,
            },
        }
    )
    engine = engine_class(engine_name).from_pretrained(path, path, run.rollout, seed=3)
    tools = Tools(run.rollout)
    chat = Chat(load_tokenizer(path, None, False), engine.turn_end_ids, 1024)
    engine.conversations = Episodes(tools, chat, run.rollout, 3)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine.load_weights(Weights.of(0, policy_parameters(model).items(), torch.float32))
    yield path, engine
    tools.close()
    engine.close()


def test_the_learner_finds_the_log_probs_that_the_engine_had(case: tuple[str, RolloutEngine]) -> None:
    path, engine = case
    prompts = [Prompt(0, row, QUESTION, (), {"prompt": QUESTION}) for row in range(ROWS)]
    responses = engine.generate(prompts, 0, samples=SAMPLES)
    turns = [len(response.sampled) for response in responses]
    assert max(turns) >= 3, turns
    assert any(response.episode and response.episode.scores["Counter"] == 4.0 for response in responses)
    assert responses == engine.generate(prompts, 0, samples=SAMPLES), "and it repeats"
    stored = json.loads(json.dumps([asdict(response) for response in responses]))
    assert [Response.from_json(values) for values in stored] == responses, "what is ahead of a checkpoint"
    ppo = PpoSection(steps=1, batch_size=ROWS * SAMPLES, responses_per_prompt=SAMPLES, minibatches=1, kl={"coef": 0.1})
    networks = assemble(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), dtype=torch.float32)
    learner = PpoLearner(build_backend(networks, ppo), ppo, temperature=1.0, seed=0)
    scores = [Score(r.step, r.row, r.sample, float(r.row), {}) for r in responses]
    experience = learner.experience(Rollout(prompts, responses, scores))
    assert experience.metrics["rollout/logprob_gap_max"] <= 1e-4
    assert experience.metrics["rollout/logprobs_missing"] == 0
    assert experience.metrics["conversations/turns"] == pytest.approx(sum(turns) / len(turns))
    sums = engine.logprobs(prompts, responses, 0)
    expected = [sum(response.sampling_logprobs) for response in responses]
    assert sums == pytest.approx(expected, abs=2e-3), "what the reference of an evaluation is asked for"
