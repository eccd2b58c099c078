"""`--config file.yaml`: flags of a command line kept in a file; the flags that are typed win over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pat.errors import PatError

FLAG = "--config"


def split_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Take `--config FILE` or `--config=FILE` out of a command line; return the file and the rest.

    Raises:
        PatError: the flag has no value, or is given twice.
    """
    path: str | None = None
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument != FLAG and not argument.startswith(f"{FLAG}="):
            rest.append(argument)
            continue
        value = argument.partition("=")[2] if "=" in argument else next(arguments, "")
        if not value:
            raise PatError(f"Got {FLAG} without a value; expected a YAML file of flags.")
        if path is not None:
            raise PatError(f"Got {FLAG} twice ({path} and {value}); give one file.")
        path = value
    return (None if path is None else Path(path).expanduser()), rest


def read_config(path: Path) -> dict[str, Any]:
    """Read a file of flags, a YAML mapping of their names without dashes to their values.

    Raises:
        PatError: no such file, no YAML, or no mapping.
    """
    if not path.is_file():
        raise PatError(f"Got {FLAG} {path}, but there is no such file; expected a YAML file of flags.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        place = f"{path}, line {where.line + 1}" if where is not None else str(path)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise PatError(f"{place}: not valid YAML ({reason}); expected lines such as `pruning_ratio: 0.25`.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise PatError(f"{path}: got no YAML mapping; expected lines such as `pruning_ratio: 0.25`.")
    return content
