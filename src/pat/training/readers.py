"""Reading local data files into rows that still know where in the file they stand."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet  # type: ignore[import-untyped]

from pat.errors import PatError

Row = dict[str, Any]


@dataclass(frozen=True)
class LocalRows:
    """The rows of one file; `places[i]` says where row i stands, for error messages."""

    path: Path
    rows: list[Row]
    unit: str  # "line" or "row"
    numbers: list[int]

    def place(self, index: int) -> str:
        """Where row `index` stands, as in `data.jsonl, line 3`."""
        return f"{self.path}, {self.unit} {self.numbers[index]}"

    def columns(self) -> list[str]:
        """Names of all columns, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def read_local(path: Path) -> LocalRows:
    """All rows of a `.json`, `.jsonl`, `.parquet` or `.csv` file.

    Raises:
        PatError: no such file, another suffix, not readable as what the suffix says (with the line), no rows.
    """
    suffixes = ", ".join(READERS)
    if path.is_dir():
        raise PatError(f"{path} is a folder; expected one data file ({suffixes}).")
    if not path.is_file():
        raise PatError(f"{path}: no such file; expected a hub dataset id or a file ({suffixes}).")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise PatError(f"{path}: got suffix {path.suffix!r}, expected one of {suffixes}; convert the file.")
    try:
        local = reader(path)
    except (OSError, UnicodeDecodeError) as error:
        raise PatError(f"{path}: not readable ({error}); expected a UTF-8 file.") from error
    if not local.rows:
        raise PatError(f"{path} has no rows; expected at least one example.")
    return local


def _read_jsonl(path: Path) -> LocalRows:
    rows, numbers = [], []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise PatError(
                    f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                    "expected one JSON object per line."
                ) from error
            _check_object(row, f"{path}, line {number}")
            rows.append(row)
            numbers.append(number)
    return LocalRows(path, rows, "line", numbers)


def _read_json(path: Path) -> LocalRows:
    """A JSON list of objects; a file that holds one object per line under this suffix is read as such."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _read_jsonl(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise PatError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); "
            "expected a list of objects or one object per line."
        ) from error
    numbers = list(range(1, len(rows) + 1))
    for number, row in zip(numbers, rows, strict=True):
        _check_object(row, f"{path}, row {number}")
    return LocalRows(path, rows, "row", numbers)


def _read_csv(path: Path) -> LocalRows:
    rows, numbers = [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                # DictReader files surplus fields under None and fills missing ones with None.
                if None in row or None in row.values():
                    raise PatError(
                        f"{path}, line {reader.line_num}: got another number of fields than the header's "
                        f"{len(reader.fieldnames or ())}; quote fields that contain commas or line breaks."
                    )
                rows.append(row)
                # Quoted fields may span lines; line_num is the row's last one.
                numbers.append(reader.line_num - sum(value.count("\n") for value in row.values()))
        except csv.Error as error:
            raise PatError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from error
    return LocalRows(path, rows, "line", numbers)


def _read_parquet(path: Path) -> LocalRows:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise PatError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}).") from error
    return LocalRows(path, rows, "row", list(range(1, len(rows) + 1)))


def _check_object(row: object, place: str) -> None:
    if not isinstance(row, dict):
        raise PatError(f'{place}: got a JSON {_json_name(row)}, expected an object like {{"instruction": …}}.')


def _json_name(value: object) -> str:
    return {str: "string", list: "list", bool: "boolean", type(None): "null"}.get(type(value), "number")


READERS: dict[str, Callable[[Path], LocalRows]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
