"""Processes by name that nobody has connected are not taken for one run."""

import pytest

from pat import ranks
from pat.errors import PatError


def test_processes_that_are_not_connected_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PatError, match="WORLD_SIZE=2, but the processes are not connected"):
        ranks.meet()
