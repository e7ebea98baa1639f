"""Tokens drawn from logits: the shares of a distribution that is known."""

import pytest
import torch

from raytrl.errors import NonFiniteError
from raytrl.roles.serving.sampling import Knobs, Sampling

PROBS = [0.15, 0.5, 0.05, 0.3]


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(), PROBS),
        (Sampling(temperature=0), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
        (Sampling(top_k=2), [0, 0.5 / 0.8, 0, 0.3 / 0.8]),
        (Sampling(top_p=0.79), [0, 0.5 / 0.8, 0, 0.3 / 0.8]),
        (Sampling(top_p=0.81), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        (Sampling(top_k=3, top_p=0.85), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),  # top_p of what top_k has left
        (Sampling(top_k=3, top_p=0.84), [0, 0.5 / 0.8, 0, 0.3 / 0.8]),
        (Sampling(top_k=9), PROBS),
    ],
)
def test_a_row_has_its_own_distribution(sampling: Sampling, shares: list[float]) -> None:
    others = [Sampling(temperature=0), Sampling(top_k=1), Sampling(temperature=3.0, top_p=0.5)]
    knobs = Knobs([others[0], sampling, *others[1:]], torch.device("cpu"))
    logits_BV = torch.tensor([PROBS] * 4).log()
    count, points = [0] * 4, 2000
    for i in range(points):  # evenly, so that shares come out as they are
        draws_B = torch.full((4,), (i + 0.5) / points, dtype=torch.float64)
        count[knobs.pick(logits_BV, draws_B)[1].item()] += 1
    assert [each / points for each in count] == pytest.approx(shares, abs=1.5 / points)


@pytest.mark.parametrize("broken", [float("nan"), float("-inf")])
def test_no_distribution_is_an_error(broken: float) -> None:
    logits_BV = torch.tensor([PROBS, [broken] * 4])
    with pytest.raises(NonFiniteError):
        Knobs([Sampling(), Sampling()], torch.device("cpu")).pick(logits_BV, torch.zeros(2, dtype=torch.float64))
