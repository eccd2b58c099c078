"""Local data files as rows that still know on which line of the file they stand."""

from __future__ import annotations

import bz2
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet

from pat.errors import PatError

Row = dict[str, Any]

CELL_LIMIT = 2**31 - 1
"""Letters of a CSV cell; by default the csv module refuses more than 131,072 of them."""

LISTS_OF_ONE_ROW = {"messages", "conversations", "conversation", "prompt", "completion", "tools"}
"""Lists of objects under these names belong to one row; under any other name a list of objects is the data."""

_DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
_DEEP = re.compile(r"(?:[\[{][^\[\]{}]*){99}")


Placed = list[tuple[str, Row]]
"""Rows, and where each stands, as in `data.jsonl, line 3`."""


def read_local(path: Path) -> tuple[Placed, str]:
    """Read all rows of a data file, compressed or not, and the fingerprint of the file.

    Raises:
        PatError: no such file, another suffix, no rows, or not readable as what the suffix says (with the line).
    """
    if not os.path.isfile(path):
        raise PatError(f"{path}: no such file; expected a hub dataset id, a folder or a file ({SUFFIXES}).")
    suffix = data_suffix(path)
    if suffix not in READERS:
        raise PatError(f"{path}: got suffix {suffix!r}, expected one of {SUFFIXES}; convert the file.")
    try:
        stored = path.read_bytes()
        unpack = DECOMPRESSORS.get(path.suffix.lower())
        rows = READERS[suffix](path, stored if unpack is None else unpack(stored))
    except _DAMAGED as error:
        what = "a parquet file" if suffix == ".parquet" else "UTF-8 text"
        raise PatError(f"{path}: not readable ({' '.join(str(error).split())}); expected {what}.") from error
    if not rows:
        raise PatError(f"{path} has no rows; expected at least one example.")
    return rows, f"sha256:{hashlib.sha256(stored).hexdigest()}"


def data_suffix(path: Path) -> str:
    """Return the suffix that says what a file holds, which stands before that of its compression."""
    return Path(path.stem if path.suffix.lower() in DECOMPRESSORS else path.name).suffix.lower()


def without_nulls(value: Any) -> Any:
    """Leave out what is null in nested objects: a table of objects gives each the fields of all."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _integer(digits: str) -> int | str:
    """Read an integer of 64 bits; what is longer stays text, since neither Python nor Arrow takes it at any length."""
    return int(digits) if len(digits) < 19 or (len(digits) < 21 and -(2**63) <= int(digits) < 2**63) else digits


def _fields(pairs: list[tuple[str, Any]]) -> Row:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # the last one would win silently
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _RepeatedField(f"an object has the field {name!r} more than once")
    return fields


class _RepeatedField(ValueError):
    """An object has two fields of one name."""


_DECODER = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_fields)


def _read_jsonl(path: Path, content: bytes) -> Placed:
    lines = enumerate(content.decode("utf-8-sig").split("\n"), start=1)
    return [_checked(f"{path}, line {i}", _decode(path, line, i)) for i, line in lines if line.strip()]


def _read_json(path: Path, content: bytes) -> Placed:
    """Read a list of objects, an object that holds such a list, or one object per line."""
    text = content.decode("utf-8-sig")
    if _is_lines(text):
        return _read_jsonl(path, content)
    whole = _decode(path, text)
    if isinstance(whole, dict):
        lists = {key: value for key, value in whole.items() if isinstance(value, list) and key not in LISTS_OF_ONE_ROW}
        held = {key: value for key, value in lists.items() if value and isinstance(value[0], dict)}
        if len(held) > 1:
            raise PatError(f"{path}: got several lists of rows ({', '.join(held)}); expected one of them in a file.")
        whole = next(iter(held.values()), [whole])
    return _listed(path, whole if isinstance(whole, list) else [whole])


def _is_lines(text: str) -> bool:
    """Tell whether the first of several lines is an object of its own."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(_DECODER.decode(first), dict)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True


def _listed(path: Path, rows: list[Any]) -> Placed:
    return [_checked(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _decode(path: Path, text: str, line: int | None = None) -> Any:
    """Decode a line of a file, or all of it."""
    first = line or 1
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        reason = f"line {first + error.lineno - 1}: not valid JSON ({error.msg} at column {error.colno})"
        raise PatError(f"{path}, {reason}; expected a list of objects or one object per line.") from error
    except _RepeatedField as error:
        raise PatError(f"{path}{f', line {line}' if line else ''}: {error}; expected each once.") from error
    except RecursionError as error:
        deep = _DEEP.search(text)
        number = first + (text.count("\n", 0, deep.start()) if deep else 0)
        raise PatError(f"{path}, line {number}: nested too deeply to be read; leave that field out.") from error


def _checked(place: str, row: object) -> tuple[str, Row]:
    if isinstance(row, dict):
        return place, row
    kind = {str: "string", list: "list", bool: "boolean", type(None): "null"}.get(type(row), "number")
    raise PatError(f'{place}: got a JSON {kind}, expected an object like {{"instruction": …}}.')


def _read_csv(path: Path, content: bytes) -> Placed:
    rows: Placed = []
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    limit = csv.field_size_limit(CELL_LIMIT)
    try:
        file = io.StringIO(content.decode("utf-8-sig"), newline="")
        reader = csv.DictReader(file, strict=True, delimiter=delimiter)
        repeated = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
        if repeated:
            raise PatError(f"{path}, line 1: got more than one column {repeated[0]!r}; give each a name of its own.")
        for row in reader:
            # DictReader files surplus fields under None and fills missing ones with None.
            if None in row or None in row.values():
                raise PatError(
                    f"{path}, line {reader.line_num}: got another number of fields than the header's "
                    f"{len(reader.fieldnames or ())}; quote fields that contain separators or line breaks."
                )
            # Quoted fields may span lines; line_num is the row's last one.
            line = reader.line_num - sum(value.count("\n") for value in row.values())
            rows.append((f"{path}, line {line}", row))
    except csv.Error as error:
        raise PatError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_parquet(path: Path, content: bytes) -> Placed:
    return _listed(path, without_nulls(pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()))


def _unpack_zstd(stored: bytes) -> bytes:
    return bytes(pyarrow.CompressedInputStream(pyarrow.BufferReader(stored), "zstd").read())


READERS: dict[str, Callable[[Path, bytes], Placed]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
DECOMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _unpack_zstd,
}
SUFFIXES = f"{', '.join(READERS)}, or one of them compressed ({', '.join(DECOMPRESSORS)})"
