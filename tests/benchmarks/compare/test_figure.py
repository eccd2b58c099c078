"""Every method looks like itself, in every figure, and its name can be read."""

import pytest
from compare.labels import spread_out
from compare.methods import METHODS
from compare.styles import STYLES


def test_no_two_methods_share_a_colour() -> None:
    assert STYLES.keys() == METHODS.keys()
    assert len({style.color for style in STYLES.values()}) == len(STYLES)
    main = [name for name in STYLES if not name.startswith("pat_") and METHODS[name].prunes]
    assert len({STYLES[name].marker for name in main}) == len(main)


def test_names_keep_their_distance_and_their_order_and_stay_as_near_as_they_can() -> None:
    assert spread_out([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread_out([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    placed = spread_out([0.1, 0.11, 0.12, 0.8], 0.05)
    assert placed == pytest.approx([0.06, 0.11, 0.16, 0.8])
