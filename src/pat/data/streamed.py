"""A source that is read while training goes on; its first rows say what it is, and some of them are held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

from datasets import Dataset

from pat.data.conversion import PLACE, ROW, ROWS_LOOKED_AT, Conversion, Reading, Source, look_at
from pat.data.files import data_files, fingerprint_of, has_own_loading, is_saved, load_saved, say_unread
from pat.data.sources import load_from_hub
from pat.data.tables import labels_of
from pat.errors import PatError, RunFailed, reason_of
from pat.named import means_file
from pat.readers import Placed, Row, iterate_local, row_of_table
from pat.report.progress import Phase

END_BYTES = 2**20
"""Bytes at each end of a file by which it is known again; to read all of it would take minutes."""


@dataclass(frozen=True)
class StreamedSource:
    """A source whose rows are read from the beginning as often as that is asked for."""

    name: str
    placed: Callable[[], Iterable[Placed]]
    reading: Reading
    columns: dict[str, None]
    """Columns of the rows that were looked at."""
    first: Row
    num_held_out: int
    """Number of rows with a response, from the first on, that are not trained on."""

    def conversion(self) -> Conversion:
        """Return a conversion of all rows."""
        return Conversion(
            self.name, self.placed, self.reading, dict(self.columns), self.first, Phase("Reading", "rows"), goes_on=True
        )

    def examples(self, conversion: Conversion) -> Iterator[dict[str, Any]]:
        """Yield the examples to train on that a conversion of this source makes."""
        return (example for example in conversion.examples() if example[ROW] >= self.num_held_out)


def open_source(
    name: str, reading: Reading, num_held_out: int, *, split: str = "train", config_name: str | None = None
) -> tuple[StreamedSource, Source, Dataset | None]:
    """Open a source that is streamed, and read its first rows.

    Returns:
        It; a source of the first examples to train on, those of about a thousand rows; and those that are held out.

    Raises:
        PatError: there is no such source, one of its first rows cannot be used, or they have no known format; or there
            are too few to hold so many out.
    """
    placed, fingerprint = _open(name, reading, split, config_name)
    columns, first = look_at(islice(placed(), ROWS_LOOKED_AT), reading.skips)
    if not columns:
        raise PatError(f"{name}: none of its first {ROWS_LOOKED_AT:,} rows is one that can be used.")
    source = StreamedSource(name, placed, reading, columns, first, num_held_out)
    conversion = source.conversion()
    end = num_held_out + ROWS_LOOKED_AT
    examples = list(takewhile(lambda example: example[ROW] < end, conversion.stored()))
    if not examples or examples[-1][ROW] < num_held_out:
        raise PatError(
            f"{name}: has {conversion.num_usable:,} usable rows, and the first {num_held_out:,} are to be held out; "
            "expected more of them, or a smaller --held_out."
        )
    apart = [example for example in examples if example[ROW] < num_held_out]
    head = Dataset.from_list(examples[len(apart) :], conversion.features)
    return (
        source,
        Source(head, **conversion.facts(fingerprint(examples))),
        Dataset.from_list(apart, conversion.features) if apart else None,
    )


def _open(
    name: str, reading: Reading, split: str, config_name: str | None
) -> tuple[Callable[[], Iterable[Placed]], Callable[[list[Any]], str]]:
    """Return what gives the rows of a source anew each time, and what gives its fingerprint, by its first examples."""
    path = Path(name).expanduser()
    if os.path.isdir(path):
        if is_saved(path):
            stored = _part(name, load_saved(path), split)
            return lambda: _rows(name, stored), lambda _: f"datasets:{stored._fingerprint}"
        if config_name is None and not has_own_loading(path):
            splits = data_files(path)
            read = _part(name, splits, split)
            say_unread(path, read)
            return lambda: chain.from_iterable(map(iterate_local, read)), lambda _: fingerprint_of(read, _ends)
    elif os.path.exists(path) or means_file(name):
        if split != "train":
            raise PatError(f"{name}: got split {split!r}; a file is one split, 'train'.")
        return lambda: iterate_local(path), lambda _: _ends(path)
    dataset = load_from_hub(name, reading, split, config_name, streaming=True)
    return lambda: _rows(name, dataset), _of_first


def _part(name: str, parts: dict[str, Any], split: str) -> Any:
    if split not in parts:
        raise PatError(f"{name}: got split {split!r}; expected one of {', '.join(map(str, parts))}.")
    return parts[split]


def _of_first(examples: list[Any]) -> str:
    """Return a digest of what examples say, wherever they lie."""
    told = [{key: value for key, value in example.items() if key not in (PLACE, ROW)} for example in examples]
    return f"first:{hashlib.sha256(repr(told).encode()).hexdigest()}"


def _rows(name: str, dataset: Any) -> Iterator[Placed]:
    """Yield the rows of what `datasets` streams."""
    number, labels = 0, labels_of(dataset.features)
    try:
        for number, row in enumerate(dataset, start=1):
            yield f"{name}, row {number}", row_of_table(row, labels)
    except Exception as error:  # whatever its parsers, file systems and HTTP client raise
        kind = RunFailed if number else PatError
        raise kind(f"{name}: could not be read after row {number:,} ({reason_of(error)}).") from error
    if not number:
        raise PatError(f"{name} has no rows; expected at least one example.")


def _ends(path: Path) -> str:
    """Return a digest of a file's size and both its ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = [file.read(END_BYTES)]
        file.seek(max(END_BYTES, size - END_BYTES))
        ends.append(file.read())
    return f"ends:{hashlib.sha256(b''.join(chain([str(size).encode()], ends))).hexdigest()}"
