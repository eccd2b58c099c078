"""Options of `pat demo`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from pat.checkpoint.staging import check_output_folder
from pat.errors import PatError
from pat.paths import check_writable, expand_options
from pat.ranges import check_ranges


@dataclass
class DemoOptions:
    """The folder of the demo, and the few things that can be changed in it."""

    output_dir: Path = field(
        default=Path("pat-demo"),
        metadata={"help": "Folder of the run: new or empty, or that of the same command before."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instruction data; by default the small set that comes with the package."}
    )
    cache_dir: Path | None = field(default=None, metadata={"help": "Where the downloaded base model is kept."})
    # About ten minutes of training on two cores. The cut is mild, because so few steps cannot give a model of 135 M
    # parameters back what a larger cut takes: after 25 % its answers are no longer sensible.
    pruning_ratio: float = field(default=0.125, metadata={"help": "Share of all parameters to cut.", "range": "(0, 1)"})
    max_steps: int = field(
        default=150, metadata={"help": "Optimizer steps; more give a better model.", "range": "[1, inf)"}
    )
    ui: bool = field(
        default=False,
        metadata={"help": "Serve a page on this machine instead: choose, run, and talk to both models (extra `ui`)."},
    )
    port: int | None = field(
        default=None, metadata={"help": "Port of that page; by default the first free one.", "range": "[1, 65535]"}
    )

    def __post_init__(self) -> None:
        """Refuse what would fail after the download.

        Raises:
            PatError: a ratio or number of steps that cannot be, an output folder that is not empty, places that cannot
                be written, or a page without gradio.
        """
        expand_options(self)
        check_ranges(self)
        if self.ui and find_spec("gradio") is None:
            raise PatError("--ui needs gradio, which is not installed; install the extra: pip install 'pat-llm[ui]'.")
        if self.port is not None and not self.ui:
            raise PatError(f"Got port={self.port}, which is of the page; expected --ui true beside it.")
        if self.cache_dir is not None:
            check_writable(self.cache_dir / "demo")
        check_writable(self.output_dir)  # names too long to be looked for come to light here
        if not os.path.isfile(self.output_dir / "run.json"):  # else the run says whether it goes on
            self.output_dir = check_output_folder(self.output_dir)
