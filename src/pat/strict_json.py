"""JSON as data files have it: no field of an object is lost, and no integer is too long."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def _integer(digits: str) -> int | str:
    """Read an integer of 64 bits; what is longer stays text, since neither Python nor Arrow takes it at any length."""
    return int(digits) if len(digits) < 19 or (len(digits) < 21 and -(2**63) <= int(digits) < 2**63) else digits


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # the last one would win silently
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RepeatedField(f"an object has the field {name!r} more than once")
    return fields


class RepeatedField(ValueError):
    """An object has two fields of one name."""


DECODER = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_fields)
"""Raises `RepeatedField` for an object with two fields of one name, of which json would take the last."""
