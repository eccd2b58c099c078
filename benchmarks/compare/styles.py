"""How each method is drawn, in every figure alike: no two share a colour, and those of one kind share a hue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compare.methods import Method


@dataclass(frozen=True)
class Style:
    """Colour and marker of a method."""

    color: str
    marker: str
    level: str = "--"
    """Line style of a level across, of a method that does not prune."""

    def of_line(self, method: Method) -> dict[str, Any]:
        """Return the arguments of a line of it; what the comparison is about is to be found at once."""
        is_pat = method.label == "PAT"
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": "--" if method.order in ("FT", "FT→P") else "-",
            "linewidth": 2.2 if is_pat else 1.2,
            "markersize": 6.5 if is_pat else 4.5,
            "zorder": 4 if is_pat else 3,
        }


STYLES: dict[str, Style] = {
    "base": Style("#7f7f7f", "_", ":"),
    "lora": Style("#0072b2", "s"),
    "dora": Style("#56b4e9", "D", "-."),
    "llm_pruner": Style("#d55e00", "^"),
    "llm_pruner_after": Style("#f2a46b", "v"),
    "llm_pruner_published": Style("#8a3800", "p"),
    "slicegpt": Style("#009e73", "P"),
    "slicegpt_after": Style("#7fd1b4", "X"),
    "minitron": Style("#a3157a", "D"),
    "minitron_ce": Style("#d98cc3", "d"),
    "shortgpt": Style("#e0a100", "h"),
    "magnitude": Style("#8c564b", "<"),
    "random": Style("#b8a99a", ">"),
    "pat": Style("#000000", "o"),
    "pat_heads": Style("#6a3d9a", "o"),
    "pat_hidden": Style("#3b4cc0", "o"),
    "pat_vocabulary": Style("#00b3a4", "o"),
    "pat_no_refit": Style("#8da0e8", "o"),
    "pat_milestone_fiftieth": Style("#525252", "o"),
    "pat_milestone_tenth": Style("#858585", "o"),
    "pat_milestone_third": Style("#b0b0b0", "o"),
    "pat_dora": Style("#1b5e8c", "o"),
    "pat_full_width": Style("#7a7a00", "o"),
    "pat_paper": Style("#b2182b", "*"),
    "pat_paper_frozen_mask": Style("#e0566b", "*"),
    "pat_paper_no_identity": Style("#f4a6b0", "*"),
}
"""Styles by the method's name; the main ones have Okabe and Ito's colours, which colour-blind people can tell apart."""
