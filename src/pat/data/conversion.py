"""Rows of one source become a table of examples in TRL's forms, as they are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Features, Json, List, Value

from pat.data.alpaca_chat import is_alpaca_chat
from pat.data.formats import OPTIONS, Format, NoFormat, Template, convert_row, detect_format
from pat.data.messages import RowError, message_list
from pat.data.tables import cached_table, write_table
from pat.errors import PatError
from pat.readers import Placed, Row
from pat.report.progress import Phase, phase

TemplateChoice = Literal["auto", "chat", "alpaca"]

PLACE = "place"
"""Column with where the row of an example stands; a conversation gives several examples."""

ROW = "row"
"""Column with the number of that row among those with a response, from 0."""

ROWS_LOOKED_AT = 1000
"""Rows by whose columns the format is found; it is found anew if later ones have others that make a difference."""

UPDATE_EVERY = 100
"""Rows between two counts of what has been read."""


@dataclass(frozen=True)
class Source:
    """All examples of one source in TRL's forms, with the columns `PLACE` and `ROW`."""

    rows: Dataset
    format: Format
    template: Template | None
    fingerprint: str
    num_rows: int  # rows read, those without a response included
    num_usable: int  # rows with a response
    unread: tuple[str, ...] = ()  # columns that have no part in the format
    num_bad: int = 0  # rows that could not be used, and were skipped
    first_bad: str = ""  # what is wrong with the first of them
    key: str | None = None  # of the table in the cache, if it is there

    @property
    def num_dropped(self) -> int:
        """Number of rows without a response."""
        return self.num_rows - self.num_usable - self.num_bad


@dataclass(frozen=True)
class Reading:
    """Options of reading rows; `chat_template` is the source of the tokenizer's template, empty if there is none."""

    template: TemplateChoice = "auto"
    chat_template: str = ""
    text_field: str = "text"
    skips: bool = False
    """Whether rows that cannot be used are left out, and counted."""
    shown: bool = False
    """Whether progress is shown."""
    learns_prompts: bool = False
    """Whether prompts are learned as well as answers."""

    def parts(self) -> tuple[Any, ...]:
        """Return what decides on what rows become."""
        return self.template, self.chat_template, self.text_field, self.skips, self.learns_prompts


class _OtherFormat(Exception):
    """A row has columns by which the data has another format than was thought."""


def convert(
    name: str,
    placed: Callable[[], Iterable[Placed]],
    reading: Reading,
    fingerprint: Callable[[], str],
    *,
    columns: Sequence[str] | None = None,
    key: str | None = None,
) -> Source:
    """Convert the rows of a source: in memory, or with a key as a table of the cache.

    Args:
        name: of the source.
        placed: returns the rows from the beginning, each time that it is called.
        reading: how they are read.
        fingerprint: returns that of the source.
        columns: all that rows may have, if that is known.
        key: digest of everything that the table is made of.

    Raises:
        PatError: see `pat.data.load.load_training_data`.
    """
    with phase(f"Reading {name}", "rows", shown=reading.shown) as progress:

        def run(use: Callable[[Conversion], Any]) -> tuple[Conversion, Any]:
            """Convert all rows; once more if they turn out to have another format."""
            known, first = look_at(islice(placed(), ROWS_LOOKED_AT), reading.skips)
            if columns is not None:
                known = dict.fromkeys(columns)
            try:
                conversion = Conversion(name, placed, reading, known, first, progress)
                return conversion, use(conversion)
            except (_OtherFormat, NoFormat):
                if columns is not None:
                    raise
                known, first = look_at(placed(), reading.skips)
                conversion = Conversion(name, placed, reading, known, first, progress)
                return conversion, use(conversion)

        if key is None:
            conversion, examples = run(lambda conversion: list(conversion.stored()))
            facts = conversion.facts(fingerprint())
            return Source(Dataset.from_list(examples, conversion.features), **facts)

        def make(folder: Path) -> dict[str, Any]:
            file = folder / "rows.arrow"
            conversion, _ = run(lambda conversion: write_table(file, conversion.features, conversion.stored()))
            facts = conversion.facts(fingerprint())
            return facts | {"format": asdict(facts["format"])}

        rows, facts = cached_table(key, make)
    format = Format(**facts["format"] | {"beside": tuple(facts["format"]["beside"])})
    return Source(rows, **facts | {"format": format, "unread": tuple(facts["unread"]), "key": key})


class Conversion:
    """The conversion of the rows of one source, whose columns and first row say how."""

    def __init__(
        self,
        name: str,
        placed: Callable[[], Iterable[Placed]],
        reading: Reading,
        columns: dict[str, None],
        first: Row,
        progress: Phase,
        *,
        goes_on: bool = False,
    ) -> None:
        """Choose format and template; one that goes on takes a row of another format as one that is wrong."""
        self.goes_on = goes_on
        self.name, self.placed, self.reading, self.columns, self.progress = name, placed, reading, columns, progress
        self.num_rows = self.num_usable = self.num_bad = 0
        self.first_bad = ""
        self.format = format = detect_format(columns, name, reading.text_field)
        if format.name == "text" and reading.template != "auto":
            raise PatError(
                f"{name}: got template={reading.template} with plain text, which has no prompts; leave it out."
            )
        as_it_is = format.name == "prompt-completion" and not isinstance(message_list(first.get(format.prompt)), list)
        # Instructions have Alpaca's own words also where a chat template has them: those with an input among them.
        is_worded = format.name == "alpaca" and is_alpaca_chat(reading.chat_template)
        self.template: Template | None = "chat" if reading.chat_template and not is_worded else "alpaca"
        if reading.template != "auto":
            self.template = reading.template
        elif as_it_is or format.name == "text":
            self.template = None
        chat = self.template == "chat"
        kind = List(Json()) if chat else Value("string")
        options = [name for name in OPTIONS if chat and name in format.beside]
        names = ["text"] if format.name == "text" else ["prompt", "completion"]
        kinds: dict[str, Any] = dict.fromkeys(names, kind) | dict.fromkeys(options, Json())
        self.features = Features(kinds | {PLACE: Value("string"), ROW: Value("int64")})

    def stored(self) -> Iterator[dict[str, Any]]:
        """Yield the examples of all rows as the columns of a table hold them."""
        if self.template != "chat":
            yield from self.examples()
            return
        # In JSON, each message keeps the fields that it has, and no others.
        for example in self.examples():
            yield {name: _as_json(name, value) for name, value in example.items()}

    def examples(self) -> Iterator[dict[str, Any]]:
        """Yield the examples of all rows."""
        for place, row in self.placed():
            if self.num_rows % UPDATE_EVERY == 0:
                self.progress.done = self.num_rows
            self.num_rows += 1
            try:
                examples = self._convert(place, row)
            except PatError as error:
                if not self.reading.skips:
                    raise PatError(str(error), of_row=True) from error
                self.first_bad = self.first_bad or str(error)
                self.num_bad += 1
                continue
            beside = {PLACE: place, ROW: self.num_usable}
            self.num_usable += bool(examples)
            yield from ({**dict.fromkeys(self.features), **example, **beside} for example in examples)
        if not self.num_usable:
            wrong = f" or of rows that cannot be used, as {self.first_bad}" if self.num_bad else ""
            raise PatError(
                f"{self.name}: all {self.num_rows} responses are empty{wrong}; expected at least one with text."
            )

    def facts(self, fingerprint: str) -> dict[str, Any]:
        """Return what is known of the source when all rows are converted."""
        return {
            "format": self.format,
            "template": self.template,
            "fingerprint": fingerprint,
            "num_rows": self.num_rows,
            "num_usable": self.num_usable,
            "num_bad": self.num_bad,
            "first_bad": self.first_bad,
            "unread": tuple(column for column in self.columns if column not in self.format.columns),
        }

    def _convert(self, place: str, row: Row | PatError) -> list[dict[str, Any]]:
        if isinstance(row, PatError):
            raise row
        if not row.keys() <= self.columns.keys():
            columns = self.columns | dict.fromkeys(row)
            if detect_format(columns, self.name, self.reading.text_field) != self.format:
                if self.goes_on:
                    raise PatError(
                        f"{place}: has columns by which the data has another format than {self.format.name}, which the "
                        f"first {ROWS_LOOKED_AT:,} rows have; leave --streaming out, or the row."
                    )
                raise _OtherFormat
            self.columns = columns
        try:
            return convert_row(
                row,
                self.format,
                self.template,
                self.reading.chat_template,
                learns_prompts=self.reading.learns_prompts,
            )
        except RowError as error:
            raise PatError(f"{place}: {error}") from error


def _as_json(name: str, value: Any) -> Any:
    if value is None or name in (PLACE, ROW):
        return value
    return [json.dumps(item) for item in value] if name in ("prompt", "completion") else json.dumps(value)


def look_at(placed: Iterable[Placed], skips: bool) -> tuple[dict[str, None], Row]:
    """Return the columns of rows, and the first of them that is one.

    Raises:
        PatError: a row is wrong, and none is to be skipped.
    """
    columns: dict[str, None] = {}
    first: Row | None = None
    for _, row in placed:
        if isinstance(row, dict):
            first = row if first is None else first
            columns |= dict.fromkeys(row)
        elif not skips:
            raise PatError(str(row), of_row=True) from row
    return columns, first or {}
