"""Pruning-Aware Tuning: fine-tune a language model and get it back smaller.

Importing this package registers the PEFT method `PAT`; see the README for the three lines it takes.
"""

from typing import TYPE_CHECKING, Any

from pat.errors import PatError
from pat.tuner import PatConfig

if TYPE_CHECKING:
    from pat.training.callback import PatCallback
    from pat.training.tune import tune

__version__ = "0.1.0"

__all__ = ["PatCallback", "PatConfig", "PatError", "tune"]


def __getattr__(name: str) -> Any:
    """Import what trains when it is asked for: merging and evaluating do without TRL and datasets."""
    if name == "PatCallback":
        from pat.training.callback import PatCallback

        return PatCallback
    if name == "tune":
        from pat.training.tune import tune

        return tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, those too that are not imported yet."""
    return sorted({*globals(), *__all__})
