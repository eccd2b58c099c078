"""Ranges of numbers among the options: written as an interval in a field's metadata, read here alone.

`"range": "(0, 1]"` stands for numbers above 0 and at most 1, `"-1 | [1, inf)"` for -1 or whole numbers of at least 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from pat.errors import PatError

_INTERVAL = re.compile(r"([\[(])\s*(\S+)\s*,\s*(\S+?)\s*([\])])$")

THOUSANDS = re.compile(r"[1-9]\d{0,2}(,\d{3})+$")
"""Numbers with commas between thousands."""

WORD = 2**63
"""Whole numbers from here on fit no counter of the libraries."""


@dataclass(frozen=True)
class Range:
    """An interval of numbers, and single ones beside it."""

    low: float
    high: float
    takes_low: bool
    takes_high: bool
    others: tuple[float, ...] = ()

    @classmethod
    def of(cls, text: str) -> Range:
        """Read a range as a field's metadata has it."""
        *others, interval = (part.strip() for part in text.split("|"))
        match = _INTERVAL.match(interval)
        assert match is not None, f"not an interval: {text}"
        left, low, high, right = match.groups()
        return cls(float(low), float(high), left == "[", right == "]", tuple(map(float, others)))

    def __contains__(self, value: float) -> bool:
        """Tell whether a number lies in the range; one that is not finite lies in none."""
        if value in self.others:
            return True
        if not (-WORD < value < WORD if isinstance(value, int) else math.isfinite(value)):
            return False
        above = self.low <= value if self.takes_low else self.low < value
        return above and (value <= self.high if self.takes_high else value < self.high)

    def describe(self) -> str:
        """Say the range in words, as in `above 0 and at most 1`."""
        ends = [f"{'at least' if self.takes_low else 'above'} {_shown(self.low)}"] if self.low > -math.inf else []
        if self.high < math.inf:
            ends.append(f"{'at most' if self.takes_high else 'below'} {_shown(self.high)}")
        return " or ".join([*map(_shown, self.others), " and ".join(ends)])


def did_you_mean(given: Any, text: str | None, *, whole: bool) -> str:
    """Return the end of a message with the number that was likely meant; an empty text where none is.

    It is a share where a percentage was given (`25`, `25%`), a number with a point where it has a decimal comma
    (`0,125`), or a whole one that was written otherwise (`1,000`, `1e3`).

    Args:
        given: what cannot be.
        text: the range of the option; None if it has none.
        whole: whether the option takes no fractions.
    """
    word, allowed = str(given).strip()[:100], Range.of(text or "(-inf, inf)")
    number, is_percentage = word.removesuffix("%").strip(), word.endswith("%")
    # A comma before three digits is read as one between thousands.
    forms = [number.replace(",", "" if THOUSANDS.match(number) else ".")] if "," in number else [number]
    is_share = allowed.low >= 0 and allowed.high == 1
    for form in forms:
        try:
            value = float(form)
        except ValueError:
            continue
        as_it_is, hundredth = [] if is_percentage else [value], [value / 100] if is_percentage or value > 1 else []
        for meant in as_it_is + (hundredth if is_share or text is None else []):
            if meant in allowed and not (whole and not meant.is_integer()) and (shown := f"{meant:.12g}") != word:
                return f"; did you mean {shown}?"
    return ""


def check_range(name: str, value: Any, text: str, *, whole: bool) -> None:
    """Check a number, or every number in a list; None, and words that stand for one, are left to whom they are for.

    Args:
        name: of the option.
        value: what it is set to.
        text: the range.
        whole: whether fractions are refused.

    Raises:
        PatError: it is no number, or one that the option cannot have.
    """
    allowed = Range.of(text)
    for item in value if isinstance(value, list | tuple | set) else [value]:
        if item is None or isinstance(item, str):
            continue
        is_number = isinstance(item, int | float) and not isinstance(item, bool)
        if not is_number or item not in allowed or (whole and item != int(item)):
            kind = "a whole number" if whole else "a finite number"
            hint = did_you_mean(item, text, whole=whole)
            raise PatError(f"Got {name}={str(item)[:100]}; expected {kind} that is {allowed.describe()}{hint or '.'}")


def check_ranges(options: Any) -> None:
    """Check every number of an options dataclass against the range in its field's metadata.

    A whole number that is given as a fraction (36.0, as JSON and YAML have it) becomes an integer.

    Raises:
        PatError: one lies outside, or a number without a range is not finite.
    """
    for field in fields(options):
        value, kind = getattr(options, field.name), str(field.type)
        if (text := field.metadata.get("range")) is not None:
            is_text, is_list = isinstance(value, str), isinstance(value, list | tuple | set | dict)
            if (is_text and "str" not in kind) or (is_list and "list" not in kind and "tuple" not in kind):
                hint = did_you_mean(value, text, whole="float" not in kind)
                raise PatError(
                    f"Got {field.name}={str(value)[:100]!r}; expected a number that is {_words(text)}{hint or '.'}"
                )
            takes_fractions = "float" in kind or field.metadata.get("fractions", False)
            check_range(field.name, value, text, whole=not takes_fractions)
            if isinstance(value, float) and not takes_fractions:
                object.__setattr__(options, field.name, int(value))  # also of frozen ones
        elif any(isinstance(item, float) and not math.isfinite(item) for item in _items(value)):
            raise PatError(f"Got {field.name}={value}; expected a finite number.")


def _words(text: str) -> str:
    return Range.of(text).describe()


def _items(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _shown(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"
