"""A hook of mkdocs: what lies outside of this folder is named and not linked, since the site does not have it."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Take links out of the folder apart, and leave their words."""
    folder = posixpath.dirname(page.file.src_uri)

    def put(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        return match[1] if target.startswith("..") else match[0]

    return LINK.sub(put, markdown)
