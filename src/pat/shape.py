"""Axes along which a model can be cut, and the options that ask for the sizes of a pruned model.

Every dimension of a weight lies in a space, and an axis is a space that can be cut (docs/adr/0015, 0016).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from string import ascii_letters
from typing import Any

from pat.errors import PatError
from pat.ranges import THOUSANDS, check_ranges

DEFAULT_PRUNING_RATIO = 0.25

RATIO_SLACK = 0.01
"""Said if the share of the parameters that can be cut lies further from the ratio asked for."""

LARGE_RATIO = 0.5
"""No published result and none of ours cuts more of a model."""

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Few digits, since Python refuses to read very long numbers.
_NUMBER = re.compile(r"(?P<number>-?\d{1,20}(?:\.\d{1,20})?)\s*(?P<suffix>[A-Z]*)", re.ASCII)


@dataclass(frozen=True)
class Axis:
    """An axis along which a model can be cut."""

    name: str
    field: str
    """Field of a model's configuration that holds the size; of MLP channels see `pat.families.Family.mlp_field`."""
    label: str
    """What is counted, in words."""

    @property
    def option(self) -> str:
        """Name of the option, and of a record's field, that holds the size of the pruned model."""
        return f"pruned_{self.field}"


AXES = {
    axis.name: axis
    for axis in (
        Axis("hidden", "hidden_size", "hidden size"),
        Axis("mlp", "intermediate_size", "MLP channels"),
        Axis("heads", "num_key_value_heads", "key/value heads"),
        Axis("layers", "num_hidden_layers", "layers"),
    )
}
"""The residual stream, the channels inside each MLP or expert, key/value heads with their queries, and whole layers."""


TARGETS = ("target_num_parameters", "target_bytes", "target_latency")
"""Options that name the size or the speed of the pruned model instead of a share to cut."""


@dataclass
class ShapeOptions:
    """Which pruned model is asked for."""

    pruning_ratio: float | None = field(
        default=None, metadata={"help": "Share of all parameters to cut. Default 0.25.", "range": "(0, 1)"}
    )
    axes: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "What to cut: 'hidden' (the residual stream, as in the paper), 'mlp' (the channels inside each "
            "MLP or expert), 'heads' (key/value heads with their queries), 'layers' (whole layers), several of them, "
            "which give equally many parameters, or 'auto', which takes the MLP first and never heads or layers."
        },
    )
    pruned_hidden_size: int | None = field(
        default=None,
        metadata={"help": "Exact hidden size of the pruned model, instead of a ratio.", "range": "[1, inf)"},
    )
    pruned_intermediate_size: int | None = field(
        default=None,
        metadata={
            "help": "Exact number of channels of each MLP, or of each expert, of the pruned model, instead of a ratio.",
            "range": "[1, inf)",
        },
    )
    pruned_num_key_value_heads: int | None = field(
        default=None,
        metadata={
            "help": "Exact number of key/value heads of the pruned model, instead of a ratio; queries go along.",
            "range": "[1, inf)",
        },
    )
    pruned_num_hidden_layers: int | None = field(
        default=None,
        metadata={"help": "Exact number of layers of the pruned model, instead of a ratio.", "range": "[1, inf)"},
    )
    target_num_parameters: int | str | None = field(
        default=None,
        metadata={
            "help": "Number of parameters that the pruned model has at most, such as 200M, 1.2B or 90000000, instead "
            "of a ratio.",
            "range": "[1, inf)",
        },
    )
    target_bytes: str | None = field(
        default=None,
        metadata={"help": "Largest size of its weights in the dtype of the base's checkpoint, such as 200MB."},
    )
    target_latency: float | None = field(
        default=None,
        metadata={
            "help": "Longest time to read a text, predicted from FLOPs, as a share of the base's.",
            "range": "(0, 1)",
        },
    )
    multiple_of: int | None = field(
        default=None,
        metadata={
            "help": "Number of channels of which a hidden size and MLP channels that are cut must be a multiple.",
            "range": "[1, inf)",
        },
    )
    untie_word_embeddings: bool = field(
        default=False,
        metadata={"help": "Give a tied model an output matrix of its own (adds vocabulary x width parameters)."},
    )


@dataclass(frozen=True)
class Shape:
    """The sizes chosen for a pruned model, by the field of a configuration that holds them."""

    sizes: dict[str, int]
    """Sizes of the base model."""
    pruned_sizes: dict[str, int]
    """Sizes of the pruned model, those that are not cut included."""
    pruning_ratio: float
    """Share of all parameters that is cut, in (0, 1)."""
    reason: str

    def size(self, axis: str) -> int:
        """Return the base model's size along an axis."""
        return self.sizes[AXES[axis].field]

    def pruned(self, axis: str) -> int:
        """Return the pruned model's size along an axis."""
        return self.pruned_sizes[AXES[axis].field]

    def cuts(self, axis: str) -> bool:
        """Tell whether an axis is cut."""
        return self.pruned_sizes.get(AXES[axis].field) != self.sizes.get(AXES[axis].field)

    def describe(self) -> str:
        """Say what is cut, from how many to how many."""
        cuts = [
            f"{axis.label} {self.size(axis.name):,} to {self.pruned(axis.name):,}"
            for axis in AXES.values()
            if self.cuts(axis.name)
        ]
        return ", ".join(cuts) or "nothing cut"


def asked_sizes(options: Any) -> dict[str, int]:
    """Return the exact sizes that options ask for, by axis."""
    given = {axis.name: getattr(options, axis.option) for axis in AXES.values()}
    return {name: size for name, size in given.items() if size is not None}


def missed_ratio(options: Mapping[str, Any], share: float) -> float | None:
    """Return the share of the parameters that was asked for, if another one is cut; None if it is about that.

    Args:
        options: the request, by name. Without a size or a target it asks for a share, by default of a quarter.
        share: what is cut, in (0, 1).
    """
    if any(options.get(name) is not None for name in (*(axis.option for axis in AXES.values()), *TARGETS)):
        return None
    asked = float(options.get("pruning_ratio") or DEFAULT_PRUNING_RATIO)
    return None if abs(share - asked) <= RATIO_SLACK else asked


def check_request(options: ShapeOptions, *, pruning_ratio: float | None = None) -> None:
    """Check what can be said of a request without knowing the model; one axis may be given by its name alone.

    Args:
        options: the request; its `axes` become a list, and a number of parameters in words becomes a number.
        pruning_ratio: a ratio beside it, of several.

    Raises:
        PatError: a ratio and a size are given, a number is out of range, or there is no such axis.
    """
    axes: Any = options.axes
    options.axes = [axes] if isinstance(axes, str) else list(axes)
    if options.target_num_parameters is not None:
        options.target_num_parameters = parse_count(options.target_num_parameters)
    if options.target_bytes is not None:
        parse_bytes(options.target_bytes)
    ratio = options.pruning_ratio if pruning_ratio is None else pruning_ratio  # 0 is out of range
    sizes = {AXES[axis].option: size for axis, size in asked_sizes(options).items()}
    budgets = {"pruning_ratio": ratio, **{name: getattr(options, name) for name in TARGETS}}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) > 1 or (given and sizes):
        (first, one), (second, other) = list({**given, **sizes}.items())[:2]
        raise PatError(f"Got both {first}={one} and {second}={other}; give one of the two.")
    check_ranges(options)
    if options.axes != ["auto"] and (not options.axes or set(options.axes) - set(AXES)):
        raise PatError(f"Got axes={options.axes}; expected 'auto', or some of {', '.join(AXES)}.")


def parse_count(number: Any) -> Any:
    """Return a number of parameters, which may be given as "200M" or "1.2B"; what is no text is left as it is.

    Raises:
        PatError: it is a text that stands for no whole number.
    """
    if not isinstance(number, str):
        return number
    count = _number(number, _COUNTS)
    if count is None or count.denominator != 1:
        raise PatError(
            f"Got target_num_parameters={number[:100]!r}; expected a whole number of parameters, such as 200M, 1.2B or "
            f"90000000 (bytes, such as 200MB, are for target_bytes){_without_comma(number, _COUNTS) or '.'}"
        )
    return int(count)


def parse_bytes(size: Any) -> int:
    """Return a number of bytes, which may be given as "200MB" or "1.5GB".

    Raises:
        PatError: it is no such number.
    """
    number = _number(str(size), _BYTES)
    if number is None or number < 1:
        hint = _without_comma(str(size), _BYTES) or "."
        raise PatError(f"Got target_bytes={str(size)[:100]!r}; expected a size such as 200MB or 1.5GB{hint}")
    return int(number)


def _without_comma(text: str, suffixes: Mapping[str, int]) -> str:
    """Return the end of a message with what a number with a decimal comma, or commas between thousands, stands for."""
    text = text.strip()[:100]
    number = text.rstrip(f"{ascii_letters} ")
    meant = text.replace(",", "" if THOUSANDS.match(number) else ".")
    value = _number(meant, suffixes) if "," in text else None
    return f"; did you mean {meant}?" if value is not None and value >= 1 and value.denominator == 1 else ""


def _number(text: str, suffixes: Mapping[str, int]) -> Fraction | None:
    """Return what a number with a suffix comes to, exactly; None if the text is none."""
    found = _NUMBER.fullmatch(text.strip().upper())
    return Fraction(found["number"]) * suffixes[found["suffix"]] if found and found["suffix"] in suffixes else None
