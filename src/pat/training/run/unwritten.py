"""Explains in one line that a file of a run could not be written, such as on a disk that is full or read-only."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from pat.errors import RunFailed, one_line
from pat.paths import is_inside

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def writing_failed(error: Exception, folder: Path) -> RunFailed | None:
    """Return the error of a file in the folder that could not be written; None if it is of another kind."""
    path: Any = None
    if isinstance(error, OSError):
        path, reason = error.filename, error.strerror
        if error.errno not in _DISK and not (isinstance(path, str) and is_inside(path, folder)):
            return None
    else:  # of safetensors' or torch's own writers, which name neither file nor error number
        reason = one_line(error)
        if not any(words in reason for words in ("while serializing", "PytorchStreamWriter", "inline_container")):
            return None
    if not isinstance(path, str):
        files = [file for file in folder.rglob("*") if file.is_file()]
        path = max(files, key=lambda file: file.stat().st_mtime_ns, default=folder)
    return RunFailed(
        f"{path}: could not be written ({reason}); put that right, and give the same command again to go on."
    )
