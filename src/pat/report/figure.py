"""Whether figures can be drawn."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from pat.errors import PatError
from pat.paths import check_writable, head_holds

MISSING = "No figure was drawn, because matplotlib is not installed: pip install 'pat-llm[figures]'."

MARK = {"Software": "pat plan"}
"""Metadata by which a figure is recognised as one of `pat plan`."""

_HEAD = 2**12
"""Bytes of a PNG file that hold its metadata."""


def can_draw() -> bool:
    """Tell whether matplotlib, an optional dependency, is installed."""
    return find_spec("matplotlib") is not None


def check_figure(path: Path) -> None:
    """Check that a figure can be drawn into a file before anything is measured for it.

    Raises:
        PatError: matplotlib is missing, it is no PNG file, it cannot be written there, or another file would be lost.
    """
    if not can_draw():
        raise PatError(f"Got figure={path}, but matplotlib is not installed: pip install 'pat-llm[figures]'.")
    if path.suffix.lower() != ".png" or os.path.isdir(path) or not os.path.isdir(path.absolute().parent):
        raise PatError(f"Got figure={path}; expected a .png file in a folder that is there.")
    check_writable(path)
    if os.path.isfile(path) and os.path.getsize(path) and not _is_figure(path):
        raise PatError(
            f"Got figure={path}, which exists and is no figure of `pat plan`; give another name, or move it away first."
        )


def _is_figure(path: Path) -> bool:
    """Tell whether a file can be read and is a figure that is marked as ours; those of earlier versions are not."""
    return head_holds(path, [b"Software\0" + MARK["Software"].encode()], _HEAD)
