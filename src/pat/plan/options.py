"""Options of `pat plan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pat.paths import expand_options
from pat.shape import ShapeOptions, check_request


@dataclass(kw_only=True)
class PlanOptions(ShapeOptions):
    """One plan for one model, with a column for each ratio."""

    MAIN_FLAGS: ClassVar = ("model_name_or_path", "pruning_ratio")

    model_name_or_path: str = field(metadata={"help": "Base model folder or hub id; only its configuration is read."})
    pruning_ratio: list[float] | None = field(  # type: ignore[assignment]  # several are set side by side
        default=None, metadata={"help": "Shares of all parameters to cut, one or several, in (0, 1). Default 0.25."}
    )
    context: int | None = field(
        default=None,
        metadata={"help": "Number of tokens that costs are for. Default 2048, or as many as the model can read."},
    )
    json: bool = field(default=False, metadata={"help": "Print JSON instead of tables."})

    def __post_init__(self) -> None:
        """Refuse what no model could be pruned to.

        Raises:
            PatError: a ratio is outside (0, 1), or both ratio and width are given.
        """
        expand_options(self)
        self.pruning_ratio = self.pruning_ratio or None
        for ratio in self.pruning_ratio or (None,):
            check_request(self, pruning_ratio=ratio)
