"""One field of an options dataclass: what it may be, and how its value is read from words or Python values."""

from __future__ import annotations

import argparse
import enum
import json
import os
import re
import types
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pat.paths import expand
from pat.ranges import Range, check_range, did_you_mean

_WORDS = {True: ("true", "yes", "t", "y", "1", "on"), False: ("false", "no", "f", "n", "0", "off")}

_WHOLE = re.compile(r"[+-]?[0-9]{1,15}\.0+")
"""A whole number with a decimal point, as a float is written."""

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", dict: "a mapping in JSON"}


@dataclass(frozen=True)
class Option:
    """One field of an options dataclass."""

    name: str
    kinds: tuple[type, ...]
    """What a value, or an item of a list, may be, an object of no kind that is known here included; tried in turn."""
    choices: tuple[str, ...]
    takes_list: bool
    takes_single: bool
    takes_none: bool
    default: Any
    """`MISSING` if the option has to be given."""
    help: str
    range: str | None = None
    """Interval of its numbers, see `pat.ranges`."""
    is_secret: bool = False
    """Whether its value is never shown."""
    names: str | None = None
    """Kind of thing that its value names, such as a model: a key of `pat.named.CHECKS`, by which it is looked for."""

    @classmethod
    def of(cls, field: Field[Any], annotation: Any, range_of_it: str | None = None) -> Option:
        """Read a field of a dataclass, whose metadata may leave the range to others to say."""
        parts = list(_parts(annotation))
        items = [part for is_item, part in parts if is_item]
        singles = [part for is_item, part in parts if not is_item and part is not type(None)]
        choices: list[str] = [str(choice) for choice in field.metadata.get("choices", ())]
        kinds = set()
        for part in items or singles:
            if get_origin(part) is Literal:
                choices += map(str, get_args(part))
            elif isinstance(part, type) and issubclass(part, enum.Enum):
                choices += [str(member.value) for member in part]
            else:
                kinds.add(_kind(part))
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        return cls(
            field.name,
            tuple(sorted(kinds or {str}, key=(bool, int, float, dict, Path, str, object).index)),
            tuple(choices),
            takes_list=bool(items),
            takes_single=bool(singles),
            takes_none=any(part is type(None) for _, part in parts),
            default=default,
            help=str(field.metadata.get("help", "")),
            range=field.metadata.get("range", range_of_it),
            is_secret=bool(field.metadata.get("secret", False)),
            names=field.metadata.get("names"),
        )

    @property
    def none_is_value(self) -> bool:
        """Whether none says something; of a list that has a default (`report_to`) it says nothing."""
        return self.takes_none and not (self.takes_list and self.default is not None)

    def read(self, value: Any) -> Any:
        """Return a value as the field wants it: of words as they are typed, or of a Python value.

        Raises:
            ValueError: it cannot be read; the message says what is expected.
        """
        if value is None or not self.takes_list:
            return value if value is None else self._read_one(value)
        items = list(value) if isinstance(value, list | tuple | set) else [value]
        if float in self.kinds and (meant := self._with_points(items)):
            raise ValueError(f"numbers with a decimal point; did you mean {meant}?")
        if not {str, Path, object} & set(self.kinds):  # numbers may also stand with commas between, as in 1,8,16
            items = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
        if not self.takes_single and bool not in self.kinds and any(isinstance(item, bool) for item in items):
            raise ValueError(f"{self._expected()}, or several of them")
        read = [self._read_one(item) for item in items]
        return read[0] if self.takes_single and len(read) == 1 else read

    def check(self, value: Any) -> None:
        """Check that numbers are in the option's range.

        Raises:
            PatError: one is not.
        """
        if self.range is not None:
            check_range(self.name, value, self.range, whole=float not in self.kinds)

    def look_for(self, value: Any) -> None:
        """Look for what a value names, where that can only be on this machine.

        Raises:
            PatError: it is not there.
        """
        if self.names is None or value is None:
            return
        from pat.named import CHECKS  # reads tables, whose library takes longer than all that `pat --help` imports

        for name in value if isinstance(value, list) else [value]:
            CHECKS[self.names](str(name))

    def _read_one(self, value: Any) -> Any:
        word = value.value if isinstance(value, enum.Enum) else value
        if isinstance(word, str) and not word.strip() and {str, Path} & set(self.kinds) and self.default != "":
            # Such as a variable of the shell that is not set; as a path it would be the working folder.
            raise ValueError("a text that is not empty; leave it out otherwise")
        if self.choices and str(word) not in self.choices:
            raise ValueError(f"one of {', '.join(self.choices)}")
        if dict in self.kinds and isinstance(value, bool):  # which libraries would open as a file: that of its number
            raise ValueError(self._expected())
        if int in self.kinds and float not in self.kinds and _WHOLE.fullmatch(str(value)):
            value = int(float(value))
        for kind in self.kinds:
            try:
                return _as(kind, value)
            except ValueError:
                continue
        expected = f"{self._expected()}, or several of them" if self.takes_list else self._expected()
        is_number = {int, float} & set(self.kinds) and isinstance(value, str)
        raise ValueError(
            expected + (did_you_mean(value, self.range, whole=float not in self.kinds) if is_number else "")
        )

    def _with_points(self, items: list[Any]) -> str:
        """Return numbers with points for those with decimal commas, which would be two numbers, one out of range."""
        words = [item.replace(",", ".") if isinstance(item, str) else str(item) for item in items]
        if self.range is None or "," not in "".join(map(str, items)):
            return ""
        allowed = Range.of(self.range)
        try:
            parts = [float(part) for item in items for part in str(item).split(",")]
            fits = all(float(word) in allowed for word in words) and not all(part in allowed for part in parts)
        except ValueError:
            return ""
        return " ".join(words) if fits else ""

    def _expected(self) -> str:
        return " or ".join(_EXPECTED.get(kind, "a text") for kind in self.kinds)

    def add_to(self, group: argparse._ArgumentGroup, default: Any, *, hidden: bool = False) -> None:
        """Declare the flag; argparse leaves its words as they are."""
        text = argparse.SUPPRESS if hidden else self.help
        if self.range is not None and not hidden:
            words = Range.of(self.range).describe()
            text = f"{text.rstrip('. ')}. {words[0].upper()}{words[1:]}."
        if not hidden and default not in (None, "", MISSING, False) and "efault" not in text:
            text = f"{text} (default: {str(default).replace('%', '%%')})"
        names = [f"--{self.name}"]
        if self.kinds == (bool,):
            group.add_argument(*names, action=_Once, nargs="?", const="true", metavar="true|false", help=text)
            if self.default is True:
                opposite = argparse.SUPPRESS if hidden else "Its opposite."
                group.add_argument(
                    f"--no_{self.name}", dest=self.name, action=_Once, nargs=0, const="false", help=opposite
                )
            return
        metavar = "{" + ",".join(self.choices) + "}" if 0 < len(self.choices) < 8 else self.name.upper()
        nargs = "+" if self.takes_list else None
        group.add_argument(*names, action=_Once, nargs=nargs, metavar=metavar, help=text)


class _Once(argparse.Action):
    """Keeps the words of a flag, and refuses it a second time, where argparse would take the last."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            parser.error(f"Got {option_string} a second time; give it once")
        setattr(namespace, self.dest, self.const if values == [] else values)


def _parts(annotation: Any) -> Iterable[tuple[bool, Any]]:
    """Yield the alternatives of an annotation, each with whether it is that of a list's items."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    elif origin in (list, tuple):
        yield from ((True, part) for part in get_args(annotation) if part is not Ellipsis)
    else:
        yield False, annotation


def _kind(part: Any) -> type:
    kind = get_origin(part) or part
    return kind if kind in (bool, int, float, dict, Path, str) else object


def _as(kind: type, value: Any) -> Any:
    if kind is dict:
        try:
            read = json.loads(value) if isinstance(value, str) else value
        except RecursionError as error:
            raise ValueError from error
        if not isinstance(read, dict):
            raise ValueError
        return read
    if not isinstance(value, str):
        fits = isinstance(value, kind) if kind is not float else isinstance(value, int | float)
        if kind in (int, float) and isinstance(value, bool):
            raise ValueError
        is_plain = isinstance(value, int | float | Path)
        if kind is object:
            fits = not isinstance(value, list | tuple | set | dict | bytes)
        elif kind is str:
            fits = is_plain or isinstance(value, enum.Enum)
        if fits:
            # A number or a path stands for its text; true and what else there is are left to whom they are for.
            if kind in (str, object) and is_plain and not isinstance(value, bool):
                value = str(value)
            return _expanded(kind, value) if isinstance(value, str | Path) else value
        raise ValueError
    if kind is bool:
        for truth, words in _WORDS.items():
            if value.lower() in words:
                return truth
        raise ValueError
    return _expanded(kind, value)


def _expanded(kind: type, value: Any) -> Any:
    """Return a path, or a text that begins with `~/`, with the home directory put in, as a shell would have done.

    Raises:
        ValueError: no file could have such a name, and no text such letters.
    """
    if kind in (str, Path, object):
        os.fsencode(str(value))  # raises a ValueError at half a surrogate pair
        if "\0" in str(value):
            raise ValueError
    make = str if kind is object else kind
    is_path = kind is Path or (make is str and str(value).startswith("~/"))
    return make(expand(str(value))) if is_path else make(value)
