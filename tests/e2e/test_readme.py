"""The README is short and whole; its commands and snippets are run by `test_snippets.py`."""

from __future__ import annotations

import re
from pathlib import Path

from pat.cli import COMMANDS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_commands_is_complete() -> None:
    assert set(re.findall(r"^\| \[?`pat (\w+)`", README, flags=re.MULTILINE)) == {*COMMANDS, "launch"}


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(re.sub(r"```.*?```", "", README, flags=re.DOTALL).split()) <= 900
    root = Path(__file__).parents[2]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and not [link for link in links if not (root / link).exists()]
