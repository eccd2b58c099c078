"""Values, most of them read from JSON, held against the annotations of the dataclass that is to be made of them."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin

_PLAIN: dict[Any, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a number", (int, float)),  # peft's lora_alpha is one, and may have a fraction
    float: ("a number", (int, float)),
    str: ("a text", (str, PurePath)),
    list: ("a list", (list, tuple, set)),
    set: ("a list", (list,)),
    tuple: ("a list", (list,)),
    dict: ("a mapping", (dict,)),
    type(None): ("null", (type(None),)),
}


def misfits(stored: Mapping[str, Any], kind: type[Any]) -> str | None:
    """Say which value a dataclass has no field of that kind for, as in `got r='x'; expected a whole number`.

    Args:
        stored: values by the names of fields; those of other names are left to who knows them.
        kind: a dataclass, whose annotations that are none of JSON's kinds take anything.

    Returns:
        What is wrong with the first that does not fit; None if all do.
    """
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        if field.name in stored and not _fits(stored[field.name], hints[field.name]):
            expected = " or ".join(dict.fromkeys(_words(hints[field.name])))
            return f"got {field.name}={str(stored[field.name])[:100]!r}; expected {expected}"
    return None


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is Literal:
        return any(
            type(value) is type(part) for part in inner
        )  # which of them is for its owner to say: peft has patterns
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, str)
    kind = origin or hint
    if kind not in _PLAIN:
        return True
    if not isinstance(value, _PLAIN[kind][1]) or (isinstance(value, bool) and kind in (int, float)):
        return False
    if isinstance(value, dict) and len(inner) == 2:
        return all(_fits(item, inner[1]) for item in value.values())
    if isinstance(value, list | tuple | set) and inner:
        return all(_fits(item, inner[0]) for item in value)
    return True


def _words(hint: Any) -> list[str]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return [word for part in inner for word in _words(part)]
    if origin is Literal:
        return [repr(part) for part in inner]
    return [_PLAIN.get(origin or hint, ("a text", ()))[0]]
