"""Equations 7 and 8 against 50-digit arithmetic and exact fractions, written here from the paper."""

from fractions import Fraction
from itertools import pairwise

import mpmath
import pytest

from pat.method.schedule import HARD_TEMPERATURE, milestone_step, offset, temperature

MILESTONES = (0, 1, 2, 3, 4, 7, 40, 1000)

ROUNDING = 1e-13
"""A few units in the last place of a Python float: logarithm, quotient, difference, quotient."""


def steps_around(milestone: int) -> list[int]:
    s0 = milestone
    return sorted({0, 1, s0 // 4, s0 // 2, (s0 + 1) // 2, s0 - 1, s0, s0 + 1, 10 * s0} - {-1})


CASES = [(step, milestone) for milestone in MILESTONES for step in steps_around(milestone)]


def expected_temperature(step: int, milestone: int) -> mpmath.mpf:
    with mpmath.workdps(50):
        if step == 0:  # ln(max(s, 1)) = 0, also where ln(s0) is 0
            return mpmath.mpf(1)
        return 1 / (1 - mpmath.log(step) / mpmath.log(milestone))


@pytest.mark.parametrize(("step", "milestone"), CASES)
def test_temperature_is_equation_7(step: int, milestone: int) -> None:
    if step >= milestone:
        assert temperature(step, milestone) == HARD_TEMPERATURE
        return
    expected = expected_temperature(step, milestone)
    # Near the milestone the difference in the denominator cancels: its relative error grows as tau itself.
    assert abs(temperature(step, milestone) / expected - 1) <= ROUNDING * max(1, expected)


@pytest.mark.parametrize(("step", "milestone"), CASES)
def test_offset_is_equation_8(step: int, milestone: int) -> None:
    if milestone == 0 or 2 * step >= milestone:
        assert offset(step, milestone) == 0.0
    else:
        assert offset(step, milestone) == pytest.approx(float(Fraction(1, 2) - Fraction(step, milestone)), abs=1e-16)


@pytest.mark.parametrize("milestone", [m for m in MILESTONES if m > 0])
def test_at_step_zero_the_mask_of_zero_weights_is_exactly_one(milestone: int) -> None:
    assert temperature(0, milestone) == 1.0
    assert offset(0, milestone) == 0.5


@pytest.mark.parametrize("milestone", [4, 7, 40, 1000])
def test_temperature_grows_and_offset_falls(milestone: int) -> None:
    taus = [temperature(step, milestone) for step in range(1, milestone + 1)]
    betas = [offset(step, milestone) for step in range(milestone + 1)]
    assert all(a < b for a, b in pairwise(taus))
    assert all(a >= b for a, b in pairwise(betas))
    assert betas[0] == 0.5 and betas[-1] == 0.0


@pytest.mark.parametrize(
    ("milestone", "num_steps", "expected"),
    [(1 / 3, 120, 40), (1 / 3, 100, 33), (1 / 3, 5, 2), (0.0, 100, 0), (1.0, 100, 100), (0.1, 4, 0)],
)
def test_milestone_step_is_the_rounded_share(milestone: float, num_steps: int, expected: int) -> None:
    assert milestone_step(milestone, num_steps) == expected
