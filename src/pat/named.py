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
"""Begins the name of a dataset that is made of tasks' questions."""

FILE_SUFFIXES = {*READERS, *DECOMPRESSORS, ".txt", ".arrow", ".xlsx", ".zip", ".yaml", ".yml"}
"""What ends in one of these is meant as a file even where there is none: no reason to ask the hub."""


PUBLISHED = "an adapter of the published code"


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


def check_dataset(name: str) -> None:
    """Check that a local file or folder is there, before others are read.

    Raises:
        PatError: there is no such file or folder.
    """
    path = Path(expand(name))
    is_meant = looks_local(name) or path.suffix.lower() in FILE_SUFFIXES
    # A misspelt ending beside a file that is there: the hub would be asked for half a minute where it is out of reach.
    is_meant = is_meant or bool(path.suffix and path.parent == Path() and near(path, folder=False))
    if is_meant and not name.startswith(TASK_PREFIX) and not os.path.exists(path):
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
"""How each kind of thing that an option names is looked for, see `pat.option.Option.names`."""
