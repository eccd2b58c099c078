"""What is seen while something takes time: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time

import pytest
from terminal import Terminal

from pat.report import progress


def test_a_terminal_has_one_live_line_that_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with Terminal(monkeypatch) as terminal:
        logger, handler = logging.getLogger("transformers"), logging.StreamHandler()  # remembers the terminal
        logger.addHandler(handler)
        try:
            with progress.phase("Outer", "parts", total=3) as outer:
                for _ in outer.over(range(3)):
                    with progress.phase("Inner " + 20 * "long "):
                        time.sleep(0.3)
                        logger.error("a warning")
                        print("printed", file=sys.stderr)
                    time.sleep(0.3)
            assert progress.current() == ""
            print("end", file=sys.stderr)
            assert handler.stream is sys.stderr
            logger.removeHandler(handler)
            with progress.phase("Loading"):
                logger.addHandler(handler := logging.StreamHandler())  # a library that is imported meanwhile
            assert handler.stream is sys.stderr
        finally:
            logger.removeHandler(handler)
    assert terminal.screen() == [*["a warning", "printed"] * 3, "end"]
    assert any(state.startswith("Inner long") for state in terminal.states)
    assert any(state.startswith("Outer: 2 of 3 parts, 0:0") and state.endswith(" left") for state in terminal.states)
    assert max(map(len, terminal.states)) <= Terminal.columns


def test_an_error_ends_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with Terminal(monkeypatch) as terminal:
        with pytest.raises(ValueError, match="wrong"), progress.phase("Work"), progress.phase("Part"):
            raise ValueError("wrong")
        print("pat: wrong", file=sys.stderr)
    assert terminal.screen() == ["pat: wrong"]


def test_elsewhere_there_are_plain_lines_of_what_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.3)
    with progress.phase("Short"):
        pass
    with progress.phase("Outer"), progress.progress_bar("Rows", "rows") as advance:
        advance(1_000, 4_000)
        time.sleep(1.5)
    with progress.hidden(), progress.phase("Hidden"):
        time.sleep(1.2)
    lines = capsys.readouterr().err
    assert "\r" not in lines and "\x1b" not in lines
    assert lines.splitlines()[0].startswith("Rows: 1,000 of 4,000 rows, 0:0")
    assert len(lines.splitlines()) >= 2 and all(line.startswith("Rows") for line in lines.splitlines())


@pytest.mark.parametrize(
    ("seconds", "text", "with_hours"),
    [(0.4, "0:00", "0:00:00"), (62, "1:02", "0:01:02"), (3_723, "1:02:03", "1:02:03")],
)
def test_durations(seconds: float, text: str, with_hours: str) -> None:
    assert progress.clock(seconds) == text
    assert progress.clock(seconds, hours=True) == with_hours


def test_a_total_that_may_not_be_reached_is_called_so() -> None:
    state = progress.Phase("Measuring", "tokens", total=2000)
    state.is_most, state.done = True, 1000
    assert state.text() == "Measuring: 1,000 of up to 2,000 tokens, at most 0:00 left"


def test_none_of_an_unknown_number_is_not_said() -> None:
    state = progress.Phase("Scoring", "batches")
    assert state.text() == "Scoring, 0:00"
    state.done = 1
    assert state.text() == "Scoring: 1 batches, 0:00"


def test_what_was_expected_gives_way_to_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first small part that took long does not stand for all: 20 seconds for a twentieth would make 380 more."""
    now = 50.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    state = progress.Phase("Measuring", "shapes", total=13)
    now = 100.0  # until it is known how long it takes
    state.expect(120)
    assert state.text() == "Measuring: 0 of 13 shapes, 2:00 left"
    now, state.done, state.share = 120.0, 1, 0.05
    assert state.text() == "Measuring: 1 of 13 shapes, 2:07 left"
    now, state.done, state.share = 300.0, 12, 0.9
    assert state.text() == "Measuring: 12 of 13 shapes, 0:21 left"  # 22 seconds at the pace until then
