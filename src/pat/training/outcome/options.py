"""The options of `pat report`, apart from what writes the page: a slip should not wait for its imports."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pat.checkpoint.places import RESULTS
from pat.errors import PatError, one_line
from pat.paths import check_writable, expand_options, near
from pat.report.page import is_report


@dataclass(kw_only=True)
class ReportOptions:
    """The run to report on, and the file to write."""

    MAIN_FLAGS: ClassVar = ("run", "output")

    run: Path = field(metadata={"help": "Folder of a finished run of `pat tune`, with its results.json."})
    output: Path | None = field(
        default=None,
        metadata={"help": "HTML file to write, new or a report; by default report.html in the folder of the run."},
    )

    def __post_init__(self) -> None:
        """Refuse a file that is none, and a folder without a record.

        Raises:
            PatError: the output is no .html file in a folder that is there, cannot be written, or is another file; or
                there is no record in the folder of the run, see `read_record`.
        """
        expand_options(self)
        read_record(self.run)
        path = self.output
        if path is None:
            return
        there = os.path.isdir(path.absolute().parent)
        if path.suffix.lower() not in (".html", ".htm") or os.path.isdir(path) or not there:
            raise PatError(f"Got output={path}; expected an .html file in a folder that is there.")
        check_writable(path)
        if os.path.isfile(path) and os.path.getsize(path) and not is_report(path):
            raise PatError(
                f"Got output={path}, which exists and is no report of a run; give another name, or move it away first."
            )


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of the `results.json` of a run of `pat tune`.

    Raises:
        PatError: there is none, it cannot be read, or it is that of another command.
    """
    path = folder / RESULTS
    if not os.path.isfile(path):
        if os.path.isfile(folder):
            raise PatError(f"Got run={folder}, which is a file; expected the folder of a `pat tune`.")
        if not os.path.isdir(folder):
            alike = near(folder, folder=True)
            raise PatError(f"Got run={folder}, but there is no such folder{alike}; expected that of a `pat tune`.")
        raise PatError(
            f"Got run={folder}, where there is no {RESULTS}; expected the folder of a finished `pat tune`. One that "
            "was stopped goes on by its own command."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PatError(f"{path}: not readable ({one_line(error)}); expected the record of a `pat tune`.") from error
    command = record.get("command") if isinstance(record, dict) else None
    if command != "tune":
        of = f"the record of `pat {command}`" if isinstance(command, str) else "no record of a command"
        raise PatError(f"{path}: holds {of}; expected that of `pat tune`.")
    return dict(record)
