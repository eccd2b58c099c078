"""What the fuzz tests share: values that nobody expects, changes of valid JSON and bytes, and for how long to try.

`PAT_FUZZ_SECONDS=60 pytest tests/e2e/test_fuzz.py` tries each target for a minute, with other examples every time.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

from pat.errors import PatError

SECONDS = float(os.environ.get("PAT_FUZZ_SECONDS", "0"))

LIMIT = 10.0
"""Seconds that no input may take."""

_ODD = (
    "nan inf -inf -1 0 1e400 none null {} [] true ٣ é ~ ../../x /etc/passwd ./nowhere auto all float32 cuda:7 llama "
    "<script>alert(1)</script> !!python/name:os.system"
)

TEXTS = st.one_of(
    st.sampled_from([*_ODD.split(), "", " ", "\x00", "\n", "\x1b[31m", "{{ 7*7 }}", "\ud800", "x" * 300, "1" * 400]),
    st.text(max_size=12),
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400]),
    st.integers(-5, 200),
    st.sampled_from([0.0, -0.0, 0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf")]),
    st.floats(),
    TEXTS,
)

VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=8,
)


DEEP = re.compile(rb'"deep:([0-9]+)"')
"""Stands for lists in lists, as many as the number says: Python's own recursion is not what is tried here."""


def spots(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the places of all values in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(spot for key, item in inner for spot in spots(item, (*at, key)))]


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """Draw a JSON value in which one to three places hold something else, are gone, or have moved."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        places = [spot for spot in spots(value) if spot]
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        holder = value
        for key in way:
            holder = holder[key]
        kind = draw(st.sampled_from(["value", "value", "value", "gone", "name", "other", "deep"]))
        if kind == "gone":
            del holder[last]
        elif kind == "name" and isinstance(holder, dict):
            holder[draw(TEXTS)] = holder.pop(last)
        elif kind == "other":
            other: Any = value
            for key in draw(st.sampled_from(places)):
                if not isinstance(other, dict | list) or (isinstance(other, dict) and key not in other):
                    break
                if isinstance(other, list) and not (isinstance(key, int) and key < len(other)):
                    break
                other = other[key]
            holder[last] = copy.deepcopy(other)
        elif kind == "deep":
            holder[last] = draw(st.sampled_from(["deep:3", "deep:30", "deep:1100"]))
        else:
            holder[last] = draw(VALUES)
    return draw(VALUES) if draw(st.integers(0, 19)) == 0 else value


def as_json(value: Any) -> bytes:
    """Write a value as JSON, NaN and lone surrogates included, as deep as it may be."""
    try:
        text = json.dumps(value).encode()
    except ValueError:  # longer than Python turns into digits
        text = b"1" * 5000
    return DEEP.sub(lambda found: b"[" * int(found[1]) + b"]" * int(found[1]), text)


def spoiled(content: bytes, draw: random.Random) -> bytes:
    """Return a file with some bytes changed, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(data) + 1)
        kind = draw.randrange(4)
        if kind == 0 and data:
            data[min(place, len(data) - 1)] = draw.randrange(256)
        elif kind == 1:
            del data[place : place + draw.randrange(1, 20)]
        elif kind == 2:
            data[place:place] = data[place : place + draw.randrange(1, 40)] * draw.randint(1, 3)
        else:
            data[place:place] = draw.choice(
                [b"\x00", b"\xff", b'"', b"{", b"[", b"]", b"\n", b",", b": ", b"&a ", b"*a ", b"!!", b"1e999", b"NaN"]
            )
    return bytes(data)


def safetensors_bytes(header: Any, body: bytes = b"\0" * 64, size: int | None = None) -> bytes:
    """Return a safetensors file with any header, and any size said of it."""
    text = header if isinstance(header, bytes) else as_json(header)
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def attempt(call: Callable[[], Any], shown: Any) -> None:
    """Call a reader: it may come to anything or refuse in one line, and in nothing else; and not take long."""
    started = time.monotonic()
    try:
        call()
    except PatError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000, (message, shown)
        message.encode()
    except AssertionError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise AssertionError(f"{type(error).__name__}: {error} at {str(shown)[:3000]}") from error
    assert time.monotonic() - started < LIMIT, shown


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int) -> None:
    """Check as many examples, the same every time; or, for `SECONDS`, new ones."""
    count = 0

    def once(value: Any) -> None:
        nonlocal count
        count += 1
        check(value)

    # Not shrunk, which takes minutes where an example takes a tenth of a second.
    common: dict[str, Any] = {
        "suppress_health_check": list(hypothesis.HealthCheck),
        "phases": (hypothesis.Phase.explicit, hypothesis.Phase.generate),
    }
    if not SECONDS:
        hypothesis.settings(max_examples=examples, **common)(hypothesis.given(strategy)(once))()
        return
    until, seed = time.monotonic() + SECONDS, random.SystemRandom().randrange(2**32)
    while time.monotonic() < until:
        seed += 1
        settings = hypothesis.settings(derandomize=False, max_examples=300, **common)
        hypothesis.seed(seed)(settings(hypothesis.given(strategy)(once)))()
    print(f"\n{count:,} examples in {SECONDS:.0f} s", flush=True)


def write(path: Path, content: bytes) -> Path:
    """Write a file, in the place of what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
