"""What is said of a run's figures."""

import math

import pytest

from pat.training.outcome.measure import MUCH_FORGOTTEN, warn_of_forgetting, warn_of_losses
from pat.training.outcome.results import ModelFigures


def figures(base: float | None, dense: float | None, error: float | None = None) -> dict[str, ModelFigures]:
    return {"base": ModelFigures(1, 2, base), "dense": ModelFigures(1, 2, dense, None, error)}


@pytest.mark.parametrize(
    ("base", "dense", "error", "words"),
    [
        (3.0, 2.9, 0.01, None),
        (None, None, None, None),
        (3.0, 3.1, None, "is worse than its base on the held-out rows (3.100 against 3.000"),
        (3.0, 3.1, 0.04, "is worse than its base"),
        (3.0, 3.1, 0.06, "not better than its base, and not told apart from it, on the held-out rows"),
        (3.0, 4.9, 0.01, "no better than guessing"),
        (6.0, math.nan, None, "no better than guessing"),
        (6.0, 5.5, 0.01, "no better than guessing"),
        (3.0, math.log(128) - 4e-7, 0.01, "no better than guessing"),  # of equal logits, by rounding
    ],
)
def test_a_model_that_has_not_learnt_is_said_to(
    base: float | None, dense: float | None, error: float | None, words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_losses(figures(base, dense, error), vocab_size=128)  # of which the logarithm is 4.85
    assert len(caplog.messages) == (words is not None)
    assert words is None or words in caplog.text


@pytest.mark.parametrize(
    ("more", "paired", "is_said"),
    [
        (MUCH_FORGOTTEN + 0.01, 0.02, True),
        (MUCH_FORGOTTEN - 0.01, 0.02, False),  # any tuning drifts a little
        (MUCH_FORGOTTEN + 0.01, 0.2, False),  # within the error of so little text
        (MUCH_FORGOTTEN + 0.01, None, False),  # of other windows: within 2 * sqrt(0.1^2 + 0.1^2)
        (MUCH_FORGOTTEN + 0.1, None, True),
        (-1.0, 0.02, False),
    ],
)
def test_a_model_that_has_forgotten_much_is_said_to(
    more: float, paired: float | None, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    base = ModelFigures(1, 2, general_nll=3.0, general_standard_error=0.1)
    dense = ModelFigures(1, 2, general_nll=3 + more, general_standard_error=0.1, general_difference_error=paired)
    warn_of_forgetting({"base": base, "dense": dense})
    assert ["forgotten much" in line for line in caplog.messages] == [True] * is_said
    warn_of_forgetting({"base": ModelFigures(1, 2), "dense": dense})
    assert len(caplog.messages) == is_said
