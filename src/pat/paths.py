"""Names as a user writes them: hub ids, and paths in which `~` is the home folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from pat.errors import PatError

MOST_NAMES = 5_000
"""Number of names in a folder that are compared with a missing one."""


def expand(name: str) -> str:
    """Return a path with the home folder in place of a leading `~`; no hub id begins with one."""
    return os.path.expanduser(name)


def expand_options(options: Any) -> None:
    """Expand `~` in every option of a dataclass that is a text or a path, or a list of them."""
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, str | Path):
            object.__setattr__(options, field.name, type(value)(expand(str(value))))  # some are frozen
        elif isinstance(value, list):
            expanded = [expand(item) if isinstance(item, str) else item for item in value]
            object.__setattr__(options, field.name, expanded)


def check_writable(path: Path) -> None:
    """Refuse a file or folder that could not be written in the end; nothing is left behind.

    Raises:
        PatError: it cannot be written.
    """
    import tempfile  # takes longer than all else that `pat --help` imports

    try:
        # A link to nowhere is no folder to write in, nor one that could be made.
        folder = next((parent for parent in path.absolute().parents if parent.exists() or parent.is_symlink()), path)
        if path.is_dir():
            tempfile.TemporaryFile(dir=path).close()
        elif path.exists():
            os.close(os.open(path, os.O_WRONLY))
        else:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PatError(f"{_shortened(path)}: cannot be written ({error.strerror}); give another place.") from error


def _shortened(path: Path) -> str:
    """Return a path with room for the rest of a message; a name may be longer than any file's."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:300]}…"


def looks_local(name: str) -> bool:
    """Tell whether a name can only be that of a folder, because no hub id is written so."""
    return os.path.isabs(expand(name)) or name.startswith(".") or name.count("/") > 1


def head_holds(path: Path, marks: Iterable[bytes], num_bytes: int) -> bool:
    """Tell whether a file can be read and holds one of several marks in its first bytes.

    Args:
        path: of the file.
        marks: of which one is enough.
        num_bytes: number of bytes that are looked at.
    """
    try:
        with path.open("rb") as file:
            start = file.read(num_bytes)
    except OSError:
        return False
    return any(mark in start for mark in marks)


def near(name: str | Path, *, folder: bool | None = None) -> str:
    """Return names that are like that of a missing file or folder, and are there, for a message; empty without any.

    Args:
        name: what is not there.
        folder: whether a folder (True) or a file (False) is wanted; None for either.

    Returns:
        ` (did you mean PATH?)`, with up to two paths, relative where the missing one is; a leading `~` is written out.
    """
    path = Path(expand(str(name)))
    try:
        missing = [part for part in (path, *path.parents) if not os.path.exists(part)]
        if not missing or not missing[-1].name:
            return ""
        first = missing[-1]
        with os.scandir(first.parent) as entries:
            names = [entry.name for entry in islice(entries, MOST_NAMES) if entry.name.isprintable()]
        alike = [other for other in names if Path(other).stem == first.name or other.lower() == first.name.lower()]
        alike += [other for other in get_close_matches(first.name, names, n=5) if other not in alike]
        found = [first.with_name(other) / path.relative_to(first) for other in alike]
        there = [str(each) for each in found if os.path.exists(each) and folder in (None, os.path.isdir(each))]
    except (OSError, ValueError):  # a folder that cannot be listed, or a name that no file can have
        return ""
    return f" (did you mean {' or '.join(there[:2])}?)" if there else ""


def is_inside(path: str | None, folder: Path) -> bool:
    """Tell whether a path, wherever links lead, is a folder or lies below it; None is nowhere."""
    return path is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
