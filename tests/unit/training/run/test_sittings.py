"""Seconds of a run over its sittings: they are those beside the checkpoint that it goes on from."""

import logging
from pathlib import Path

import pytest

from pat.training.run.sittings import SECONDS, Clock, write_seconds


def test_a_clock_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    write_seconds(tmp_path, {"preparation": 2.0, "stage_one": 100.0})
    clock = Clock()
    clock.add("preparation", 1.0)
    clock.go_on(str(tmp_path))
    with clock.timing("stage_one"):
        assert 100 <= clock.seconds()["stage_one"] < 200
    assert clock.seconds().keys() == {"preparation", "stage_one"} and clock.seconds()["preparation"] == 3
    with pytest.raises(ZeroDivisionError), clock.timing("compaction"):
        _ = 1 / 0
    assert "compaction" not in clock.seconds()


@pytest.mark.parametrize(
    "content",
    [
        None,
        '{"stage_one": 1',
        "[1]",
        '{"stage_one": 1, "stage_two": null}',
        '{"stage_one": 1, "stage_two": NaN}',
        f'{{"stage_one": 1{"0" * 400}}}',
    ],
)
def test_a_checkpoint_without_seconds_is_gone_on_from_with_a_warning(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if content is not None:
        (tmp_path / SECONDS).write_text(content)
    clock = Clock()
    with caplog.at_level(logging.WARNING):
        clock.go_on(None)
        assert not caplog.records
        clock.go_on(str(tmp_path))
    assert clock.seconds() == {} and "its timings are of what follows" in caplog.text
