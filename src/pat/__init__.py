"""Pruning-Aware Tuning: fine-tune a language model and get it back smaller.

Importing this package registers the PEFT method `PAT`; see the README for the three lines it takes.
"""

import logging
from typing import TYPE_CHECKING

# peft imports bitsandbytes if it is there, and that warns on some processors (AVX512-BF16) of a kernel that could be
# installed, as the first line of whatever a command says.
if (_noisy := logging.getLogger("bitsandbytes.backends.cpu.ops")).level == logging.NOTSET:
    _noisy.setLevel(logging.ERROR)

from pat.errors import PatError
from pat.tuner import PatConfig

if TYPE_CHECKING:
    from pat.training.callback import PatCallback
    from pat.training.tune import tune

__version__ = "0.1.0"

__all__ = ["PatCallback", "PatConfig", "PatError", "tune"]


if not TYPE_CHECKING:  # or every name would be taken for one of this package's

    def __getattr__(name: str) -> object:
        """Import what trains when it is asked for: merging and evaluating do without TRL and datasets."""
        if name == "PatCallback":
            from pat.training.callback import PatCallback

            return PatCallback
        if name == "tune":
            from pat.training.tune import tune

            return tune
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
