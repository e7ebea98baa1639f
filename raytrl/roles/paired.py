"""Two models on the same rows: the difference of their means, how sure it is, and how likely chance alone would give it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SIGN_TEST, SIGN_FLIPS = "exact sign test (McNemar)", "sign flips"
_MOST_EXACT = 14  # differences other than 0 whose signs are all gone through
_DRAWS = 9_999


@dataclass(frozen=True, slots=True)
class Paired:
    """First minus second, row by row."""

    n: int
    difference: float | None  # of the means; None where there are no rows
    stderr: float | None  # of the difference, from the differences of the rows; None for fewer than two rows
    higher: int  # rows where the first is above the second
    lower: int
    p: float | None  # two-sided: a difference as large as this one where the models are alike
    test: str  # by which p was found

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, ready for json.dumps."""
        return asdict(self)


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compares values of the same rows in the same order; all finite.

    The error is that of a mean of differences, which leaves out what makes rows easy or hard for both (Miller 2024, Adding
    Error Bars to Evals, section 4.2). p is exact for rows that are right or wrong: McNemar's test by the binomial
    distribution. Of other values the signs of the differences are flipped (Fisher 1935, section 21): all 2ⁿ of up to 14
    differences, else 9,999 draws that are always the same, with (1 + as large) / (1 + draws).
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if len(first) != len(second) or not np.isfinite(differences).all():
        raise ValueError(f"paired: expected as many finite values on both sides; found: {len(first)} and {len(second)}")
    n, higher, lower = len(differences), int((differences > 0).sum()), int((differences < 0).sum())
    if n == 0:
        return Paired(0, None, None, 0, 0, None, "")
    stderr = float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    is_binary = set(first) | set(second) <= {0, 1}
    p = sign_test(higher, lower) if is_binary else _by_flips(differences[differences != 0])
    return Paired(n, float(differences.mean()), stderr, higher, lower, p, SIGN_TEST if is_binary else SIGN_FLIPS)


def sign_test(higher: int, lower: int) -> float:
    """Two-sided p of so many rows above and below where either is as likely; rows that are equal say nothing.

    Twice the smaller tail of the binomial distribution with 1/2, summed in whole numbers.
    """
    n, fewer = higher + lower, min(higher, lower)
    term, tail = 1, 0  # the number of ways to choose `taken` of n
    for taken in range(fewer + 1):
        tail += term
        term = term * (n - taken) // (taken + 1)
    return min(1.0, 2 * tail / (1 << n))


def _by_flips(differences: "np.ndarray[Any, np.dtype[np.float64]]") -> float:
    n = len(differences)
    if n == 0:
        return 1.0
    # Sums in another order differ in their last bits, by how much is summed: where it cancels, the sum is nothing but that.
    least = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    if n <= _MOST_EXACT:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(np.abs(signs @ differences) >= least))
    drawn, as_large = np.random.default_rng(0), 0
    for start in range(0, _DRAWS, 256):  # not all at once: of many rows that would be gigabytes
        signs = 1 - 2 * drawn.integers(0, 2, (min(256, _DRAWS - start), n), dtype=np.int8)
        as_large += int((np.abs(signs @ differences) >= least).sum())
    return float((1 + as_large) / (1 + _DRAWS))
