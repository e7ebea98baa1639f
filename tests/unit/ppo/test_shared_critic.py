"""A value function that is a head on the policy: one network learns, by both losses, in one pass."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_learner import a_rollout, parameters, train
from torch import Tensor, nn
from toy import config, gpt2, llama, make_learner

from raytrl.loop.protocols import Rollout
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.learner.networks import backbone
from raytrl.roles.learner.save import save_value
from raytrl.roles.weights.buckets import checksum


def with_head(learner: PpoLearner) -> PpoLearner:
    """Its value head starts at 0, where the value loss moves nothing below it: here it starts elsewhere."""
    head = learner._backend.networks.value_head
    assert head is not None
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-0.5, 0.5, head.weight.numel()).view_as(head.weight))
    return learner


def gradients_of(learner: PpoLearner, rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    taken: dict[str, Tensor] = {}

    def step(factor: float) -> float:
        found = learner._backend.networks.named_parameters()
        taken.update({name: p.grad.clone() for name, p in found if p.grad is not None})
        return 0.0

    monkeypatch.setattr(learner._backend, "step", step)
    learner.update(learner.experience(rollout))
    return taken


def plainly(model: nn.Module, head: Tensor, rollout: Rollout, coef: float) -> tuple[Tensor, Tensor]:
    """Log-probs and values one row at a time, without padding; then PPO's losses at ratio 1, written out."""
    texts = {prompt.row: list(prompt.token_ids) for prompt in rollout.prompts}
    scores = {score.row: score.value for score in rollout.scores}
    tokens, values, credit, returns = [], [], [], []
    for response in rollout.responses:
        start, ids = len(texts[response.row]), texts[response.row] + list(response.token_ids)
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        logprobs = torch.log_softmax(out.logits[0, start - 1 : -1], -1)
        tokens.append(logprobs.gather(-1, torch.tensor(ids[start:]).unsqueeze(-1)).squeeze(-1))
        values.append(out.hidden_states[-1][0, start - 1 : -1] @ head)
        old, score = values[-1].detach().tolist(), scores[response.row]
        assert score is not None  # KL is 0: the reference is the policy
        following, advantages = 0.0, [0.0] * len(old)
        for t in reversed(range(len(old))):
            last = t == len(old) - 1
            delta = (score if last else old[t + 1]) - old[t]
            following = delta + 0.95 * following
            advantages[t] = following
        credit += advantages
        returns += [a + v for a, v in zip(advantages, old, strict=True)]
    average = sum(credit) / len(credit)
    variance = sum((a - average) ** 2 for a in credit) / len(credit)
    white = torch.tensor([(a - average) / math.sqrt(variance + 1e-8) for a in credit])
    logprobs, valued = torch.cat(tokens), torch.cat(values)
    ratio = (logprobs - logprobs.detach()).exp()
    return -(ratio * white).mean(), coef * 0.5 * (valued - torch.tensor(returns)).square().mean()


@pytest.mark.parametrize("family", [gpt2, llama])
def test_the_gradient_is_that_of_both_losses_through_one_trunk(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"width": 16} if family is gpt2 else {}
    rollout = a_rollout(family=lambda: family(**settings))
    ppo = config(epochs=1, minibatches=1, value_coef=0.7)
    learner = with_head(make_learner(family(**settings), ppo, shared=True))
    mine = gradients_of(learner, rollout, monkeypatch)
    model = family(**settings).eval()
    head = nn.Parameter(learner._backend.networks.value_head.weight.detach()[0].clone())  # type: ignore[union-attr]
    policy, value = plainly(model, head, rollout, 0.7)
    (policy + value).backward()
    assert head.grad is not None
    torch.testing.assert_close(mine["value_head.weight"][0], head.grad, atol=2e-6, rtol=1e-4)
    expected = {f"policy.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == mine.keys() - {"value_head.weight"}
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, atol=2e-6, rtol=1e-4, msg=name)


def test_one_pass_serves_both() -> None:
    passes = {}
    for shared in (False, True):
        learner = make_learner(gpt2(width=16), config(kl={"coef": 0.0}), shared=shared)
        networks, count = learner._backend.networks, [0]
        for model in (networks.policy, networks.value):
            if model is not None:
                backbone(model).register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        learner.update(learner.experience(a_rollout()))
        passes[shared] = count[0]
    assert passes[False] == 2 * passes[True] > 0


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_held_stored_and_resumed(lora: bool, tmp_path: Path) -> None:
    def fresh() -> PpoLearner:
        return make_learner(gpt2(width=16), config(), lora=lora, shared=True)

    unbroken = fresh()
    train(4, lora=lora, learner=unbroken)
    train(2, lora=lora, learner=fresh(), folder=tmp_path)
    resumed = fresh()
    resumed.load(tmp_path / "2")
    train(4, lora=lora, learner=resumed)
    assert checksum(parameters(resumed)) == checksum(parameters(unbroken))
    networks = resumed._backend.networks
    assert networks.value is None and not any("value_function" in name for name, _ in networks.named_parameters())
    assert [tuple(p.shape) for p in networks.value_group()] == [(1, 16)]
    (tmp_path / "value").mkdir()
    save_value(resumed._backend, tmp_path / "value")
    (head,) = torch.load(tmp_path / "value/value_head.pt", weights_only=True).values()
    assert torch.equal(head, networks.value_head.weight) and bool(head.any())  # type: ignore[union-attr]
