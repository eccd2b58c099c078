"""Tables that do not fit into memory: written to Arrow files a few rows at a time, and opened as memory maps.

What it costs to make a table is paid once: finished tables lie in the cache of `datasets`, under the digest of
everything that they are made of. Each is a folder that appears whole or not at all, and knows the sizes of its files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import datasets
import pyarrow
from datasets import ClassLabel, Dataset, Features, concatenate_datasets

from pat.checkpoint.staging import discard, staged_folder
from pat.errors import PatError, RunFailed, one_line
from pat.report.records import installed_versions

try:
    import fcntl
except ImportError:  # on Windows, where an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

ROWS_AT_ONCE = 1000
"""Rows in memory while a table is written or looked through."""

CACHE_BYTES = 20 * 2**30
"""What the cache may hold: beyond it the tables go that were not used for longest."""

FORM = 5
"""Goes up when other code makes other tables of the same parts."""

FACTS = "facts.json"

_held: dict[Path, IO[str]] = {}
"""Tables that this process has opened: their facts, under a lock that others share, until the process ends."""


def digest(*parts: Any) -> str:
    """Return the name of a table that is made of these parts, by these versions of the libraries."""
    made_by = [FORM, installed_versions()]
    return hashlib.sha256(json.dumps([made_by, *parts], sort_keys=True, default=str).encode()).hexdigest()[:32]


def cached_table(key: str, make: Callable[[Path], dict[str, Any]]) -> tuple[Dataset, dict[str, Any]]:
    """Return the table of a key and what is known of it, from the cache if a whole one is there.

    Otherwise it is made: `make` writes its Arrow files into a folder, and returns what is to be known of them.

    Raises:
        RunFailed: its files cannot be written.
    """
    folder = cache_folder() / key
    if (facts := _facts(folder)) is None:
        facts = _made(folder, make)
    _hold(folder)
    _remove_oldest(folder.parent)
    files = sorted(facts["sizes"])
    return concatenate_datasets([Dataset.from_file(str(folder / name)) for name in files]), facts["facts"]


def _made(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Make a table and return its facts; if another process is faster with the same one, take that, which it uses."""
    try:
        with suppress(FileNotFoundError):  # another process may do so at the same moment
            discard(folder)  # not whole
        with staged_folder(folder) as staging:
            found = make(staging)
            sizes = {file.name: file.stat().st_size for file in sorted(staging.glob("*.arrow"))}
            (staging / FACTS).write_text(json.dumps({"sizes": sizes, "facts": found}), encoding="utf-8")
    except (OSError, PatError) as error:
        if (facts := _facts(folder)) is not None:  # a folder that is not empty is not replaced
            return facts
        if isinstance(error, PatError):  # errors of reading the data have been put into words
            raise
        raise RunFailed(
            f"{folder.parent}: a table of the data could not be written ({one_line(error)}); make room there, or "
            "set HF_DATASETS_CACHE to another folder, and give the same command again."
        ) from error
    facts = _facts(folder)
    assert facts is not None
    return facts


@cache
def cache_folder() -> Path:
    """Return the folder of the tables; where it cannot be written, one that goes when the process ends."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "pat"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryDirectory(dir=folder).cleanup()
    except OSError:
        return Path(_temporary().name)
    return folder


@cache
def _temporary() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="pat-")


def write_table(path: Path, features: Features, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows, which are in the form that Arrow stores, to an Arrow file; return how many there were."""
    num_rows = 0
    with pyarrow.ipc.new_stream(str(path), features.arrow_schema) as stream:
        rows = iter(rows)
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            stream.write_table(Dataset.from_list(batch, features).with_format("arrow")[:])
            num_rows += len(batch)
    return num_rows


def batches_of(dataset: Dataset, columns: Sequence[str]) -> Iterator[pyarrow.Table]:
    """Yield some columns of a whole table, of which no rows are selected, a few rows at a time.

    Files are read and not mapped: every page of a map that was looked at counts as memory of the process.
    """
    if not is_on_disk(dataset):
        yield from dataset.select_columns(list(columns)).with_format("arrow").iter(ROWS_AT_ONCE)
        return
    for file in dataset.cache_files:
        with pyarrow.OSFile(file["filename"]) as source, pyarrow.ipc.open_stream(source) as stream:
            for batch in stream:
                yield pyarrow.Table.from_batches([batch]).select(list(columns))


def labels_of(features: Features | None) -> dict[str, list[str]]:
    """Return the names of the values of each column that holds labels as numbers."""
    return {name: list(kind.names) for name, kind in (features or {}).items() if isinstance(kind, ClassLabel)}


def is_on_disk(dataset: Dataset) -> bool:
    """Tell whether a table is a map of files."""
    return bool(dataset.cache_files)


def _facts(folder: Path) -> dict[str, Any] | None:
    """Return what a table in the cache says of itself; None if there is none, or it is not whole."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["sizes"] and all((folder / name).stat().st_size == size for name, size in facts["sizes"].items()):
            return facts
    return None


def _hold(folder: Path) -> None:
    """Keep a table from being removed while this process lives, and note that it is used."""
    with suppress(OSError):  # gone a moment ago, or on a file system without locks: what is mapped stays readable
        (folder / FACTS).touch()
        held = (folder / FACTS).open(encoding="utf-8")
        _held[folder] = held
        if fcntl is not None:
            fcntl.flock(held, fcntl.LOCK_SH)


def _is_in_use(folder: Path) -> bool:
    """Tell whether a process, this one included, has opened a table."""
    if folder in _held or fcntl is None:
        return folder in _held
    try:
        with (folder / FACTS).open(encoding="utf-8") as facts:
            fcntl.flock(facts, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _remove_oldest(cache: Path) -> None:
    """Remove the tables that were not used for longest and are not in use, until the others have room."""
    used: dict[Path, float] = {}
    for folder in cache.iterdir():
        with suppress(OSError):
            used[folder] = (folder / FACTS).stat().st_mtime
    left = CACHE_BYTES
    for folder in sorted(used, key=lambda path: (path in _held, used[path]), reverse=True):
        with suppress(OSError):
            left -= sum(file.stat().st_size for file in folder.iterdir())
            if left < 0 and not _is_in_use(folder):
                discard(folder)
