"""Whether figures can be drawn."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from pat.errors import PatError
from pat.paths import check_writable

MISSING = "No figure was drawn, because matplotlib is not installed: pip install 'pat-llm[figures]'."


def can_draw() -> bool:
    """Tell whether matplotlib, an optional dependency, is installed."""
    return find_spec("matplotlib") is not None


def check_figure(path: Path) -> None:
    """Check that a figure can be drawn into a file before anything is measured for it.

    Raises:
        PatError: matplotlib is missing, it is no PNG file, or it cannot be written there.
    """
    if not can_draw():
        raise PatError(f"Got figure={path}, but matplotlib is not installed: pip install 'pat-llm[figures]'.")
    if path.suffix.lower() != ".png" or os.path.isdir(path) or not os.path.isdir(path.absolute().parent):
        raise PatError(f"Got figure={path}; expected a .png file in a folder that is there.")
    check_writable(path)
