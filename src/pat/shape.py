"""One budget becomes the sizes of a pruned model, and the options that ask for them.

Two axes can be cut: the hidden size, and the MLP channels of every layer (docs/adr/0015).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pat.errors import PatError
from pat.widths import ALIGNMENT_SLACK, Width, alignment, choose_width, legal_widths, nearest_aligned

DEFAULT_PRUNING_RATIO = 0.25

LARGE_RATIO = 0.5
"""No published result and none of ours cuts more of a model."""

AXES = ("hidden", "mlp")
"""Axes that can be cut: the residual stream, and the channels inside each MLP."""

MOST_OF_THE_MLP = 0.5
"""Share of the MLP channels up to which `axes="auto"` cuts them alone: on SmolLM2-135M a cut of 42 % of them, refitted,
ended 0.25 nats below one of the hidden size with as many parameters (121,000 tokens, one seed, a prototype)."""


@dataclass
class ShapeOptions:
    """Which pruned model is asked for."""

    pruning_ratio: float | None = field(
        default=None, metadata={"help": "Share of all parameters to cut, in (0, 1). Default 0.25."}
    )
    axes: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "What to cut: 'hidden' (the residual stream, as in the paper), 'mlp' (the channels inside each "
            "MLP), both, or 'auto', which takes the MLP first."
        },
    )
    pruned_hidden_size: int | None = field(
        default=None, metadata={"help": "Exact hidden size of the pruned model, instead of a ratio."}
    )
    pruned_intermediate_size: int | None = field(
        default=None, metadata={"help": "Exact number of MLP channels of the pruned model, instead of a ratio."}
    )
    multiple_of: int | None = field(
        default=None, metadata={"help": "Number of channels of which every size that is cut must be a multiple."}
    )
    untie_word_embeddings: bool = field(
        default=False,
        metadata={"help": "Give a tied model an output matrix of its own (adds vocabulary x width parameters)."},
    )


@dataclass(frozen=True)
class Shape:
    """The sizes chosen for a pruned model."""

    hidden: Width
    intermediate_size: int
    """MLP channels of the base model."""
    pruned_intermediate_size: int
    pruning_ratio: float
    """Share of all parameters that is cut, in (0, 1)."""
    reason: str

    def describe(self) -> str:
        """Say what is cut, from how many to how many channels."""
        hidden = self.hidden
        cuts = [f"hidden size {hidden.hidden_size:,} to {hidden.pruned_hidden_size:,}"] if self.cuts_hidden else []
        if self.cuts_mlp:
            cuts.append(f"MLP channels {self.intermediate_size:,} to {self.pruned_intermediate_size:,}")
        return ", ".join(cuts) or "nothing cut"

    @property
    def cuts_hidden(self) -> bool:
        """Whether the hidden size becomes smaller."""
        return self.hidden.pruned_hidden_size < self.hidden.hidden_size

    @property
    def cuts_mlp(self) -> bool:
        """Whether the MLPs become narrower."""
        return self.pruned_intermediate_size < self.intermediate_size


def check_request(options: ShapeOptions, *, pruning_ratio: float | None = None) -> None:
    """Check what can be said of a request without knowing the model; one axis may be given by its name alone.

    Args:
        options: the request; its `axes` become a list.
        pruning_ratio: a ratio beside it, of several.

    Raises:
        PatError: a ratio and a size are given, a number is out of range, or there is no such axis.
    """
    axes: Any = options.axes
    options.axes = [axes] if isinstance(axes, str) else list(axes)
    ratio = options.pruning_ratio if pruning_ratio is None else pruning_ratio  # 0 is out of range
    for name in ("pruned_hidden_size", "pruned_intermediate_size"):
        if ratio is not None and (size := getattr(options, name)) is not None:
            raise PatError(f"Got both pruning_ratio={ratio} and {name}={size}; give one of the two.")
    if ratio is not None and not 0 < ratio < 1:
        raise PatError(
            f"Got pruning_ratio={ratio}; expected a share of the parameters strictly between 0 and 1, such as 0.25."
        )
    if options.multiple_of is not None and options.multiple_of < 1:
        raise PatError(f"Got multiple_of={options.multiple_of}; expected a positive number of channels such as 64.")
    if options.axes != ["auto"] and (not options.axes or set(options.axes) - set(AXES)):
        raise PatError(f"Got axes={options.axes}; expected 'auto', or some of {', '.join(AXES)}.")


def choose_shape(
    hidden_size: int,
    num_attention_heads: int,
    intermediate_size: int,
    count: Callable[[float, float], int],
    *,
    axes: Sequence[str],
    pruning_ratio: float | None = None,
    pruned_hidden_size: int | None = None,
    pruned_intermediate_size: int | None = None,
    multiple_of: int | None = None,
) -> Shape:
    """Choose the sizes of the pruned model: those asked for, or those that a share of all parameters comes to.

    A list of both axes takes the same number of parameters off each. "auto" cuts the MLP alone as long as half of its
    channels stay (`MOST_OF_THE_MLP`), and what is left of the budget off the hidden size.

    Args:
        hidden_size: width of the base model, in channels.
        num_attention_heads: number of query heads; divides every loadable width.
        intermediate_size: MLP channels of the base model; 0 if its MLPs cannot be cut.
        count: returns the number of parameters at shares of the hidden size and of the MLP channels.
        axes: some of `AXES`, or "auto" alone; explicit sizes come before it.
        pruning_ratio: share of all parameters to cut, in (0, 1); 0.25 if neither this nor a size is given.
        pruned_hidden_size: an exact width.
        pruned_intermediate_size: an exact number of MLP channels.
        multiple_of: a hard alignment of what is cut.

    Raises:
        PatError: a size is illegal, nothing would be cut, or the axes cannot give as much as the ratio asks.
    """
    whole = Width(hidden_size, hidden_size, "not cut")
    total = count(1, 1)
    ratio = DEFAULT_PRUNING_RATIO if pruning_ratio is None else pruning_ratio

    def shape(hidden: Width, channels: int, reason: str) -> Shape:
        kept = count(hidden.pruned_hidden_size / hidden_size, channels / intermediate_size if intermediate_size else 1)
        if kept == total:
            raise PatError(f"Got a request that cuts nothing ({reason}); lower multiple_of, or ask for more.")
        return Shape(hidden, intermediate_size, channels, 1 - kept / total, reason)

    def hidden_for(**request: Any) -> Width:
        return choose_width(hidden_size, num_attention_heads, multiple_of=multiple_of, **request)

    def mlp_for(hidden: Width) -> float:
        """Return how many MLP channels the budget leaves beside a width."""
        share = hidden.pruned_hidden_size / hidden_size
        without = count(share, 0)
        return ((1 - ratio) * total - without) * intermediate_size / (count(share, 1) - without)

    if pruned_hidden_size is not None or pruned_intermediate_size is not None:
        hidden = whole if pruned_hidden_size is None else hidden_for(pruned_hidden_size=pruned_hidden_size)
        channels = intermediate_size
        if pruned_intermediate_size is not None:
            channels = _check_channels(intermediate_size, pruned_intermediate_size, multiple_of)
        return shape(hidden, channels, "asked for explicitly")
    if "mlp" in axes and not intermediate_size:
        raise PatError("Got axes with 'mlp', but this family has experts, whose MLPs cannot be cut yet; use 'hidden'.")
    if list(axes) == ["hidden"] or not intermediate_size:
        hidden = hidden_for(pruning_ratio=ratio)
        return shape(hidden, intermediate_size, hidden.reason)
    hidden = whole
    if "hidden" in axes:
        hidden = hidden_for(pruning_ratio=ratio / 2)
    elif list(axes) == ["auto"] and mlp_for(whole) < MOST_OF_THE_MLP * intermediate_size:
        legal = legal_widths(hidden_size, num_attention_heads, multiple_of=multiple_of)
        widths = (Width(hidden_size, width, "what half of the MLP does not give") for width in reversed(legal))
        fitting = (width for width in widths if mlp_for(width) >= MOST_OF_THE_MLP * intermediate_size)
        if (found := next(fitting, None)) is None:
            hidden = hidden_for(pruning_ratio=ratio)
            return shape(hidden, intermediate_size, hidden.reason)
        hidden = found
    asked = mlp_for(hidden)
    if asked < 1:
        most = 1 - count(hidden.pruned_hidden_size / hidden_size, 0) / total
        raise PatError(
            f"Got pruning_ratio={ratio:g} with axes={list(axes)}, but the MLPs hold {most:.1%} of the parameters; add "
            "'hidden', or ask for less."
        )
    channels = nearest_aligned(asked, intermediate_size, multiple_of or 1)
    why = f"cutting {ratio:.4g} of {total:,} parameters leaves {asked:.0f} of {intermediate_size} MLP channels"
    if hidden is not whole:
        why += f" beside hidden size {hidden.pruned_hidden_size}"
    aligned = f", {channels} is the best aligned within {ALIGNMENT_SLACK:.0%} (a multiple of {alignment(channels)})"
    return shape(hidden, channels, why + aligned)


def _check_channels(size: int, asked: int, multiple_of: int | None) -> int:
    if not size:
        raise PatError(f"Got pruned_intermediate_size={asked}, but this family has experts, which cannot be cut yet.")
    if not 0 < asked < size or asked % (multiple_of or 1):
        raise PatError(
            f"Got pruned_intermediate_size={asked}; expected a number below intermediate_size={size}"
            + (f" that is a multiple of {multiple_of}." if multiple_of else ".")
        )
    return asked
