"""A terminal to look at: a pty whose other end is read, and what is seen on it."""

from __future__ import annotations

import os
import re
import sys
import threading
from types import TracebackType

import pytest

PARTS = re.compile(rb"\x1b\[([0-9;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


class Terminal:
    """Stands in for stderr; `states` are the lines that the cursor has stood on, `screen()` what is left."""

    columns = 100

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(self.columns))
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        self._monkeypatch = monkeypatch
        self.states: list[str] = []
        self.raw = b""

    def __enter__(self) -> Terminal:
        self._master, slave = os.openpty()
        self._file = open(slave, "w", encoding="utf-8", buffering=1)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._before, sys.stderr = sys.stderr, self._file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stderr = self._before
        self._file.close()
        self._reader.join(timeout=10)
        os.close(self._master)

    def _read(self) -> None:
        try:
            while chunk := os.read(self._master, 65536):
                self.raw += chunk
        except OSError:  # the other end is closed
            pass

    def screen(self) -> list[str]:
        """Return the lines that are left, once everything is written."""
        lines, row, column, hidden = [""], 0, 0, False
        for match in PARTS.finditer(self.raw):
            part, (count, command) = match.group(), match.groups()
            if part == b"\r":
                column = 0
            elif part == b"\n":
                row += 1
                if row == len(lines):
                    lines.append("")
            elif command == b"A":
                row -= int(count or 1)
                assert row >= 0
            elif command == b"K":
                assert count == b"2"
                lines[row] = ""
            elif command in (b"h", b"l"):
                hidden = command == b"l"
            elif command == b"m":
                pass
            else:
                assert command is None, part
                text = part.decode()
                line = lines[row].ljust(column)
                lines[row] = line[:column] + text + line[column + len(text) :]
                column += len(text)
                self.states.append(lines[row])
        assert not hidden
        return [line.rstrip() for line in lines if line.strip()]
