"""What is said of a run's figures."""

import math

import pytest

from pat.training.outcome.measure import MUCH_FORGOTTEN, warn_of_forgetting, warn_of_losses
from pat.training.outcome.results import ModelFigures


def figures(base: float | None, dense: float | None) -> dict[str, ModelFigures]:
    return {stage: ModelFigures(1, 2, nll, None, 10, None) for stage, nll in {"base": base, "dense": dense}.items()}


@pytest.mark.parametrize(
    ("base", "dense", "words"),
    [
        (3.0, 2.9, None),
        (None, None, None),
        (3.0, 3.1, "worse on the held-out rows than its base"),
        (3.0, 4.9, "no better than guessing"),
        (6.0, math.nan, "no better than guessing"),
        (6.0, 5.5, "no better than guessing"),
    ],
)
def test_a_model_that_has_not_learnt_is_said_to(
    base: float | None, dense: float | None, words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_losses(figures(base, dense), vocab_size=128)  # of which the logarithm is 4.85
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
