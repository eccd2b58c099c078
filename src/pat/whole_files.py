"""Files that appear complete or not at all, whenever a run ends."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from pathlib import Path

STAGED = ".tmp-"
"""Part of the name of everything that is being written or removed: `.NAME.tmp-…`."""


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}{STAGED}{secrets.token_hex(4)}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that know no such thing
            raise
    finally:
        os.close(descriptor)
