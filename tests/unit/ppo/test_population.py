"""A batch that is the population: every group of two occurs as often as its probability says.

Three tokens with probabilities ½, ¼, ¼ in every state and at most two of them make responses whose probabilities are
multiples of 1/16, so 256 prompts of two samples hold every pair of responses as often as it should. The gradient that the
learner makes of this one batch is then no sample of the expected gradient but the expected gradient itself, and is held to
what the definitions say, written out here by enumeration in float64.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from raytrl.config.sections.ppo import PpoSection
from raytrl.loop.protocols import Rollout
from raytrl.records.samples import Prompt, Response, Score
from raytrl.roles.learner.backend import Backend
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.learner.networks import Networks
from raytrl.roles.learner.sequences import Sequences

TOKENS, STATES, LONGEST = "abE", ("", "a", "b"), 2
POLICY = {"a": 0.5, "b": 0.25, "E": 0.25}
REFERENCE = {"": (0.3, 0.3, 0.4), "a": (0.5, 0.2, 0.3), "b": (0.2, 0.5, 0.3)}
REWARD = {"E": 0.6, "aa": 1.5, "ab": -0.5, "aE": 0.2, "ba": 0.1, "bb": 0.9, "bE": 1.2}
RESPONSES = tuple(REWARD)
BETA, EPSILON = 0.5, 1e-4


def probability(response: str, policy: Mapping[str, float] = POLICY) -> float:
    return math.prod(policy[token] for token in response)


def rows_of(policy: Mapping[str, float]) -> list[tuple[str, str]]:
    return [
        pair
        for pair in itertools.product(RESPONSES, repeat=2)
        for _ in range(round(256 * probability(pair[0], policy) * probability(pair[1], policy)))
    ]


ROWS = rows_of(POLICY)


class Tabular(Backend):
    """A policy that is a table: the logits of three tokens in three states. Adds up gradients, and never steps."""

    def __init__(self, minibatch_gradients: list[Tensor]) -> None:
        self.table = nn.Parameter(
            torch.tensor([[math.log(POLICY[token]) for token in TOKENS]] * 3, dtype=torch.float64)
        )
        self.frozen = torch.tensor([REFERENCE[state] for state in STATES], dtype=torch.float64).log()
        self.taken = minibatch_gradients
        files = SimpleNamespace(check=lambda: None)
        self.networks = cast(
            Networks, SimpleNamespace(files=files, packed=True, dtype=torch.float32, token_bytes=lambda: 1.0)
        )

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def logprobs(self, network: Any, batch: Sequences, temperature: float) -> tuple[Tensor, Tensor | None]:
        table = (self.table if network == "policy" else self.frozen).log_softmax(-1)
        tokens_BR = batch.input_ids_BT[:, batch.prompt_width :]
        before_BR = torch.cat([torch.full_like(tokens_BR[:, :1], -1), tokens_BR[:, :-1]], dim=1)
        found_N = table[batch.at_tokens(before_BR) + 1, batch.tokens_N].float()
        return found_N, torch.zeros_like(found_N)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, factor: float) -> float:
        assert self.table.grad is not None
        self.taken.append(self.table.grad.clone())
        return 0.0

    def whole(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[Mapping[str, Tensor]]:
        yield {}

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


def population(
    dropped: bool = False, rewards: Mapping[str, float] = REWARD, sampler: Mapping[str, float] = POLICY
) -> Rollout:
    """`dropped`: one more prompt, of whose responses one has no score."""
    rows: Sequence[tuple[str, str]] = [*rows_of(sampler), *[("aa", "bE")] * (2 if dropped else 0)]
    prompts = [Prompt(step=0, row=row, text="", token_ids=(0,)) for row in range(len(rows))]
    responses, scores = [], []
    for row, pair in enumerate(rows):
        for sample, text in enumerate(pair):
            ids = tuple(TOKENS.index(token) for token in text)
            logprobs = tuple(math.log(sampler[token]) for token in text)
            responses.append(
                Response(
                    step=0,
                    row=row,
                    sample=sample,
                    token_ids=ids,
                    sampling_logprobs=logprobs,
                    ended=text[-1] == "E",
                    text=text,
                    policy_version=0,
                )
            )
            value = None if row >= len(ROWS) and (sample == 1 or row > len(ROWS)) else rewards[text]
            scores.append(Score(0, row, sample, value, {"rule": value}))
    return Rollout(prompts, responses, scores)


def gradient(rollout: Rollout, **changes: Any) -> tuple[Tensor, Mapping[str, float]]:
    """Of the loss, with respect to the table: what one optimizer step would get."""
    taken: list[Tensor] = []
    size = len(rollout.responses)
    settings = {"batch_size": size, "responses_per_prompt": 2, "epochs": 1, "minibatches": 1, **changes}
    kl = {"coef": BETA, **settings.pop("kl", {})}
    ppo = PpoSection.model_validate({**settings, "kl": kl})
    learner = PpoLearner(Tabular(taken), ppo, temperature=1.0, seed=0, max_new_tokens=LONGEST, reference="named")
    metrics = learner.update(learner.experience(rollout))
    (found,) = taken
    return found, metrics


# What the loss has in the places where algorithms differ, in the order of the facts: where KL goes, what the worth of a
# response is compared with and divided by, whether advantages are whitened, what a token counts.
EXPECTED: dict[str, tuple[Any, ...]] = {
    "rloo": ("reward", "others", "none", False, "max_tokens"),
    "grpo": ("loss", "mean", "group", False, "tokens"),
    "dr_grpo": ("loss", "mean", "none", False, "max_tokens"),
    "reinforce": ("reward", "nothing", "none", True, "tokens"),
    "reinforce_baseline": ("reward", "mean", "none", True, "tokens"),
    "gspo": ("loss", "mean", "group", False, "responses", True),
    "cispo": ("loss", "mean", "group", False, "tokens"),
}


def kl_of(state: str, token: str) -> float:
    return math.log(POLICY[token] / REFERENCE[state][TOKENS.index(token)])


def pull_of_kl(text: str, t: int, of_sequence: bool) -> float:
    """What the gradient of ρ·k3 has beside ∇log π of a token: the log-ratio itself, where ρ is the token's own ratio."""
    kls = [kl_of(text[:i], token) for i, token in enumerate(text)]
    k3 = [math.expm1(-kl) + kl for kl in kls]
    return (sum(k3) / len(k3) if of_sequence else k3[t]) - math.expm1(-kls[t])


def expected_gradient(
    place: str, baseline: str, scale: str, whitened: bool, mean: str, of_sequence: bool = False
) -> Tensor:
    """Minus the ascent direction, by enumeration of all pairs with their probabilities."""
    pairs = [(pair, probability(pair[0]) * probability(pair[1])) for pair in itertools.product(RESPONSES, repeat=2)]
    credit: list[tuple[float, str, list[float]]] = []  # (probability, response, advantage of each token)
    for pair, weight in pairs:
        kls = [[kl_of(text[:i], token) for i, token in enumerate(text)] for text in pair]
        penalties = [[BETA * kl * (place == "reward") for kl in each] for each in kls]
        worth = [REWARD[text] - sum(each) for text, each in zip(pair, penalties, strict=True)]
        for i, text in enumerate(pair):
            if baseline == "nothing":  # of what comes after, later KL included
                advantages = [REWARD[text] - sum(penalties[i][t:]) for t in range(len(text))]
            else:
                against = worth[1 - i] if baseline == "others" else sum(worth) / 2
                spread = abs(worth[0] - worth[1]) / math.sqrt(2)  # unbiased, of two
                advantages = [(worth[i] - against) / ((spread + EPSILON) if scale == "group" else 1.0)] * len(text)
            credit.append((weight / 2, text, advantages))
    tokens = sum(weight * len(text) for weight, text, _ in credit)
    if whitened:
        average = sum(weight * sum(advantages) for weight, _, advantages in credit) / tokens
        variance = (
            sum(weight * sum((a - average) ** 2 for a in advantages) for weight, _, advantages in credit) / tokens
        )
        credit = [
            (w, text, [(a - average) / math.sqrt(variance + 1e-8) for a in advantages])
            for w, text, advantages in credit
        ]
    found = torch.zeros(3, 3, dtype=torch.float64)
    for weight, text, advantages in credit:
        share = {"tokens": 1 / tokens, "responses": 1 / len(text), "max_tokens": 1 / LONGEST}[mean]
        for t, (token, advantage) in enumerate(zip(text, advantages, strict=True)):
            pull = advantage - (BETA * pull_of_kl(text, t, of_sequence) if place == "loss" else 0.0)
            for other, name in enumerate(TOKENS):
                found[STATES.index(text[:t]), other] -= weight * share * pull * ((name == token) - POLICY[name])
    return found


def close(mine: Tensor, expected: Tensor) -> None:
    assert float((mine - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("algorithm", EXPECTED)
def test_the_gradient_is_the_expected_one(algorithm: str) -> None:
    place, *_ = EXPECTED[algorithm]
    mine, _ = gradient(population(), algorithm=algorithm, kl={"place": place})
    close(mine, expected_gradient(*EXPECTED[algorithm]))


@pytest.mark.parametrize("mean", ["tokens", "responses", "max_tokens"])
@pytest.mark.parametrize("scale", ["none", "group"])
def test_each_scale_with_each_mean(mean: str, scale: str) -> None:
    mine, _ = gradient(population(), algorithm="grpo", advantage_scale=scale, loss_mean=mean)
    close(mine, expected_gradient("loss", "mean", scale, False, mean))


def test_rloo_is_the_gradient_of_the_objective() -> None:
    """Not by its definition but by what it is for: E[r] − β·KL(π‖π_ref) over whole responses, differentiated."""
    backend = Tabular([])
    table, frozen = backend.table.log_softmax(-1), backend.frozen.log_softmax(-1)
    objective = torch.zeros((), dtype=torch.float64)
    for text in RESPONSES:
        places = [(STATES.index(text[:i]), TOKENS.index(token)) for i, token in enumerate(text)]
        logprob, reference = sum(table[place] for place in places), sum(frozen[place] for place in places)
        objective = objective + logprob.exp() * (REWARD[text] - BETA * (logprob - reference))  # type: ignore[union-attr]
    (expected,) = torch.autograd.grad(objective, backend.table)
    mine, _ = gradient(population(), algorithm="rloo")
    close(mine, -expected / LONGEST)


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce_baseline"])
def test_at_the_optimum_no_response_has_an_advantage(algorithm: str) -> None:
    """Where score − β·log(π/π_ref) is one number, each advantage is 0, not only their mean: so KL is taken off before the
    baseline, of the whole response. Taken off after it, or token by token, the expected gradient would be the same."""
    soft = {text: 0.3 + BETA * sum(kl_of(text[:i], token) for i, token in enumerate(text)) for text in RESPONSES}
    ppo = PpoSection.model_validate(
        {
            "algorithm": algorithm,
            "batch_size": 512,
            "responses_per_prompt": 2,
            "whiten_advantages": False,
            "kl": {"coef": BETA},
        }
    )
    learner = PpoLearner(Tabular([]), ppo, temperature=1.0, seed=0, max_new_tokens=LONGEST, reference="named")
    assert float(learner.experience(population(rewards=soft)).advantages_BR.abs().max()) < 1e-6


@pytest.mark.parametrize("algorithm", EXPECTED)
def test_dropped_responses_change_nothing_for_others(algorithm: str) -> None:
    """One more row, of whose two responses one was dropped, and one with both dropped: alone, a response has advantage 0."""
    changes = {"algorithm": algorithm, "kl": {"coef": 0.0}, "loss_mean": "max_tokens"}
    if algorithm == "reinforce" or algorithm == "gspo":
        pytest.skip("its advantages or its mean count every kept response")
    whole, _ = gradient(population(), **changes)
    with_dropped, metrics = gradient(population(dropped=True), **changes)
    if not PpoSection.model_validate(changes).whiten_advantages:
        close(with_dropped * (len(ROWS) * 2 + 1) / (len(ROWS) * 2), whole)
    assert metrics["groups/kept"] == sum(a != b for a, b in ROWS)
    assert metrics["objective/dropped"] == 3.0


def test_a_response_that_was_cut_trains_nothing_and_stays_in_its_group() -> None:
    every, _ = gradient(population(), algorithm="dr_grpo", kl={"coef": 0.0})
    ended, _ = gradient(population(), algorithm="dr_grpo", kl={"coef": 0.0}, train_unfinished=False)
    cut = torch.zeros_like(ended)
    for pair in ROWS:
        average = (REWARD[pair[0]] + REWARD[pair[1]]) / 2
        for text in pair:
            if text[-1] == "E":
                continue
            for t, token in enumerate(text):
                for other, name in enumerate(TOKENS):
                    pull = (REWARD[text] - average) * ((name == token) - POLICY[name])
                    cut[STATES.index(text[:t]), other] -= pull / (2 * len(ROWS) * LONGEST)
    close(ended, every - cut)


def test_what_an_algorithm_lacks_is_absent() -> None:
    _, metrics = gradient(population(), algorithm="grpo")
    assert not any(name.startswith("val/explained") or "value" in name for name in metrics)
    assert metrics["loss/kl_avg"] > 0 and metrics["frac_reward_zero_std"] == metrics["groups/equal_fraction"]
    equal = sum(a == b for a, b in ROWS)
    assert metrics["groups/equal_fraction"] == pytest.approx(equal / len(ROWS))
    spread = sum(abs(REWARD[a] - REWARD[b]) / math.sqrt(2) for a, b in ROWS) / len(ROWS)
    assert metrics["groups/score_std"] == pytest.approx(spread, rel=1e-5)
