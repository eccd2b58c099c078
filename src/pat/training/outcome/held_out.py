"""Writes the rows that a run has held out of its data, so that other models can be measured on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pat.checkpoint.places import HELD_OUT
from pat.whole_files import write_whole


def write_held_out(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write held-out examples as JSON lines, in the form that they have in the run, of which come the same tokens.

    They are the user's own data, and lie outside the folder of the model, which alone is pushed. A file holds examples
    of one form, so that a mixture of strings, messages and texts gives up to three.
    """
    forms: dict[str, list[str]] = {}
    for row in rows:
        known = {name: value for name, value in row.items() if value is not None}
        form = "text" if "text" in known else type(known["prompt"]).__name__
        forms.setdefault(form, []).append(json.dumps(known, ensure_ascii=False))
    for name, lines in zip(HELD_OUT, forms.values(), strict=False):
        write_whole(folder / name, "\n".join([*lines, ""]))
