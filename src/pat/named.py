"""Models, datasets and adapters that are named: what can only be local is looked for before any large import."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pat.errors import PatError
from pat.paths import expand, looks_local, near
from pat.readers import DECOMPRESSORS, READERS, iterate_local

TASK_PREFIX = "task:"
"""Beginning of the name of a dataset that is made of tasks' questions."""

PUBLISHED = "an adapter of the published code"
"""Words for an adapter that `pat convert` reads."""

_FILE_SUFFIXES = {*READERS, *DECOMPRESSORS, ".txt", ".arrow", ".xlsx", ".zip", ".yaml", ".yml"}
"""Suffixes that only names of files have. The hub is not asked for such a name, even where no file has it."""


def check_model(name_or_path: str) -> str:
    """Return a hub id or the path of a folder that exists; what can only be a path never goes to the hub.

    Raises:
        PatError: there is no such folder.
    """
    path = Path(expand(name_or_path))
    if (looks_local(name_or_path) and not os.path.isdir(path)) or os.path.isfile(path):
        raise PatError(
            f"Got the model {name_or_path!r}, but there is no such folder{near(path, folder=True)}; expected a model "
            "folder or a hub id."
        )
    return expand(name_or_path)


def means_file(name: str) -> bool:
    """Tell whether the name of a dataset can only be that of a file or folder, because no hub id is written so."""
    return looks_local(name) or Path(name).suffix.lower() in _FILE_SUFFIXES


def check_dataset(name: str) -> None:
    """Check that a local file or folder is there, before others are read.

    Raises:
        PatError: there is no such file or folder.
    """
    path = Path(expand(name))
    # For a misspelt ending beside the file the hub would be asked for half a minute where it is out of reach.
    is_misspelt = bool(path.suffix) and path.parent == Path() and bool(near(path, folder=False))
    if (means_file(name) or is_misspelt) and not name.startswith(TASK_PREFIX) and not os.path.exists(path):
        next(iterate_local(path))  # says so


def check_adapter(name: str | os.PathLike[str], kind: str = "a PAT adapter") -> Path:
    """Return the folder of an adapter, which exists.

    Args:
        name: of the folder.
        kind: of adapter, for the message.

    Raises:
        PatError: there is no such folder.
    """
    path = Path(expand(str(name)))
    if not os.path.isdir(path):
        raise PatError(f"{name}: no such folder{near(path, folder=True)}; expected the folder of {kind}.")
    return path


CHECKS: Mapping[str, Callable[[str], object]] = {
    "model": check_model,
    "dataset": check_dataset,
    "adapter": check_adapter,
    "published adapter": partial(check_adapter, kind=PUBLISHED),
}
"""Functions that look for what an option names, by the kind of it; see `pat.option.Option.names`."""
