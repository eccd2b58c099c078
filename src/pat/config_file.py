"""Files of flags: YAML mappings, read as words, and refused before they can cost time or memory."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

from pat.errors import PatError, one_line
from pat.paths import near

CONFIG = "config"
"""The flag that names a file of flags."""

MAX_BYTES = 2**18
MAX_DEPTH = 20
MAX_VALUES = 4_000
"""Far more than all flags of a command need; what is larger is another kind of file, or meant to harm.

The values are counted as often as they are repeated: each anchor may stand for many of the one before it.
"""

_EXPECTED = "expected lines such as `pruning_ratio: 0.25`"


def read_config(path: Path) -> list[tuple[str, Any, int]]:
    """Read a file of flags: a YAML mapping of names to values, which mean what they mean on the command line.

    Returns:
        Name, value and line of each. Scalars and items of lists are the words in the file (`no` is not turned into
        false, `010` not into 8), an empty value is None, and mappings are what YAML makes of them.

    Raises:
        PatError: no such file, not YAML, not a mapping, a name that is given twice, or more than flags can need.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
        """Takes 1e-5 for a number, as YAML 1.2 does; in a mapping nothing else would make one of it."""

    exponent = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    text = _text(path)
    found: dict[str, tuple[str, Any, int]] = {}
    try:
        _count_events(yaml, Loader, text, path)
        loader = Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise PatError(f"{path}: got no YAML mapping; {_EXPECTED}.")
        if _num_values(node, path, {}) > MAX_VALUES:
            raise PatError(f"{path}: its anchors stand for more than {MAX_VALUES:,} values; {_EXPECTED}.")
        loader.flatten_mapping(node)
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.id != "scalar":
                raise PatError(f"{path}, line {line}: got a {key.id} for a name; {_EXPECTED}.")
            name = str(key.value).replace("-", "_")
            if name in found:
                raise PatError(f"{path}, line {line}: got {name} a second time (line {found[name][2]}); give it once.")
            found[name] = (name, _plain(value, loader), line)
    except PatError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # the latter of dates and numbers that there are none of
        where = getattr(error, "problem_mark", None)
        place = f"{path}, line {where.line + 1}" if where is not None else str(path)
        reason = getattr(error, "problem", None) or one_line(error)
        raise PatError(f"{place}: not valid YAML ({reason}); {_EXPECTED}.") from error
    return list(found.values())


def set_environment(variables: Any, place: str) -> None:
    """Set what a config file lists under `env`, as TRL's parser does."""
    if not isinstance(variables, dict):
        raise PatError(f"{place}: got env {str(variables)[:100]!r}; expected a mapping of names to values.")
    try:
        os.environ.update({str(name): str(value) for name, value in variables.items()})
    except (ValueError, OSError) as error:
        raise PatError(f"{place}: got env that cannot be set ({one_line(error)}); expected names and texts.") from error


def _text(path: Path) -> str:
    try:
        if not os.path.isfile(path):
            alike = near(path, folder=False)
            raise PatError(f"Got --{CONFIG} {path}, but there is no such file{alike}; expected a YAML file of flags.")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise PatError(f"{path}: got {size:,} bytes, more than flags can need; expected at most {MAX_BYTES:,}.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PatError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); {_EXPECTED}.") from error
    except OSError as error:
        raise PatError(f"Got --{CONFIG} {str(path)[:200]}, which cannot be read ({error.strerror}).") from error


def _count_events(yaml: Any, loader: Any, text: str, path: Path) -> None:
    """Refuse what is too much or too deep before anything is built of it, which takes recursion."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if number > MAX_VALUES or depth > MAX_DEPTH:
            line = event.start_mark.line + 1
            what = f"more than {MAX_VALUES:,} values" if depth <= MAX_DEPTH else f"{depth} levels of nesting"
            raise PatError(f"{path}, line {line}: got {what}; {_EXPECTED}.")


def _num_values(node: Any, path: Path, known: dict[int, float]) -> float:
    """Count the values that a node stands for, and refuse a name that a mapping has twice."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = math.inf  # as many as it has, if it holds itself
    if node.id == "mapping":
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if key.id == "scalar" and name != "<<" and name in lines:
                raise PatError(f"{path}, line {line}: got {name} a second time (line {lines[name]}); give it once.")
            lines[name] = line
    items = [part for pair in node.value for part in pair] if node.id == "mapping" else node.value
    total = 1 if node.id == "scalar" else 1 + sum(_num_values(item, path, known) for item in items)
    known[id(node)] = total
    return total


def _plain(node: Any, loader: Any) -> Any:
    if node.id == "mapping":
        return loader.construct_object(node, deep=True)
    if node.id == "sequence":
        return [_plain(item, loader) for item in node.value]
    return None if node.tag.endswith(":null") else str(node.value)
