"""A forward pass that would come out wrong without a word is refused, or warned of."""

from __future__ import annotations

import logging

import pytest
from tiny_models import batch, build
from tiny_training import attach, tuner_of

from pat.errors import PatError

WARNING = "whose mask nobody moves"


def test_a_batch_of_several_adapters_is_refused() -> None:
    model = attach(build("llama", tied=False), axes=["mlp"]).eval()
    with pytest.raises(PatError, match=r"adapter_names=\['default', '__base__'\].*set_adapter"):
        model(**batch(), adapter_names=["default", "__base__"])
    model(**batch())


def test_training_without_the_callback_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = attach(build("llama", tied=False), axes=["mlp"])
    with caplog.at_level(logging.WARNING, logger="pat"):
        model.eval()(**batch())
        assert WARNING not in caplog.text
        model.train()(**batch())
        model(**batch())
    assert caplog.text.count(WARNING) == 1


def test_a_mask_that_moves_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = attach(build("llama", tied=False), axes=["mlp"]).train()
    tuner_of(model).set_step(0, 2)
    with caplog.at_level(logging.WARNING, logger="pat"):
        model(**batch())
    assert WARNING not in caplog.text
