"""One budget becomes the sizes of a pruned model.

Coarse axes choose first, so that finer ones can make up for what their steps leave: layers, key/value heads, the hidden
size, MLP channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pat.errors import PatError
from pat.prunable import HEADS, HIDDEN, LAYERS, MLP, Prunable, Sizes
from pat.shape import AXES, DEFAULT_PRUNING_RATIO, RATIO_SLACK, Shape
from pat.widths import ALIGNMENT_SLACK, alignment, choose_width, legal_widths, nearest_aligned

MOST_OF_THE_MLP = 0.5
"""Share of the MLP channels up to which `axes="auto"` cuts them alone: on SmolLM2-135M a cut of 42 % of them, refitted,
ended 0.25 nats below one of the hidden size with as many parameters (121,000 tokens, one seed, a prototype)."""

COARSE_FIRST = ("layers", "heads", "hidden", "mlp")

MORE_OF_THE_COARSE = 64
"""Number of steps in which coarser axes take over the part of the finest, where that cannot give it."""


class CutsNothing(PatError):
    """A request so small that the nearest legal size is the base's."""


class TooMuch(PatError):
    """A request for more parameters than the finest of the axes has beside the others."""


def choose_shape(
    base: Prunable,
    *,
    axes: Sequence[str],
    pruning_ratio: float | None = None,
    asked: Mapping[str, int] | None = None,
    multiple_of: int | None = None,
) -> Shape:
    """Choose the sizes of the pruned model: those asked for, or those that a share of all parameters comes to.

    A list of axes takes equally many parameters off each, as near as legal sizes come to it, and more off coarser ones
    where the finest cannot give its part; heads and MLP channels go by one ratio where the hidden size stays. "auto"
    cuts the MLP alone while half of its channels stay (`MOST_OF_THE_MLP`), and what is left off the hidden size.

    Args:
        base: what there is to be cut.
        axes: some of `AXES`, or "auto" alone; explicit sizes come before it.
        pruning_ratio: share of all parameters to cut, in (0, 1); 0.25 if neither this nor a size is given.
        asked: exact sizes, by axis.
        multiple_of: a hard alignment of hidden size and MLP channels, if they are cut.

    Raises:
        PatError: a size is illegal, an axis cannot be cut, nothing would be cut, or the axes cannot give as much as
            the ratio asks.
    """
    budget = _Budget(base, list(axes), DEFAULT_PRUNING_RATIO if pruning_ratio is None else pruning_ratio, multiple_of)
    for name, size in (asked or {}).items():
        if name in base.obstacles:
            raise PatError(f"Got {AXES[name].option}={size}, but {base.obstacles[name]}; leave it out.")
    if asked:
        sizes, reason = budget.explicit(asked), "asked for explicitly"
    elif budget.axes == ["auto"]:
        sizes, reason = budget.automatic()
    else:
        for name in (name for name in axes if name in base.obstacles):
            raise PatError(f"Got axes with {name!r}, but {base.obstacles[name]}; use {budget.alternatives()}.")
        sizes, reason = budget.shared([name for name in COARSE_FIRST if name in axes])
    kept = base.count(sizes)
    if kept == budget.total:
        raise CutsNothing(f"Got a request that cuts nothing ({reason}); lower multiple_of, or ask for more.")
    return Shape(dict(base.sizes), sizes, 1 - kept / budget.total, reason)


class _Budget:
    """A share of all parameters, to be taken off some axes."""

    def __init__(self, base: Prunable, axes: list[str], ratio: float, multiple_of: int | None) -> None:
        self.base, self.axes, self.ratio, self.multiple_of = base, axes, ratio, multiple_of
        self.mlp_step = math.lcm(base.mlp_step, multiple_of or 1)
        self.total = base.count(base.sizes)

    def alternatives(self) -> str:
        """Name the axes that can be cut."""
        return " or ".join(repr(name) for name in AXES if name not in self.base.obstacles)

    def explicit(self, asked: Mapping[str, int]) -> dict[str, int]:
        """Check exact sizes; of the heads that are left the hidden size has to be a multiple."""
        sizes = dict(self.base.sizes)
        for name in (name for name in COARSE_FIRST if name in asked):
            axis, size = AXES[name], asked[name]
            if name == "hidden":
                heads = self.base.num_attention_heads(sizes)
                width = choose_width(sizes[HIDDEN], heads, pruned_hidden_size=size, multiple_of=self.multiple_of)
                size = width.pruned_hidden_size
            elif name == "mlp":
                if not 0 < size < sizes[MLP] or size % self.mlp_step:
                    aligned = f" that is a multiple of {self.mlp_step}" if self.mlp_step > 1 else ""
                    raise PatError(
                        f"Got {axis.option}={size}; expected a number below the base's {sizes[MLP]} {axis.label}"
                        f"{aligned}."
                    )
            elif size not in (legal := self.legal(name, None if "hidden" in asked else sizes[HIDDEN])):
                raise PatError(
                    f"Got {axis.option}={size}; expected {_one_of(legal)} of {sizes[axis.field]}{self.why(name)}."
                )
            sizes[axis.field] = size
        return sizes

    def automatic(self) -> tuple[dict[str, int], str]:
        """Take the budget off the MLP while half of it stays, and what is left off the hidden size."""
        sizes = dict(self.base.sizes)
        if "mlp" in self.base.obstacles:
            return self.shared(["hidden"])
        least = MOST_OF_THE_MLP * sizes[MLP]
        if self.channels_at(sizes) < least:
            heads = self.base.num_attention_heads(sizes)
            legal = legal_widths(sizes[HIDDEN], heads, multiple_of=self.multiple_of)
            fitting = (width for width in reversed(legal) if self.channels_at(sizes | {HIDDEN: width}) >= least)
            if (found := next(fitting, None)) is None:
                smallest = {HIDDEN: legal[0], MLP: math.ceil(least)}
                why = f" (a hidden size of {legal[0]} and {smallest[MLP]} MLP channels)"
                raise self._too_much(self.base.count(sizes | smallest), why)
            sizes[HIDDEN] = found
        return self.mlp(sizes)

    def shared(self, named: Sequence[str]) -> tuple[dict[str, int], str]:
        """Take an equal part of the budget off each axis; what the last one cannot give falls to those before it."""
        found = []
        for step in range(MORE_OF_THE_COARSE + 1):
            try:
                sizes, reason = self.shares(named, step / MORE_OF_THE_COARSE)
            except TooMuch:
                if len(named) == 1:
                    raise
                continue
            uncut = sum(sizes[AXES[name].field] == self.base.sizes[AXES[name].field] for name in named)
            missed = abs(1 - self.base.count(sizes) / self.total - self.ratio)
            if step == 0 or (uncut == 0 and missed <= RATIO_SLACK):
                return sizes, reason
            found.append((uncut, missed, step, sizes, reason))
        if found:
            *_, sizes, reason = min(found, key=lambda each: each[:3])
            return sizes, reason
        least = self.least(named)
        raise self._too_much(self.base.count(least), f" ({Shape(self.base.sizes, least, self.ratio, '').describe()})")

    def least(self, named: Sequence[str]) -> dict[str, int]:
        """Return the smallest sizes along some axes together, coarse ones first."""
        sizes = dict(self.base.sizes)
        for name in named:
            if name == "hidden":
                heads = self.base.num_attention_heads(sizes)
                least = legal_widths(sizes[HIDDEN], heads, multiple_of=self.multiple_of)[0]
            else:
                legal = self.legal(name, None if "hidden" in named else sizes[HIDDEN])
                least = self.mlp_step if name == "mlp" else min(legal, default=sizes[AXES[name].field])
            sizes[AXES[name].field] = least
        return sizes

    def shares(self, named: Sequence[str], more: float) -> tuple[dict[str, int], str]:
        """Take an equal part off each axis, and the share `more`, in [0, 1], of what the axes after it were to give."""
        sizes, reason = dict(self.base.sizes), ""
        for position, name in enumerate(named, start=1):
            is_last, part = name == named[-1], position / len(named)  # by this axis and those before it
            share = self.ratio * (part + more * (1 - part))
            if name == "mlp":
                sizes, reason = self.mlp(sizes)
            elif name == "heads" and "mlp" in named and "hidden" not in named:
                sizes = self.as_many_heads_as_channels(sizes)
            elif name == "hidden":
                sizes, reason = self.width(sizes, share, is_last=is_last)
            else:
                sizes, reason = self.nearest(name, sizes, share, free_width="hidden" in named, is_last=is_last)
        return sizes, f"{reason}; the coarser axes give more than an equal part" if more else reason

    def as_many_heads_as_channels(self, sizes: dict[str, int]) -> dict[str, int]:
        """Choose the key/value heads of which the share that stays is nearest to that of the MLP channels then."""

        def distance(heads: int) -> float:
            channels = self.channels_at(sizes | {HEADS: heads}) / sizes[MLP]
            return abs(heads / sizes[HEADS] - min(1.0, channels))

        return sizes | {HEADS: min(reversed([*self.legal("heads", sizes[HIDDEN]), sizes[HEADS]]), key=distance)}

    def width(self, sizes: dict[str, int], share: float, *, is_last: bool) -> tuple[dict[str, int], str]:
        """Choose the hidden size that brings the cut to a share of all parameters."""
        count, beside = self.base.count(sizes), self.beside(sizes, "hidden")
        if count < self.total:  # a cut of the hidden size by a share takes that share off what is left
            share = 1 - (1 - share) * self.total / count
        if share <= 0:
            return sizes, f"nothing is left to be cut of the hidden size{beside}"
        heads = self.base.num_attention_heads(sizes)
        legal = legal_widths(sizes[HIDDEN], heads, multiple_of=self.multiple_of)
        if is_last and sizes[HIDDEN] * (1 - share) < (1 - ALIGNMENT_SLACK) * legal[0]:
            raise self._too_much(self.base.count(sizes | {HIDDEN: legal[0]}), f" (a hidden size of {legal[0]})")
        found = choose_width(sizes[HIDDEN], heads, pruning_ratio=share, multiple_of=self.multiple_of)
        reason = f"{found.reason};{beside}" if beside else found.reason
        return sizes | {HIDDEN: found.pruned_hidden_size}, reason

    def mlp(self, sizes: dict[str, int]) -> tuple[dict[str, int], str]:
        """Take what is left of the budget off the MLP channels."""
        asked = self.channels_at(sizes)
        if asked < 1:
            most = 1 - self.base.count(sizes | {MLP: 0}) / self.total
            raise TooMuch(
                f"Got pruning_ratio={self.ratio:g} with axes={self.axes}, but the MLPs hold {most:.1%} of the "
                "parameters; add 'hidden', or ask for less."
            )
        channels = nearest_aligned(asked, sizes[MLP], self.mlp_step)
        why = f"cutting {self.ratio:.4g} of {self.total:,} parameters leaves {asked:.0f} of {sizes[MLP]} MLP channels"
        why += self.beside(sizes, "mlp")
        if (best := alignment(channels)) == 1:
            return sizes | {MLP: channels}, why if channels == round(asked) else f"{why}; {channels} is the nearest"
        is_near = 0 <= asked - channels <= ALIGNMENT_SLACK * asked
        among = f"from there to {ALIGNMENT_SLACK:.0%} below, " if is_near else ""
        return sizes | {MLP: channels}, f"{why}; {among}{channels} suits hardware best (a multiple of {best})"

    def channels_at(self, sizes: Sizes) -> float:
        """Return how many MLP channels the budget leaves beside other sizes."""
        without = self.base.count({**sizes, MLP: 0})
        whole = self.base.sizes[MLP]
        return ((1 - self.ratio) * self.total - without) * whole / (self.base.count({**sizes, MLP: whole}) - without)

    def nearest(
        self, name: str, sizes: dict[str, int], share: float, *, free_width: bool, is_last: bool
    ) -> tuple[dict[str, int], str]:
        """Choose the legal size of a coarse axis that comes nearest to a share of all parameters."""
        axis, goal = AXES[name], (1 - share) * self.total
        whole = sizes[axis.field]
        options = {
            n: self.base.count(sizes | {axis.field: n}) for n in self.legal(name, None if free_width else sizes[HIDDEN])
        }
        least = min(options.values(), default=self.total)
        # Steps of several axes seldom come to the budget exactly, so that a little less has to do.
        slack = RATIO_SLACK * self.total if len(self.axes) > 1 else 0.0
        if is_last and least - goal > slack:
            raise self._too_much(least, self.why(name))
        options[whole] = self.base.count(sizes)
        chosen = min(options, key=lambda n: (abs(options[n] - goal), n))
        why = f"{chosen} of {whole} {axis.label} come nearest to cutting {share:.4g} of {self.total:,} parameters"
        return sizes | {axis.field: chosen}, why + self.beside(sizes, name)

    def _too_much(self, least: int, why: str) -> TooMuch:
        left = [] if self.axes == ["auto"] else [name for name in AXES if name not in self.axes]
        others = f"add {' or '.join(left)}, or " if left else ""
        return TooMuch(
            f"Got pruning_ratio={self.ratio:g} with axes={self.axes}, which can give {1 - least / self.total:.1%} "
            f"of the parameters at most{why}; {others}ask for less."
        )

    def legal(self, name: str, hidden_size: int | None) -> list[int]:
        """List the sizes below the base's of a coarse axis, ascending; those that go with a width, if it stays."""
        if name == "layers":
            return list(range(self.base.fewest_layers, self.base.sizes[LAYERS]))
        groups = range(1, self.base.sizes[HEADS])
        return [n for n in groups if hidden_size is None or hidden_size % (n * self.base.queries_per_group) == 0]

    def why(self, name: str) -> str:
        """Say what makes sizes of a coarse axis legal, as a part of a sentence."""
        if name == "heads":
            queries = self.base.queries_per_group
            each = f"{queries} query heads each" if queries > 1 else "one query head each"
            return f" ({each}; transformers needs {HIDDEN} to be a multiple of the number of query heads)"
        fewest = self.base.fewest_layers
        return f" ({fewest} are of rarer kinds, and stay)" if fewest > 1 else ""

    def beside(self, sizes: Sizes, name: str) -> str:
        """Name the sizes that other axes have come to."""
        others = [AXES[n] for n in ("hidden", "heads", "layers") if n != name]
        cut = [axis for axis in others if sizes[axis.field] < self.base.sizes[axis.field]]
        if not cut:
            return ""
        words = (f"{a.label} {sizes[a.field]}" if a.name == "hidden" else f"{sizes[a.field]} {a.label}" for a in cut)
        return f" beside {' and '.join(words)}"


def _one_of(legal: Sequence[int]) -> str:
    if not legal:
        return "no other number"
    if len(legal) > 2 and list(legal) == list(range(legal[0], legal[-1] + 1)):
        return f"{legal[0]} to {legal[-1]}"
    return " or ".join(map(str, legal))
