"""Fixtures of the training's tests."""

from collections.abc import Iterator

import pytest
import torch

from pat.training.preflight import threads


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have torch use two threads, a number that no environment variable has chosen."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
