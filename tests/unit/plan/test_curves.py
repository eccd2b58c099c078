"""Tests of the table of measured shapes, and of curves between their points."""

from __future__ import annotations

from pathlib import Path

import pytest

from pat.errors import PatError
from pat.plan.curves import Measured, Point, interpolated, print_measured
from pat.plan.figure import draw
from pat.report.figure import check_figure

A, B = {"pruned_intermediate_size": 104}, {"pruned_hidden_size": 56}


def measured(*candidates: Point, default: dict[str, int]) -> Measured:
    return Measured("data.jsonl", 8000, 2000, 4.0, {}, candidates, default)


def test_a_gain_of_a_cut_is_shown_as_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    noise, fitted = Point(A, 0.25, 3.9, difference_error=0.06), Point(B, 0.25, 3.8, difference_error=0.06)
    print_measured(measured(noise, default=A))
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "−0.100 ± 0.060" in printed and "(within 2 standard errors of 0, ±): --pruned_intermediate_size 104." in printed
    )
    assert "no gain" not in printed
    print_measured(measured(noise, fitted, default=A))
    printed = " ".join(capsys.readouterr().out.split())
    assert "A loss below the base's is no gain of the cut" in printed
    print_measured(measured(Point(A, 0.25, 4.5, difference_error=0.06), default=A))
    printed = capsys.readouterr().out
    assert "Not told apart" not in printed and "no gain" not in printed and "Predicted" not in printed


def test_between_points_a_curve_is_straight() -> None:
    points = (Point({"a": 2}, 0.1, 3.0), Point({"a": 1}, 0.3, 4.0))
    assert interpolated(points, 2.5, 0.05) == pytest.approx(0.25)
    assert interpolated(points, 2.5, 0.2) == pytest.approx(1.0)
    assert interpolated(points, 2.5, 0.6) == pytest.approx(3.0)


def test_a_figure_is_drawn_over_an_earlier_one_and_over_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    draw(Measured("data.jsonl", 8000, 2000, 4.0, {"mlp": (Point({}, 0.25, 4.5),)}, (), {}), "title", path)
    check_figure(path)
    foreign = path.read_bytes().replace(b"pat plan", b"gnu plot")
    path.write_bytes(foreign)
    with pytest.raises(PatError, match="exists and is no figure of `pat plan`"):
        check_figure(path)
    assert path.read_bytes() == foreign
