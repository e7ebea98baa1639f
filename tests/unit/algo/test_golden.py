"""The golden case: the same rules were verified against TRL 1.12 to 9e-7 (facts, 4.4)."""

import pytest
import torch
from torch import Tensor

from raytrl.algo.advantages import gae
from raytrl.algo.kl import KlController, kl_estimate
from raytrl.algo.masked import Moments, masked_sum, moment_sums, whiten
from raytrl.algo.rewards import shaped_scores, token_rewards

LENGTHS = torch.tensor([3, 5, 1])
MASK = torch.arange(5) < LENGTHS.unsqueeze(-1)
ENDED = torch.tensor([True, False, True])
SCORES = torch.tensor([1.0, 0.5, -0.4])
VALUES = torch.tensor([[0.2, 0.1, 0.4, 0.5, 0.9], [0, 0.3, -0.2, 0.1, 0.6], [0.7, -0.3, 0.8, 0.2, 0.1]])


def padded(rows: list[list[float]], fill: float = 0.0) -> Tensor:
    return torch.tensor([row + [fill] * (5 - len(row)) for row in rows])


LOGP = padded([[-1, -0.5, -0.2], [-0.7, -1.2, -0.3, -2, -0.4], [-1.5]], fill=3.0)
REF = padded([[-1.2, -0.4, -0.6], [-0.9, -1, -0.8, -1.5, -0.4], [-1.1]], fill=-7.0)
ADVANTAGES = padded([[0.6799, 0.842, 0.56], [-0.374776, -0.689237, -0.22025, -0.495, -1.1], [-1.06]])
WHITENED = padded(
    [
        [1.275664, 1.508984, 1.103085],
        [-0.24239, -0.695013, -0.019973, -0.415436, -1.286247],
        [-1.228673],
    ]
)


def advantages_and_returns() -> tuple[Tensor, Tensor]:
    scores = shaped_scores(SCORES, ENDED, missing_eos_penalty=1.0)
    rewards = token_rewards(scores, kl_estimate(LOGP, REF), MASK, kl_coef=0.1)
    return gae(rewards, VALUES, MASK, gamma=1.0, lam=0.95)


def test_advantages() -> None:
    advantages, _ = advantages_and_returns()
    torch.testing.assert_close(advantages, ADVANTAGES, atol=1e-6, rtol=0)


def test_returns_come_from_unwhitened_advantages() -> None:
    _, returns = advantages_and_returns()
    torch.testing.assert_close(returns[0], torch.tensor([0.8799, 0.942, 0.96, 0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(returns[2], torch.tensor([-0.36, 0, 0, 0, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_whitened_advantages_are_global_and_biased(num_workers: int) -> None:
    advantages, _ = advantages_and_returns()
    shares = [slice(i, None, num_workers) for i in range(num_workers)]
    sums = torch.stack([moment_sums(advantages[share], MASK[share]) for share in shares]).sum(0)
    torch.testing.assert_close(whiten(advantages, MASK, Moments.of(sums)), WHITENED, atol=2e-6, rtol=0)


def test_sequence_kl() -> None:
    k1 = torch.stack([masked_sum(row, mask) for row, mask in zip(kl_estimate(LOGP, REF), MASK, strict=True)])
    k3 = torch.stack([masked_sum(row, mask) for row, mask in zip(kl_estimate(LOGP, REF, "k3"), MASK, strict=True)])
    torch.testing.assert_close(k1, torch.tensor([0.5, 0.0, -0.4]), atol=1e-6, rtol=0)
    torch.testing.assert_close(k3, torch.tensor([0.094222, 0.295385, 0.091825]), atol=1e-6, rtol=0)
    assert float(-0.1 * k1.mean()) == pytest.approx(-0.003333, abs=1e-6)


@pytest.mark.parametrize(("kl", "coef"), [(12, 0.201024), (3, 0.198976), (6.3, 0.200256)])
def test_adaptive_controller(kl: float, coef: float) -> None:
    controller = KlController(0.2, target=6, horizon=10000)
    controller.update(kl, 256)
    assert controller.coef == pytest.approx(coef, abs=1e-6)
    restored = KlController(0.2, target=6, horizon=10000)
    restored.load_state_dict(controller.state_dict())
    assert restored.coef == controller.coef


def test_fixed_controller_never_moves() -> None:
    controller = KlController(0.2)
    controller.update(100.0, 256)
    assert controller.coef == 0.2
