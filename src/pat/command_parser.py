"""Flags of a `pat` command: typed, or from a `--config` file below what is typed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from pat.config_file import read_config, split_config
from pat.errors import PatError


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are `PatError`s, and that takes its description from the command's docstring."""

    def __init__(self, name: str, command: Callable[[Sequence[str]], None]) -> None:
        super().__init__(prog=f"pat {name}", description=command.__doc__, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise PatError(f"{message} (see `{self.prog} --help`).")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command line, below it the flags of a `--config` YAML file if one is named."""
        self.add_argument("--config", metavar="FILE", help="YAML file of flags; those typed here win.")
        path, flags = split_config(argv)
        config = {} if path is None else read_config(path)
        known = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        unknown = sorted(set(config) - set(known))
        if unknown:
            self.error(f"{path}: got the unknown flag(s) {', '.join(unknown)}; expected some of {', '.join(known)}")
        # As typed flags, the file's values go through the same checks.
        typed = [item for name, value in config.items() for item in _as_typed(known[name], value)]
        return self.parse_args([*typed, *map(_underscored, flags)])


def _underscored(argument: str) -> str:
    """Allow `--pruning-ratio` for `--pruning_ratio`, as TRL's parser does."""
    flag, equals, value = argument.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else argument


def _as_typed(action: argparse.Action, value: object) -> list[str]:
    """Return a flag and its value the way they would be typed; nothing for null and for a switch that is off."""
    flag = action.option_strings[-1]
    if value is None or (action.nargs == 0 and value is False):
        return []
    return [flag] if action.nargs == 0 and value is True else [f"{flag}={value}"]
