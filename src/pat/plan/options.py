"""Options of `pat plan`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from pat.errors import PatError
from pat.paths import expand_options
from pat.ranges import check_ranges
from pat.report.figure import check_figure
from pat.shape import AXES, ShapeOptions, check_request


@dataclass(kw_only=True)
class PlanOptions(ShapeOptions):
    """One plan for one model, with a column for each ratio."""

    MAIN_FLAGS: ClassVar = ("model_name_or_path", "pruning_ratio")

    model_name_or_path: str = field(
        metadata={
            "help": "Base model folder or hub id; only its configuration is read, unless --calibrate is given.",
            "names": "model",
        }
    )
    pruning_ratio: list[float] | None = field(  # type: ignore[assignment]  # several are set side by side
        default=None,
        metadata={"help": "Shares of all parameters to cut, one or several. Default 0.25.", "range": "(0, 1)"},
    )
    context: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens that costs are for. Default 2048, or as many as the model can read.",
            "range": "[1, inf)",
        },
    )
    vocabulary_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a trimmed vocabulary, see `pat tune`; they count in the ratio.",
            "range": "[1, inf)",
        },
    )
    calibrate: str | None = field(
        default=None,
        metadata={
            "help": "Instruction data, as for `pat tune`: measure on it what cutting each axis costs before any "
            "training, and which shapes under the budget come out best. Needs the model's weights, and takes "
            "minutes or hours: a line says how long, from what the base takes on this machine.",
            "names": "dataset",
        },
    )
    shape_search_steps: int = field(
        default=0,
        metadata={
            "help": "Steps of the default recipe that each of these shapes is tuned for, with --calibrate, before they "
            "are ranked; what is best before training need not be best after it.",
            "range": "[0, inf)",
        },
    )
    cpu_time: bool = field(
        default=False,
        metadata={"help": "Time a layer and the head for some seconds, to tell how long LoRA takes on this CPU."},
    )
    gpus: int | None = field(
        default=None,
        metadata={
            "help": "GPUs of each machine, to see what every one of them holds when training is sharded (FSDP2).",
            "range": "[1, 1024]",
        },
    )
    nodes: int = field(default=1, metadata={"help": "Number of machines, beside --gpus.", "range": "[1, 4096]"})
    figure: Path | None = field(
        default=None, metadata={"help": "PNG file, new or an earlier figure, for the curves that --calibrate measures."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON instead of tables."})

    def __post_init__(self) -> None:
        """Refuse what no model could be pruned to.

        Raises:
            PatError: a ratio is outside (0, 1), or both ratio and width are given.
        """
        expand_options(self)
        check_ranges(self)
        if self.calibrate is not None:
            self._check_calibration()
        if self.shape_search_steps and self.calibrate is None:
            raise PatError("Got shape_search_steps without calibrate, whose data it tunes on; give --calibrate DATA.")
        if self.figure is not None and self.calibrate is None:
            raise PatError("Got figure without calibrate, which measures what it shows; give --calibrate DATA as well.")
        if self.nodes > 1 and self.gpus is None:
            raise PatError(f"Got nodes={self.nodes} without gpus; give --gpus, the number of GPUs of each machine.")
        if self.figure is not None:
            check_figure(self.figure)
        self.pruning_ratio = self.pruning_ratio or None
        for ratio in self.pruning_ratio or (None,):
            check_request(self, pruning_ratio=ratio)

    def _check_calibration(self) -> None:
        """Refuse what the measurement, which is of all axes of the whole model under one ratio, does not know of."""
        beside = [axis.option for axis in AXES.values()]
        beside += ["axes", "vocabulary_size", "multiple_of", "untie_word_embeddings"]
        defaults = {option.name: option.default for option in fields(self)} | {"axes": ["auto"]}
        given = [name for name in beside if getattr(self, name) != defaults[name]]
        if len(ratios := self.pruning_ratio or ()) > 1:
            raise PatError(f"Got calibrate beside {len(ratios)} ratios; it measures under one budget, so give one.")
        if given:
            raise PatError(
                f"Got calibrate beside {', '.join(given)}; it measures all axes of the whole model, so leave them out."
            )
