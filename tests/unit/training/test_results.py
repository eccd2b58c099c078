"""What is said of a run's figures."""

import math

import pytest

from pat.training.measure import warn_of_losses
from pat.training.results import ModelFigures


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
