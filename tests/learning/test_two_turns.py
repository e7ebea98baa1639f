"""A conversation of two turns that can be enumerated: a token, what the environment answers, another token.

pi*(a1, a2) is proportional to pi_ref(a1) pi_ref(a2 | a1, o) exp(r / beta), with the KL over the two sampled tokens alone.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import EOS, PROMPTS, VOCABULARY, DigitTokenizer, LocalGenerator, LocalScorer, Log, config, gpt2, make_learner

from raytrl.config.sections.rollout import RolloutSection, SamplingSection
from raytrl.loop.loop import Schedule, run
from raytrl.records.samples import Prompt, Response
from raytrl.records.tools import Call, ConversationError, Kind, Result, Scores, Start, Toolbox
from raytrl.roles.learner.sequences import Sequences
from raytrl.roles.rollout.episodes import Episodes
from raytrl.roles.rollout.transformers_engine import TransformersEngine

BETA = 0.5


def answer(prompt: Sequence[int], first: int) -> int:
    return 6 if (first + prompt[-1]) % 2 else 2


def worth(prompt: Sequence[int], first: int, second: int) -> float:
    """Nothing of the first token alone: it pays by what the environment answers, and by the second token's match."""
    said = answer(prompt, first)
    return 1.0 * (said == 6) + 0.8 * (second == (said + 1) % VOCABULARY) + 0.3 * (second == first)


class TokenChat:
    """A token is a turn; the first asks, the second does not."""

    def prompt(self, messages: Any, tools: Any, said: Any) -> list[int]:
        return [int(token) for token in messages[0]["content"].split()]

    def suffix(self, results: Sequence[Any]) -> list[int]:
        return [int(results[0]["content"])]

    def parsed(self, token_ids: Sequence[int], context: Sequence[int], tools: Any) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": str(token_ids[0])}
        if tuple(context) in PROMPTS:
            call = {"function": {"name": "answer", "arguments": {"prompt": list(context), "first": token_ids[0]}}}
            message["tool_calls"] = [call]
        return message

    def shortened(self, content: Any) -> Any:
        return content

    def num_special(self, content: Any) -> int:
        return 0


class World:
    """Tools in this process."""

    toolbox = Toolbox({None: Kind(())})

    def __init__(self, fails: Sequence[tuple[int, int]] = ()) -> None:
        self._fails, self.closed = set(fails), 0

    def start(self, start: Start) -> "Future[Any]":
        return done((self, None))

    def call(self, calls: Sequence[Call]) -> "Future[list[Result]]":
        (call,) = calls
        arguments = call.arguments
        if (len(arguments["prompt"]), arguments["first"]) in self._fails:
            broken: Future[list[Result]] = Future()
            broken.set_exception(ConversationError("hung", timed_out=True))
            return broken
        return done([Result(str(answer(arguments["prompt"], arguments["first"])))])

    def score(self, _: Any) -> "Future[Scores]":
        raise AssertionError

    def close(self) -> None:
        self.closed += 1


def done(value: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def engine(model: nn.Module, world: World | None = None, chunk: int = 512) -> TransformersEngine:
    found = TransformersEngine(
        model,
        DigitTokenizer(),
        SamplingSection(max_new_tokens=3),
        seed=0,
        stop_token_ids=range(VOCABULARY),  # each token ends a turn
        chunk_prompts=chunk,
    )
    rollout = RolloutSection(tools=["a.py:b"], sampling={"max_new_tokens": 3}, chunk_prompts=chunk, max_prompt_length=8)
    found.conversations = Episodes(world or World(), TokenChat(), rollout, 0)  # type: ignore[arg-type]
    return found


class Conversations:
    def __init__(self, per_step: int, rank: int = 0, world: int = 1) -> None:
        share = per_step // world
        self._rows = range(rank * share, (rank + 1) * share)

    def next(self, step: int) -> list[Prompt]:
        texts = [" ".join(map(str, PROMPTS[row % len(PROMPTS)])) for row in self._rows]
        return [
            Prompt(step, row, [{"role": "user", "content": text}], (), {})
            for row, text in zip(self._rows, texts, strict=True)
        ]

    def evaluation(self, step: int) -> list[Prompt]:
        return []


def value(prompt: Prompt, response: Response) -> float | None:
    if response.failed:
        return None
    first, _, second = response.token_ids
    return worth(response.prompt_of(prompt).token_ids, first, second)


@torch.no_grad()
def table(model: nn.Module) -> Tensor:
    """log pi(a1) + log pi(a2 | a1, o), float64 (prompts, 64), each conversation alone."""
    model = deepcopy(model).eval()
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    rows = []
    for prompt in PROMPTS:
        pairs = list(product(range(VOCABULARY), repeat=2))
        ids = torch.tensor([[*prompt, first, answer(prompt, first), second] for first, second in pairs])
        logprobs = torch.log_softmax(model(input_ids=ids).logits.double(), -1)
        at = len(prompt)
        rows.append(
            logprobs[:, at - 1].gather(-1, ids[:, at : at + 1])[:, 0]
            + logprobs[:, at + 1].gather(-1, ids[:, at + 2 : at + 3])[:, 0]
        )
    return torch.stack(rows)


def distance(policy: nn.Module, reference: nn.Module) -> float:
    """KL(pi || pi*), nats, mean over prompts."""
    log_pi, log_ref = table(policy), table(reference)
    assert torch.allclose(log_pi.exp().sum(-1), torch.ones(len(PROMPTS), dtype=torch.float64), atol=1e-6)
    pairs = list(product(range(VOCABULARY), repeat=2))
    rewards = torch.tensor([[worth(p, *pair) for pair in pairs] for p in PROMPTS], dtype=torch.float64)
    best = torch.log_softmax(log_ref + rewards / BETA, -1)
    return float((log_pi.exp() * (log_pi - best)).sum(-1).mean())


@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [
        ("ppo", torch.float32),
        ("ppo", torch.bfloat16),
        pytest.param("rloo", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_two_turns_reach_the_known_optimum(algorithm: str, dtype: torch.dtype) -> None:
    model, rows = gpt2(1, width=64), 256
    ppo = config(
        algorithm=algorithm,
        steps=60,
        batch_size=rows if algorithm == "ppo" else 2 * rows,
        epochs=4,
        minibatches=1,
        responses_per_prompt=1 if algorithm == "ppo" else 4,
        kl={"coef": BETA},
    )
    learner, log = make_learner(deepcopy(model), ppo, dtype=dtype), Log()
    generator = LocalGenerator([engine(deepcopy(model).to(dtype))], ppo.responses_per_prompt, 512)
    run(Schedule(60), Conversations(ppo.prompts_per_step), generator, LocalScorer(value), learner, log)
    start, end = distance(model, model), distance(learner._backend.networks.policy.float(), model)
    print(f"{algorithm}, {dtype}: KL to the optimum: {start:.4f} -> {end:.4f}")
    assert start > 0.2
    assert end <= 0.02 and end <= 0.1 * start
    last = log.metrics[-1]
    assert last["response/length"] == 2.0, "what the environment says is counted nowhere"
    assert last["conversations/tool_tokens"] == 1.0 and last["tools/call_frequency"] == 1.0
    assert last["conversations/turns"] == 2.0


def test_the_learner_finds_the_log_probs_that_the_engine_had() -> None:
    model = gpt2(1, width=64)
    learner = make_learner(deepcopy(model), config(steps=1, batch_size=64, kl={"coef": BETA}))
    log = Log()
    run(
        Schedule(1),
        Conversations(64),
        LocalGenerator([engine(deepcopy(model))], 1, 512),
        LocalScorer(value),
        learner,
        log,
    )
    assert log.metrics[0]["rollout/logprob_gap_max"] <= 1e-5
    assert log.metrics[0]["rollout/logprobs_missing"] == 0.0


def test_micro_batches_and_what_shares_a_batch_change_nothing() -> None:
    model = gpt2(1, width=64)

    def trained(**changes: Any) -> Tensor:
        ppo = config(steps=2, batch_size=32, kl={"coef": BETA}, learning_rate=1e-4, **changes)
        learner = make_learner(deepcopy(model), ppo)
        run(
            Schedule(2),
            Conversations(32),
            LocalGenerator([engine(deepcopy(model))], 1, 512),
            LocalScorer(value),
            learner,
            Log(),
        )
        return torch.cat([p.flatten() for p in learner._backend.networks.policy.parameters()])

    assert torch.allclose(trained(), trained(max_tokens_per_microbatch=12), atol=1e-6)


def test_a_failed_conversation_is_left_out_and_counted() -> None:
    model, world = gpt2(1, width=64), World(fails=[(1, token) for token in range(4)])
    learner, log = make_learner(deepcopy(model), config(steps=1, batch_size=64, kl={"coef": BETA})), Log()
    generator = LocalGenerator([engine(deepcopy(model), world)], 1, 512)
    run(Schedule(1), Conversations(64), generator, LocalScorer(value), learner, log)
    failed = [response for response in log.rollouts[0].responses if response.failed]
    assert failed and world.closed == 64, "every conversation's process is ended, those that failed too"
    metrics = log.metrics[0]
    assert metrics["conversations/failed"] == metrics["conversations/timed_out"] == len(failed)
    assert metrics["objective/dropped"] == len(failed) and metrics["episode"] == 64 - len(failed)
    assert all(response.episode and response.episode.failure == "hung" for response in failed)


def test_a_response_of_one_turn_is_what_it_was() -> None:
    """All sampled: to the bit what a batch without spans is."""
    prompts, tails = [[1, 2], [3]], [[4, 5, 6], [7]]
    spans = [[(0, 3)], [(0, 1)]]
    plain, spanned = (Sequences.of(prompts, tails, torch.device("cpu"), each) for each in (None, spans))
    assert all(torch.equal(getattr(plain, name), getattr(spanned, name)) for name in ("input_ids_BT", "sampled_BC"))
    assert torch.equal(plain.response_mask_BR, torch.tensor([[True, True, True], [True, False, False]]))
    gapped = Sequences.of(prompts, tails, torch.device("cpu"), [[(0, 1), (2, 3)], [(0, 1)]])
    assert gapped.response_lengths_B.tolist() == [2, 1] and gapped.tail_lengths_B.tolist() == [3, 1]
    assert gapped.tokens_N.tolist() == [4, 6, 7] and gapped.columns_N.tolist() == [0, 1, 0]
    assert torch.equal(gapped.attention_mask_BT, plain.attention_mask_BT), "what tools say is attended"


def test_what_a_tool_says_has_no_gradient_of_its_own() -> None:
    model = gpt2(1, width=64)
    learner = make_learner(model, config(steps=1, batch_size=16, kl={"coef": BETA}))
    backend = learner._backend
    batch = Sequences.of([[1, 2]], [[3, 6, 4]], torch.device("cpu"), [[(0, 1), (2, 3)]])
    model.set_attn_implementation  # noqa: B018
    seen: list[Tensor] = []
    handle = backend.networks.policy.get_output_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda _m, inputs, _o: seen.append(inputs[0])
    )
    logprobs_N, _ = backend.logprobs("policy", batch, 1.0)
    handle.remove()
    assert logprobs_N.shape == (2,) and seen[-1].shape[0] == 2, "no logits are computed for what it was not to predict"
    assert EOS not in batch.tokens_N.tolist()
