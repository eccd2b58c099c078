"""One table for the terminal and for Markdown."""

import pytest

from pat.report.table import Table

TABLE = Table("Sizes [of all]", ("part", "base"), [("a|b", "1"), ("[bold]total", "2")], num_totals=1)


def test_markdown_aligns_numbers_to_the_right_and_keeps_cells_apart() -> None:
    assert TABLE.to_markdown() == "| part | base |\n| --- | ---: |\n| a\\|b | 1 |\n| [bold]total | 2 |"


def test_the_terminal_shows_text_as_it_is_and_sets_totals_apart(capsys: pytest.CaptureFixture[str]) -> None:
    TABLE.print()
    lines = capsys.readouterr().out.splitlines()
    assert "[of all]" in "".join(lines[:2])
    assert [line for line in lines if "a|b" in line] and [line for line in lines if "[bold]total" in line]
    assert lines.index(next(line for line in lines if line.startswith("├"))) == len(lines) - 3
