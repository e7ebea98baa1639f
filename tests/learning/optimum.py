"""A PPO task small enough to solve exactly: every response of a tiny model, scored and summed in float64.

pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x), and J* - J(pi) = beta KL(pi || pi*) for every policy, an identity.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from toy import EOS, PROMPTS, VOCABULARY, reward


def all_responses(length: int) -> list[tuple[int, ...]]:
    """Every response: ended by EOS, or cut at `length`."""
    inner = [token for token in range(VOCABULARY) if token != EOS]
    ended = [(*body, EOS) for n in range(length) for body in product(inner, repeat=n)]
    return ended + list(product(inner, repeat=length))


@torch.no_grad()
def exact_logprobs(model: nn.Module, prompt: tuple[int, ...], length: int) -> Tensor:
    """log pi(y|x) of every response, float64, each prompt on its own without padding."""
    responses = all_responses(length)
    ids = torch.tensor([[*prompt, *y, *[0] * (length - len(y))] for y in responses])
    was_training = model.training
    logits = model.eval()(input_ids=ids).logits.double()
    model.train(was_training)
    logprobs = torch.log_softmax(logits, -1)[:, len(prompt) - 1 : -1]
    picked = logprobs.gather(-1, ids[:, len(prompt) :].unsqueeze(-1)).squeeze(-1)
    real = torch.arange(length) < torch.tensor([len(y) for y in responses]).unsqueeze(-1)
    return (picked * real).sum(-1)


@dataclass(frozen=True)
class Optimum:
    """What the KL-regularised optimum of each prompt is."""

    length: int
    beta: float
    reference: list[Tensor]
    rewards: list[Tensor]

    @classmethod
    def of(
        cls,
        reference: nn.Module,
        length: int,
        beta: float,
        value: Callable[[tuple[int, ...], tuple[int, ...]], float] = reward,
    ) -> "Optimum":
        responses = all_responses(length)
        return cls(
            length,
            beta,
            [exact_logprobs(reference, prompt, length) for prompt in PROMPTS],
            [torch.tensor([value(p, y) for y in responses], dtype=torch.float64) for p in PROMPTS],
        )

    def distance(self, policy: nn.Module) -> float:
        """KL(pi || pi*), nats, mean over prompts; checks the identity and that all probabilities add up to 1."""
        policy = deepcopy(policy)
        policy.set_attn_implementation("sdpa")  # type: ignore[operator]  # the learner's takes packed rows alone
        distances = []
        for prompt, ref, rewards in zip(PROMPTS, self.reference, self.rewards, strict=True):
            logprobs = exact_logprobs(policy, prompt, self.length)
            assert abs(float(logprobs.exp().sum()) - 1) < 1e-6
            log_z = torch.logsumexp(ref + rewards / self.beta, 0)
            best = ref + rewards / self.beta - log_z
            kl_to_best = float((logprobs.exp() * (logprobs - best)).sum())
            objective = float((logprobs.exp() * (rewards - self.beta * (logprobs - ref))).sum())
            assert abs(self.beta * float(log_z) - objective - self.beta * kl_to_best) < 1e-6
            distances.append(kl_to_best)
        return sum(distances) / len(distances)
