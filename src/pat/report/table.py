"""One table, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class Table:
    """Cells of text under headings; numbers are formatted by who makes the table."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text_columns: int = 1
    """Number of columns from the left that hold text; the others hold numbers and are aligned to the right."""
    num_totals: int = 0
    """Number of rows from the end that are set apart on the terminal."""

    def print(self, *, file: TextIO | None = None) -> None:
        """Print it, on standard output if no other file is given."""
        from rich import table
        from rich.console import Console
        from rich.text import Text

        only_text = self.num_text_columns >= len(self.columns)
        drawn = table.Table(
            title=Text(self.title, "italic") if self.title else None, title_justify="left", show_lines=only_text
        )
        for index, heading in enumerate(self.columns):
            is_text = index < self.num_text_columns
            # Words may stand below each other where there is little room; no_wrap would cut digits off and not say so.
            drawn.add_column(heading, justify="left" if is_text else "right", overflow="fold")
        for number, row in enumerate(self.rows, start=1):
            drawn.add_row(*map(Text, row), end_section=number == len(self.rows) - self.num_totals)
        Console(file=file).print(drawn)

    def to_markdown(self) -> str:
        """Return it in Markdown, without the title."""
        rule = [("---" if index < self.num_text_columns else "---:") for index in range(len(self.columns))]
        lines = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (self.columns, *self.rows))
        heading, *rows = (f"| {' | '.join(cells)} |" for cells in lines)
        return "\n".join([heading, f"| {' | '.join(rule)} |", *rows])
