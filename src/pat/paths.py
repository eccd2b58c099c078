"""Names as a user writes them: hub ids, and paths in which `~` is the home folder."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from pat.errors import PatError


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


def is_inside(path: str | None, folder: Path) -> bool:
    """Tell whether a path, wherever links lead, is a folder or lies below it; None is nowhere."""
    return path is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
