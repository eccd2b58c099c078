"""Median, quartiles, and the speed-up of pairs."""

import pytest

from pat.benchmark.statistics import Spread, paired_ratios, spread_of


def test_the_quartiles_lie_between_the_measurements() -> None:
    assert spread_of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert spread_of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)
    assert spread_of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_one_slow_measurement_does_not_move_the_median() -> None:
    assert spread_of([1.0, 1.0, 1.0, 1.0, 100.0]).median == 1.0


def test_a_machine_that_slows_down_does_not_count_as_a_difference() -> None:
    """Every pair says 1.25; the ratio of the medians of what each model took in all would say the same only by luck."""
    slowing = [1.0, 2.0, 4.0, 8.0]
    ratio = paired_ratios([1.25 * second for second in slowing], slowing)
    assert ratio == Spread(1.25, 1.25, 1.25)


def test_the_ratio_is_above_one_where_the_model_is_faster() -> None:
    assert paired_ratios([2.0], [1.0]).median == 2.0
    with pytest.raises(ValueError, match="zip"):
        paired_ratios([2.0, 2.0], [1.0])
