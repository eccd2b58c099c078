"""Snippets of a Markdown page: what README and docs show is run by tests, or marked as not run, with the reason."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)

RUN = ("bash", "python")
"""Languages of what is run; others are files and texts that are shown."""


@dataclass(frozen=True)
class Snippet:
    """One fenced block. `<!-- not run: REASON -->` in the line before it says that no test runs it."""

    page: Path
    language: str
    text: str
    reason: str | None

    def shell_lines(self) -> list[str]:
        """Return its command lines; one that ends in a backslash goes on in the next."""
        lines = self.text.replace("\\\n", " ").splitlines() if self.language == "bash" else []
        return [line for line in lines if line.strip()]

    def commands(self) -> list[list[str]]:
        """Return the arguments of each `pat` command in it."""
        return [shlex.split(line, comments=True)[1:] for line in self.shell_lines() if line.startswith("pat ")]


def snippets(page: Path) -> list[Snippet]:
    """Return the snippets of a page that are run, and those that are marked."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Snippet(page, m["language"], m["text"], m["reason"]) for m in found if m["language"] in RUN]
