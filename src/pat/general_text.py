"""Text that has nothing to do with the training data: a file of the user's, or four pages of the package's own."""

from __future__ import annotations

import logging
import os
from importlib import resources
from pathlib import Path

from pat.nll import read_text

logger = logging.getLogger(__name__)

_FILE = "general.txt"
"""File of the package's own text: prose, talk, a recipe, code, tables, figures, and a line in four other languages."""


def general_text(file: str | os.PathLike[str] | None = None, *, max_characters: int | None = None) -> str:
    """Return the package's own text, or that of a file as far as a number of characters; what is left out is logged.

    Raises:
        PatError: file missing, not UTF-8 or empty.
    """
    if file is None:
        return resources.files("pat").joinpath(_FILE).read_text(encoding="utf-8")
    text = read_text(Path(file))
    if max_characters is not None and len(text) > max_characters:
        logger.warning("%s: the first %s of its %s characters are used.", file, f"{max_characters:,}", f"{len(text):,}")
    return text[:max_characters]
