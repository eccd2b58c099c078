"""Options of a command, declared once as a dataclass: its fields are flags, keys of a `--config` file and keywords.

`transformers.HfArgumentParser` does the same, but its import takes 0.5 to 0.7 s, more than `pat --help` may take in
all. Booleans, lists and choices are written as they are there.
"""

from __future__ import annotations

import argparse
import difflib
import re
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from pat.config_file import CONFIG, read_config, set_environment
from pat.errors import PatError
from pat.option import Option

T = TypeVar("T")

SAME = (
    ("model_name_or_path", "base_model", "model", "base"),
    ("dataset_name", "calibrate", "dataset", "data"),
    ("output_dir", "output"),
    ("lora_r", "lora_rank", "rank"),
)
"""Names that commands, and people, have for the same thing; that of a command is suggested for any of the others."""

GIVEN = "given"
"""Field, with a default, of a dataclass of several parts that is no part: the names of the options that were given."""

_FLAG = re.compile("--?[^-0-9.]")
"""Beginning of a word that is meant as a flag; negative numbers begin otherwise."""

MAX_SHOWN = 200
"""Letters of a value that a message repeats."""


class OptionsParser(argparse.ArgumentParser, Generic[T]):
    """Makes an options dataclass of a command line, a `--config` file below it, and defaults below that.

    The fields of the dataclass may be dataclasses themselves, whose fields are then the flags. If several of them have
    a field of the same name, all get the value, and the first one says its type, default and help.

    The parser reads these attributes of the class: `USAGE`, `DESCRIPTION`, `MAIN_FLAGS` (names that open the help),
    `REFUSED` (names of fields that would do nothing, each with the value that is so anyway and the reason), `RANGES`
    (of numbers whose fields do not say one themselves, see `pat.ranges`), and the static method `defaults(given)`,
    which returns defaults that win over those of the fields. A dataclass of several parts may have a field `GIVEN`
    besides, a set of names.
    """

    def __init__(self, prog: str, options: type[T], summary: str = "") -> None:
        super().__init__(
            prog=prog,
            usage=getattr(options, "USAGE", None),
            description=getattr(options, "DESCRIPTION", summary),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        self._class = options
        self._sections = _sections(options)
        self._refused: Mapping[str, tuple[Any, str]] = getattr(options, "REFUSED", {})
        self.options = {option.name: option for _, _, own in reversed(self._sections) for option in own}
        self._others: frozenset[str] | None = frozenset()

    # -- the three ways in -------------------------------------------------------------------------------------

    def parse(self, argv: Sequence[str]) -> T:
        """Parse a command line; flags that are typed win over those of a `--config` file.

        Raises:
            PatError: an unknown flag, a value that does not fit, a flag that is missing, or a file that cannot be read.
        """
        return self._make(self.read(argv))

    def build(self, keywords: Mapping[str, Any]) -> T:
        """Make the options of Python keywords.

        Raises:
            PatError: see `parse`.
        """
        self._refuse_unknown(dict.fromkeys(keywords, ""), "", keywords)
        given = {name: self._read(name, value, f"{name}={value!r}") for name, value in keywords.items()}
        return self._make(self._without_nothing(given))

    def read(self, argv: Sequence[str], *, others: frozenset[str] | None = frozenset()) -> dict[str, Any]:
        """Return what a command line and its `--config` file give, and look for the models and data that they name.

        Args:
            argv: words of the command line.
            others: names of flags that are let pass, because another parser reads them; None lets all pass.

        Raises:
            PatError: see `parse`.
        """
        self._others = others
        self._declare()
        words, rest = self.parse_known_args([_underscored(argument) for argument in argv])
        typed = vars(words)
        files = typed.pop(CONFIG, [])
        if len(files) > 1:
            raise PatError(f"Got --{CONFIG} twice ({' and '.join(files)}); give one file.")
        given = self._read_file(Path(files[0]).expanduser()) if files else {}
        if rest:
            flags = [item.partition("=")[0] for item in rest if _FLAG.match(item)]
            unknown = {flag.lstrip("-"): flag[: -len(flag.lstrip("-"))] for flag in flags}
            if not flags:
                self.error(f"Got {' '.join(rest)!r} without a flag before it")
            self._refuse_unknown(unknown, "", {**given, **typed})
        for name, value in typed.items():
            shown = " ".join(value) if isinstance(value, list) else str(value)
            given[name] = self._read(name, value, f"--{name} {shown!r}")
        for name, value in given.items():
            self.options[name].look_for(value)
        return given

    def check(self, given: Mapping[str, Any]) -> None:
        """Check that nothing that has to be given is missing, and that numbers are in range.

        Raises:
            PatError: an option is missing, or a number is out of its range.
        """
        self.require(given)
        for name, value in given.items():
            self.options[name].check(value)

    def require(self, given: Mapping[str, Any]) -> None:
        """Check that nothing that has to be given is missing.

        Raises:
            PatError: it is.
        """
        if missing := self._missing(given):
            name, *others = missing
            beside = f"; so {'are' if others[1:] else 'is'} {_listed(others, '--')}" if others else ""
            self.error(f"--{name} is missing ({self.options[name].help.partition('. ')[0].rstrip('.')}){beside}")

    def _missing(self, given: Mapping[str, Any]) -> list[str]:
        options = self.options.items()
        return [name for name, option in options if option.default is MISSING and given.get(name) in (None, "")]

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise PatError(f"{message} (see `{self.prog} --help`).")

    # -- parts -------------------------------------------------------------------------------------------------

    def _declare(self) -> None:
        defaults = self._lower_layer({})
        main = getattr(self._class, "MAIN_FLAGS", ())
        groups = [("main flags", [self.options[name] for name in main if name in self.options])] if main else []
        groups += [
            (heading, [option for option in own if option.name not in main]) for heading, _, own in self._sections
        ]
        for heading, own in groups:
            group = self.add_argument_group(heading)
            for option in own:
                if self.options[option.name] is option:
                    hidden = option.name in self._refused
                    option.add_to(group, defaults.get(option.name, option.default), hidden=hidden)
        other = self.add_argument_group("other")
        other.add_argument(f"--{CONFIG}", action="append", metavar="FILE", help="YAML file of flags; typed ones win.")

    def _lower_layer(self, given: Mapping[str, Any]) -> dict[str, Any]:
        layer = getattr(self._class, "defaults", None)
        return layer(given) if callable(layer) else {}

    def _read_file(self, path: Path) -> dict[str, Any]:
        given, unknown = {}, {}
        for name, value, line in read_config(path):
            place = f"{path}, line {line}"
            if name == "env":
                set_environment(value, place)
            elif name in self.options:
                given[name] = self._read(name, value, f"{name} {value!r}", place)
            else:
                unknown[name] = line
        if lines := [str(line) for name, line in unknown.items() if not self._passes(name)]:
            place = f"{path}, line{'s' * (len(lines) > 1)} {_listed(lines)}"
            self._refuse_unknown(dict.fromkeys(unknown, ""), place, None)
        return self._without_nothing(given)

    def _passes(self, name: str) -> bool:
        """Tell whether a flag is known here, or may be read by another parser."""
        return name in self.options or self._others is None or bool({name, name.removeprefix("no_")} & self._others)

    def _without_nothing(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out what is nothing, as after the colon in a file: the default holds, unless none is a value."""
        return {name: value for name, value in given.items() if value is not None or self.options[name].none_is_value}

    def _read(self, name: str, value: Any, shown: str, place: str = "") -> Any:
        try:
            return self.options[name].read(value)
        except ValueError as error:
            shown = f"{name} (not shown)" if self.options[name].is_secret else _shortened(shown)
            self.error(f"{place}: got {shown}; expected {error}" if place else f"Got {shown}; expected {error}")

    def _refuse_unknown(self, names: Mapping[str, str], place: str, given: Mapping[str, Any] | None) -> None:
        """Refuse names that no option has; each comes with the dashes that it was typed with.

        All of them are named at once, each with the option that it likely means, and what is missing besides; `given`
        is None where that cannot be known yet.
        """
        unknown = {name: dashes for name, dashes in names.items() if dashes == "-" or not self._passes(name)}
        if not unknown:
            return
        prefix = "--" if any(unknown.values()) else ""
        near = {name: match for name in unknown for match in ([name] if self._passes(name) else self._like(name))}
        meant = [
            f"{prefix}{match}{f' for {unknown[name]}{name}' if len(unknown) > 1 else ''}"
            for name, match in near.items()
        ]
        guess = f"; did you mean {_shortened(' and '.join(meant))}?" if near else ""
        missing = [] if given is None else [name for name in self._missing(given) if name not in near.values()]
        if missing:
            guess += f"{'' if near else ';'} {'M' if near else 'm'}issing besides: {_listed(missing, prefix)}"
        named = _shortened(", ".join(dashes + name for name, dashes in unknown.items()))
        flags = f"unknown flag{'s' * (len(unknown) > 1)} {named}"
        self.error(f"{place}: got the {flags}{guess}" if place else f"Got the {flags}{guess}")

    def _like(self, name: str) -> list[str]:
        """Return the option that a name likely means: a main one that it shortens, the same thing, or a name alike."""
        known = [option for option in (*self.options, *sorted(self._others or ())) if option not in self._refused]
        if name.startswith("no_"):
            known += [f"no_{option}" for option in known]
        main = [option for option in getattr(self._class, "MAIN_FLAGS", ()) if option in known]
        likely = [
            option
            for option in main
            if option.startswith(name)
            or option.endswith(f"_{name}")
            or name == "".join(word[:1] for word in option.split("_"))
        ]
        same = [option for names in SAME if name in names for option in names if option in known]
        return (likely or same or difflib.get_close_matches(name, [*main, *known], n=1))[:1]

    def _make(self, given: Mapping[str, Any]) -> T:
        self.require(given)
        for name in set(given) & set(self._refused):
            harmless, reason = self._refused[name]
            if given[name] != harmless:
                self.error(f"Got {name}={given[name]!r}, but {reason}; leave it out")
        values = {**self._lower_layer(given), **given}
        for name, value in values.items():
            self.options[name].check(value)
        try:
            with warnings.catch_warnings():  # of the libraries, about names of theirs that are to change
                warnings.simplefilter("ignore", FutureWarning)
                parts = [
                    owner(**{field.name: values[field.name] for field in fields(owner) if field.name in values})
                    for _, owner, _ in self._sections
                ]
            named = {GIVEN: frozenset(given)} if hasattr(self._class, GIVEN) else {}
            return parts[0] if self._sections[0][1] is self._class else self._class(*parts, **named)
        except PatError:
            raise
        except (ValueError, TypeError, OSError, ImportError) as error:  # what the libraries' own checks raise
            self.error(" ".join(str(error).split()).rstrip("."))


def _sections(options: type[Any]) -> list[tuple[str, type[Any], list[Option]]]:
    """Return heading, dataclass and options of each part that an options dataclass is made of; often it is one."""
    hints = typing.get_type_hints(options)
    own = [field for field in fields(options) if field.name != GIVEN]
    parts = [(field.metadata.get("section", field.name), hints[field.name]) for field in own]
    if not all(is_dataclass(part) for _, part in parts):
        parts = [("flags", options)]
    annotations = {part: typing.get_type_hints(part) for _, part in parts}
    ranges: Mapping[str, str] = getattr(options, "RANGES", {})

    def read(part: type[Any]) -> list[Option]:
        names = [field for field in fields(part) if field.init]
        return [Option.of(field, annotations[part][field.name], ranges.get(field.name)) for field in names]

    return [(heading, part, read(part)) for heading, part in parts]


def _listed(names: Sequence[str], prefix: str = "") -> str:
    """Return names as they stand in a sentence."""
    shown = [prefix + name for name in names]
    return " and ".join([*([", ".join(shown[:-1])] if shown[1:] else []), shown[-1]])


def _shortened(text: str) -> str:
    """Return what a message has room for of a value."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _underscored(argument: str) -> str:
    """Allow `--pruning-ratio` for `--pruning_ratio`, as the libraries' parsers do."""
    flag, equals, value = argument.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else argument
