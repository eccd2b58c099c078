"""Local data files as rows that still know on which line of the file they stand."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow.parquet

from pat.errors import PatError
from pat.paths import near
from pat.strict_json import DECODER, RepeatedField

Row = dict[str, Any]

CELL_LIMIT = 2**31 - 1
"""Letters of a CSV cell; by default the csv module refuses more than 131,072 of them."""

ROWS_AT_ONCE = 1000
"""Rows of a parquet file in memory."""

LISTS_OF_ONE_ROW = {"messages", "conversations", "conversation", "prompt", "completion", "tools"}
"""Lists of objects under these names belong to one row; under any other name a list of objects is the data."""

_DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
_DEEP = re.compile(r"(?:[\[{][^\[\]{}]*){99}")


Placed = tuple[str, "Row | PatError"]
"""Where a row stands, as in `data.jsonl, line 3`, and the row, or what is wrong with it."""


def iterate_local(path: Path) -> Iterator[Placed]:
    """Yield the rows of a data file, compressed or not, as they are read: no more than a few are in memory.

    A JSON file that is one list is read whole. A row that is wrong by itself, so that those behind it can be read, is
    yielded as the error that says so.

    Raises:
        PatError: no such file, another suffix, no rows, or not readable as what the suffix says (with the line).
    """
    if not os.path.isfile(path):
        raise PatError(f"{path}: no such file{near(path)}; expected a hub dataset id, a folder or a file ({SUFFIXES}).")
    suffix = data_suffix(path)
    if suffix not in READERS:
        raise PatError(f"{path}: got suffix {suffix!r}, expected one of {SUFFIXES}; convert the file.")
    has_rows = False
    try:
        for placed in READERS[suffix](path):
            has_rows = True
            yield placed
    except PatError:
        raise
    except _DAMAGED as error:
        what = "a parquet file" if suffix == ".parquet" else "UTF-8 text"
        raise PatError(f"{path}: not readable ({' '.join(str(error).split())}); expected {what}.") from error
    if not has_rows:
        raise PatError(f"{path} has no rows; expected at least one example.")


def good_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a data file, each of which has to be good.

    Raises:
        PatError: see `iterate_local`, or what is wrong with a row.
    """
    for place, row in iterate_local(path):
        if isinstance(row, PatError):
            raise row
        yield place, row


def file_fingerprint(path: Path) -> str:
    """Return the digest of a file's bytes."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def data_suffix(path: Path) -> str:
    """Return the suffix that says what a file holds, which stands before that of its compression."""
    return Path(path.stem if path.suffix.lower() in DECOMPRESSORS else path.name).suffix.lower()


def row_of_table(row: Row, labels: Mapping[str, Sequence[str]] | None = None) -> Row:
    """Return a row of a table as it is meant: labels by their names, and no nulls within its objects.

    A table gives each object the fields of all; a cell stays null.

    Args:
        row: of the table.
        labels: names of the values of columns that hold them as numbers.
    """
    row = {name: _without_nulls(value) for name, value in row.items()}
    for column, names in (labels or {}).items():
        # What tells of labels may be older than the column: names stay as they are.
        if isinstance(number := row.get(column), int) and not isinstance(number, bool):
            row[column] = names[number] if 0 <= number < len(names) else None
    return row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, and have it unpacked while it is read."""
    with path.open("rb") as stored, DECOMPRESSORS.get(path.suffix.lower(), nullcontext)(stored) as file:
        yield cast(BinaryIO, file)


def _read_lines(path: Path) -> Iterator[Placed]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield _row_of_line(path, line, number)


def _row_of_line(path: Path, line: bytes, number: int) -> Placed:
    place = f"{path}, line {number}"
    try:
        return _checked(place, _decode(path, line.decode().removesuffix("\n"), number))
    except UnicodeDecodeError as error:
        return place, PatError(f"{place}: not readable ({error}); expected UTF-8 text.")
    except PatError as error:
        return place, error


def _read_json(path: Path, *, promises_lines: bool = False) -> Iterator[Placed]:
    """Read a list of objects, an object that holds such a list, or one object per line, as its suffix promises."""
    if _is_lines(path, promises_lines):
        yield from _read_lines(path)
        return
    with _opened(path) as file:
        whole = _decode(path, file.read().decode("utf-8-sig"))
    if isinstance(whole, dict):
        if len(whole) > 1 and all(map(_is_column, whole.values())):
            raise PatError(
                f"{path}: got a list or an object for each column ({', '.join(whole)}); expected one object for each "
                "row (pandas: to_json(orient='records', lines=True))."
            )
        lists = {key: value for key, value in whole.items() if isinstance(value, list) and key not in LISTS_OF_ONE_ROW}
        held = {key: value for key, value in lists.items() if value and isinstance(value[0], dict)}
        if len(held) > 1:
            raise PatError(f"{path}: got several lists of rows ({', '.join(held)}); expected one of them in a file.")
        whole = next(iter(held.values()), [whole])
    yield from _listed(path, whole if isinstance(whole, list) else [whole])


def _is_column(value: Any) -> bool:
    """Tell whether a value holds the cells of a column, as a list or, as pandas writes it, by number of the row."""
    if isinstance(value, dict):
        return bool(value) and all(key.isdecimal() for key in value)
    return isinstance(value, list) and bool(value) and not any(isinstance(cell, dict | list) for cell in value)


def _is_lines(path: Path, promised: bool) -> bool:
    """Tell whether the first of several lines is an object of its own or, where that is promised, opens no list."""
    with _opened(path) as file:
        lines = (text for line in file if (text := line.removeprefix(codecs.BOM_UTF8).strip()))
        first, second = next(lines, b""), next(lines, b"")
    # A line that opens a list may be one that is torn, where the next is an object of its own.
    if promised and (not first.startswith(b"[") or (first != b"[" and _is_object(second))):
        return True
    try:
        return bool(second) and (isinstance(DECODER.decode(first.decode()), dict) or promised)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    except (ValueError, RecursionError):
        return True


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(DECODER.decode(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _listed(path: Path, rows: Iterable[Any]) -> Iterator[Placed]:
    return (_checked(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _decode(path: Path, text: str, line: int | None = None) -> Any:
    """Decode a line of a file, or all of it."""
    first = line or 1
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        reason = f"line {first + error.lineno - 1}: not valid JSON ({error.msg} at column {error.colno})"
        raise PatError(f"{path}, {reason}; expected a list of objects or one object per line.") from error
    except RepeatedField as error:
        raise PatError(f"{path}{f', line {line}' if line else ''}: {error}; expected each once.") from error
    except RecursionError as error:
        number = first + (text.count("\n", 0, deep.start()) if (deep := _DEEP.search(text)) else 0)
        raise PatError(f"{path}, line {number}: nested too deeply to be read; leave that field out.") from error


def _checked(place: str, row: object) -> Placed:
    if isinstance(row, dict):
        return place, row
    kind = {str: "string", list: "list", bool: "boolean", type(None): "null"}.get(type(row), "number")
    return place, PatError(f'{place}: got a JSON {kind}, expected an object like {{"instruction": …}}.')


def _read_csv(path: Path) -> Iterator[Placed]:
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    limit = csv.field_size_limit(CELL_LIMIT)
    try:
        with _opened(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            reader = csv.DictReader(text, strict=True, delimiter=delimiter)
            while (names := reader.fieldnames) is not None and not "".join(names).strip() and len(names) < 2:
                reader.fieldnames = None  # a blank line: the next one is the header
            _refuse_repeated(reader.fieldnames or (), f"{path}, line {reader.line_num}")
            for row in reader:
                yield _row_of_cells(path, row, reader.line_num, reader.fieldnames or ())
    except csv.Error as error:
        raise PatError(f"{path}, the row from line {reader.line_num + 1} on: not valid CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)


def _refuse_repeated(columns: Iterable[str], place: str) -> None:
    name, count = next(iter(Counter(columns).most_common(1)), ("", 0))
    if count > 1:  # the last one would win silently
        raise PatError(f"{place}: got more than one column {name!r}; give each a name of its own.")


def separator_hint(columns: Sequence[str], otherwise: str) -> str:
    """Return what to do where the header of a table has another separator than commas, else the other words."""
    sign = next((sign for sign in (";", "\t", "|") if len(columns) == 1 and sign in columns[0]), None)
    return otherwise if sign is None else f"separate the columns by commas, not by {sign!r}"


def _row_of_cells(path: Path, row: Row, last_line: int, columns: Sequence[str]) -> Placed:
    if None in row or None in row.values():  # surplus fields stand under None, and missing ones are None
        place = f"{path}, line {last_line}"
        hint = separator_hint(columns, "quote fields that contain separators or line breaks")
        return place, PatError(f"{place}: got another number of fields than the header's {len(columns)}; {hint}.")
    # Quoted fields may span lines.
    return f"{path}, line {last_line - sum(value.count(chr(10)) for value in row.values())}", row


def _read_parquet(path: Path) -> Iterator[Placed]:
    with _opened(path) as file:
        # What is packed once more cannot be jumped about in.
        source: Any = path if path.suffix.lower() == ".parquet" else pyarrow.BufferReader(file.read())
        with pyarrow.parquet.ParquetFile(source) as table:
            _refuse_repeated(table.schema_arrow.names, str(path))
            batches, labels = table.iter_batches(ROWS_AT_ONCE), _labels(table.schema_arrow.metadata)
            yield from _listed(path, (row_of_table(row, labels) for batch in batches for row in batch.to_pylist()))


def _labels(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the names of labels by column, as `datasets` notes them in the files that it writes."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"].items()
        return {name: list(kind["names"]) for name, kind in features if kind.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _unpack_zstd(stored: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stored), "zstd")))


READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".json": _read_json,
    ".jsonl": partial(_read_json, promises_lines=True),
    ".ndjson": partial(_read_json, promises_lines=True),
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _unpack_zstd,
}
SUFFIXES = f"{', '.join(READERS)}, or one of them compressed ({', '.join(DECOMPRESSORS)})"
