"""Paired errors and p against scipy and numbers worked out by hand."""

import math
import random

import numpy as np
import pytest
import scipy.stats

from raytrl.roles.paired import SIGN_FLIPS, SIGN_TEST, paired, sign_test


@pytest.mark.parametrize(("higher", "lower"), [(0, 0), (1, 0), (5, 5), (38, 15), (24, 9), (0, 12), (400, 460)])
def test_the_sign_test_is_the_binomial_one(higher: int, lower: int) -> None:
    n = higher + lower
    expected = scipy.stats.binomtest(higher, n, 0.5).pvalue if n else 1.0
    assert sign_test(higher, lower) == pytest.approx(expected, rel=1e-9)


def test_by_hand() -> None:
    """Right and wrong on five rows: differences 1, 0, 1, -1, 1, with mean 0.4 and variance 0.8."""
    found = paired([1, 1, 1, 0, 1], [0, 1, 0, 1, 0])
    assert (found.n, found.higher, found.lower, found.test) == (5, 3, 1, SIGN_TEST)
    assert found.difference == pytest.approx(0.4)
    assert found.stderr == pytest.approx(math.sqrt(0.8 / 5))
    assert found.p == pytest.approx(2 * (1 + 4) / 16)  # none or one of four fair coins, on either side


def test_a_shared_difficulty_is_no_error() -> None:
    """Both models find the same rows hard: the errors of two means apart would be far larger."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 200)
    found = paired(list(hard + 0.5), list(hard))
    assert found.stderr is not None
    assert found.stderr < 1e-9
    apart = math.hypot(hard.std(ddof=1), hard.std(ddof=1)) / math.sqrt(200)
    assert apart > 0.4


def test_few_numbers_are_compared_exactly() -> None:
    first, second = [0.3, 2.0, -1.0, 4.5, 0.1, 7.0], [0.1, 1.0, 0.5, 2.5, 0.1, 3.0]

    def mean_difference(x: object, y: object, axis: int) -> object:
        return np.mean(x, axis=axis) - np.mean(y, axis=axis)

    expected = scipy.stats.permutation_test(
        (first, second), mean_difference, permutation_type="samples", vectorized=True, n_resamples=np.inf
    ).pvalue
    found = paired(first, second)
    assert found.test == SIGN_FLIPS
    assert found.p == pytest.approx(expected)
    assert found.p == pytest.approx(10 / 32)  # the signs that leave 5.7 of 8.7, by hand


@pytest.mark.parametrize("times", [2, 20])  # all signs gone through, and drawn ones
def test_differences_that_cancel_say_nothing(times: int) -> None:
    """Their sum is rounding noise and not 0: every sum of other signs is as large as no difference at all."""
    found = paired([0.1, 0.2, -0.3] * times, [0.0] * 3 * times)
    assert found.difference == pytest.approx(0, abs=1e-15)
    assert found.p == 1


def test_many_numbers_come_near_the_t_test_and_repeat() -> None:
    rng = random.Random(1)
    first = [rng.gauss(0.15, 1) for _ in range(150)]
    second = [0.0] * 150
    found = paired(first, second)
    assert found.p == pytest.approx(scipy.stats.ttest_1samp(first, 0).pvalue, abs=0.02)
    assert found == paired(first, second)
    assert paired([1.5] * 40, [0.0] * 40).p == 1 / 10_000  # as small as the draws can tell, never 0


def test_nothing_is_none_not_zero() -> None:
    assert (paired([], []).difference, paired([], []).p) == (None, None)
    assert paired([1.0], [0.0]).stderr is None
    with pytest.raises(ValueError, match="finite"):
        paired([math.nan], [0.0])
