"""Hooks of mkdocs: every decision has its page, and what lies outside of this folder is named and not linked."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> None:
    """Put the decisions at the end of the navigation; their titles are their headings."""
    folder = Path(config["docs_dir"])
    pages = sorted(page.relative_to(folder).as_posix() for page in (folder / "adr").glob("[0-9]*.md"))
    config["nav"].append({"Decisions": [page for page in pages if not page.startswith("adr/0000")]})


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Take links out of the folder apart, and leave their words."""
    folder = posixpath.dirname(page.file.src_uri)

    def put(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        return match[1] if target.startswith("..") else match[0]

    return LINK.sub(put, markdown)
