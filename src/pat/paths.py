"""Names as a user writes them: hub ids, and paths in which `~` is the home folder."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any


def expand(name: str) -> str:
    """Return a path with the home folder in place of a leading `~`; no hub id begins with one."""
    return os.path.expanduser(name)


def expand_options(options: Any) -> None:
    """Expand `~` in every option of a dataclass that is a text or a path."""
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, str | Path):
            object.__setattr__(options, field.name, type(value)(expand(str(value))))  # some are frozen


def looks_local(name: str) -> bool:
    """Tell whether a name can only be that of a folder, because no hub id is written so."""
    return os.path.isabs(expand(name)) or name.startswith(".") or name.count("/") > 1
