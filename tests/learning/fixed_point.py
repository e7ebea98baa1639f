"""Where GRPO and Dr. GRPO end: not at π_ref·exp(r/β), but where what its groups say and its KL penalty balance, at each token.

With the KL in the loss a state's tokens are pulled by that state's KL alone, and an advantage that is divided by its group's
deviation is worth what the policy itself makes of it. So the point is self-consistent: for every state s and token a
    E[A | s, a] − β·log(π(a|s)/π_ref(a|s)) = a constant of s,
with E over responses of the policy, and A the mean over what the others of the group may be. Solved by damped iteration,
groups summed over exactly: an advantage depends on how many of the others have which score.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from optimum import all_responses, exact_logprobs
from torch import Tensor, nn
from toy import EOS, PROMPTS, VOCABULARY, reward

EPSILON = 1e-4


@dataclass(frozen=True)
class Tree:
    """Every response of at most `length` tokens as a walk through states, which are what was sampled before."""

    responses: list[tuple[int, ...]]
    walk_of: Tensor  # of each step: which response
    states: Tensor  # of each step: where
    tokens: Tensor  # of each step: what was chosen
    prefixes: list[tuple[int, ...]]

    @classmethod
    def of(cls, length: int) -> "Tree":
        inner = [token for token in range(VOCABULARY) if token != EOS]
        prefixes = [body for n in range(length) for body in itertools.product(inner, repeat=n)]
        number = {prefix: i for i, prefix in enumerate(prefixes)}
        responses = all_responses(length)
        steps = [(i, number[y[:t]], token) for i, y in enumerate(responses) for t, token in enumerate(y)]
        return cls(responses, *torch.tensor(steps).unbind(1), prefixes)

    def logprobs(self, table: Tensor) -> Tensor:
        """Of the responses, from those of tokens in states."""
        return table.new_zeros(len(self.responses)).index_add(0, self.walk_of, table[self.states, self.tokens])

    def summed(self, values: Tensor) -> Tensor:
        """One number a response, added up at each (state, token) that it passes."""
        found = values.new_zeros(len(self.prefixes) * VOCABULARY)
        found = found.index_add(0, self.states * VOCABULARY + self.tokens, values[self.walk_of])
        return found.view(len(self.prefixes), VOCABULARY)


@torch.no_grad()
def table_of(model: nn.Module, prompt: tuple[int, ...], tree: Tree) -> Tensor:
    """log π of every token in every state, float64."""
    rows = [
        torch.log_softmax(model.eval()(input_ids=torch.tensor([[*prompt, *prefix]])).logits[0, -1].double(), -1)
        for prefix in tree.prefixes
    ]
    return torch.stack(rows)


def group_advantage(scores: Tensor, size: int) -> Callable[[Tensor], Tensor]:
    """From the probabilities of all responses to the mean advantage of each: (R − mean) / (unbiased std + ε)."""
    levels, level_of = scores.round(decimals=6).unique(return_inverse=True)
    others = list(itertools.combinations_with_replacement(range(len(levels)), size - 1))
    counts = torch.tensor([[other.count(k) for k in range(len(levels))] for other in others], dtype=torch.float64)
    ways = torch.tensor(
        [math.factorial(size - 1) / math.prod(map(math.factorial, Counter(other).values())) for other in others],
        dtype=torch.float64,
    )
    theirs = levels[torch.tensor(others)].unsqueeze(-1).expand(-1, -1, len(levels))
    group = torch.cat([theirs, levels.expand(len(others), 1, -1)], dim=1)  # (others, size, my level)
    spread = group.std(1)
    advantages = (levels - group.mean(1)) / (torch.where(spread < 1e-6, 0.0, spread) + EPSILON)

    def mean_advantage(probabilities: Tensor) -> Tensor:
        of_level = torch.zeros_like(levels).index_add(0, level_of, probabilities)
        chance = ways * (counts * of_level.clamp(min=1e-300).log()).sum(1).exp()
        return (chance @ advantages)[level_of]

    return mean_advantage


def plain_advantage(scores: Tensor) -> Callable[[Tensor], Tensor]:
    """Dr. GRPO's: R less the mean of the policy. With the own response in the group's mean it is (G−1)/G of that, which is
    the same as a KL coefficient of G/(G−1) times as much."""
    return lambda probabilities: scores - (probabilities * scores).sum()


def solve(reference: Tensor, tree: Tree, mean_advantage: Callable[[Tensor], Tensor], beta: float) -> Tensor:
    """log π of every response at the fixed point."""
    table = reference.clone()
    for _ in range(3000):
        probabilities = tree.logprobs(table).exp()
        visits, worth = tree.summed(probabilities), tree.summed(probabilities * mean_advantage(probabilities))
        push = worth - beta * visits * (table - reference)
        push = push - table.exp() * push.sum(1, keepdim=True)
        if float((push / visits.sum(1, keepdim=True).clamp(min=1e-12)).abs().max()) < 1e-9:
            return tree.logprobs(table)
        table = torch.log_softmax(table + push / visits.clamp(min=1e-12), -1)
    raise AssertionError("the iteration does not settle")


@dataclass(frozen=True)
class GrpoPoint:
    """What GRPO with the KL in the loss ends at, for each prompt; `scaled`: divided by the group's deviation."""

    length: int
    points: list[Tensor]

    @classmethod
    def of(cls, reference: nn.Module, length: int, beta: float, size: int, scaled: bool = True) -> "GrpoPoint":
        tree, points = Tree.of(length), []
        for prompt in PROMPTS:
            scores = torch.tensor([reward(prompt, y) for y in tree.responses], dtype=torch.float64)
            table = table_of(reference, prompt, tree)
            if scaled:
                points.append(solve(table, tree, group_advantage(scores, size), beta))
            else:
                points.append(solve(table, tree, plain_advantage(scores), beta * size / (size - 1)))
        return cls(length, points)

    def distance(self, policy: nn.Module) -> float:
        """KL(π ‖ the point), nats, mean over prompts."""
        policy.set_attn_implementation("sdpa")  # type: ignore[operator]  # the learner's takes packed rows alone
        found = []
        for prompt, point in zip(PROMPTS, self.points, strict=True):
            logprobs = exact_logprobs(policy, prompt, self.length)
            found.append(float((logprobs.exp() * (logprobs - point)).sum()))
        return sum(found) / len(found)
