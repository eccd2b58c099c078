"""What the end-to-end tests of `pat tune` share: flags of a short run of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STEPS = 6


def tune_flags(base: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Return the flags of a run of `STEPS` steps that saves no checkpoint, by name; `more` wins."""
    return {
        "model_name_or_path": str(base),
        "dataset_name": str(data),
        "output_dir": str(out),
        "max_steps": STEPS,
        "max_length": 64,
        "held_out": "8",
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "gain_tolerance": 0.4,
        "axes": "hidden",
        "general_text": "none",
        **more,
    }
