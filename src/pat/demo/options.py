"""Options of `pat demo`."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from pat.checkpoint.places import RUN_FILE
from pat.checkpoint.staging import check_output_folder
from pat.errors import PatError
from pat.paths import check_writable, expand_options
from pat.ranges import check_ranges

ADDRESS = "127.0.0.1"
"""Where the page is served: to this machine alone."""

RATIO = "ratio-"
"""Begins the names of the folders of the page's runs."""


@dataclass
class DemoOptions:
    """The folder of the demo, and the few things that can be changed in it."""

    output_dir: Path = field(
        default=Path("pat-demo"),
        metadata={"help": "Folder of the run: new or empty, or that of the same command before."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Instruction data; by default the small set that comes with the package.",
            "names": "dataset",
        },
    )
    cache_dir: Path | None = field(default=None, metadata={"help": "Where the downloaded base model is kept."})
    # A minute and a half of training on two cores (docs/results.md has longer ones). The cut is mild, because so few
    # steps cannot give a model of 135 M parameters back what a larger cut takes: after 25 % its answers are no longer
    # sensible.
    pruning_ratio: float = field(default=0.125, metadata={"help": "Share of all parameters to cut.", "range": "(0, 1)"})
    max_steps: int = field(default=40, metadata={"help": "Number of optimizer steps.", "range": "[1, inf)"})
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
            raise PatError(f"Got port={self.port} without --ui; it is the port of the page.")
        if self.cache_dir is not None:
            check_writable(self.cache_dir / "demo")
        check_writable(self.output_dir)  # names too long to be looked for come to light here
        if self.ui and self.port is not None:
            _check_free(self.port)
        if self.ui and os.path.isdir(self.output_dir) and all(map(_is_of_the_page, self.output_dir.iterdir())):
            return
        if not os.path.isfile(self.output_dir / RUN_FILE):  # else the run says whether it goes on
            self.output_dir = check_output_folder(self.output_dir)


def _is_of_the_page(path: Path) -> bool:
    """Tell whether a folder is that of a run which the page has begun."""
    return path.is_dir() and path.name.startswith(RATIO)


def _check_free(port: int) -> None:
    """Check that the page can be served at a port.

    Raises:
        PatError: it cannot.
    """
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((ADDRESS, port))
        except OSError as error:
            raise PatError(f"Got port={port}, which cannot be used ({error.strerror}); choose another one.") from error
