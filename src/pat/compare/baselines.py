"""Where the baselines come from: they are part of the source tree, not of the installed package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedTokenizerBase

from pat.compare.config import CompareConfig
from pat.compare.data import DataFiles
from pat.errors import PatError
from pat.training.data import load_training_data


def default_folder() -> Path | None:
    """Return `benchmarks/baselines` of the source tree, or of the working folder, None if neither is there."""
    places = (Path(__file__).resolve().parents[3], Path.cwd())
    return next((f for place in places if (f := place / "benchmarks" / "baselines").is_dir()), None)


def load_baselines(folder: Path | None) -> ModuleType:
    """Import the baselines.

    Raises:
        PatError: they are not there.
    """
    found = folder or default_folder()
    if found is None or not (found / "__init__.py").is_file():
        raise PatError(
            f"Got no baselines in {found or 'benchmarks/baselines'}; pass --baselines with that folder of a checkout "
            "of the sources."
        )
    parent = str(found.resolve().parent)
    if parent not in sys.path:
        sys.path.insert(0, parent)
    return importlib.import_module(found.name)


def draw_calibration(
    config: CompareConfig, baselines: ModuleType, tokenizer: PreTrainedTokenizerBase, files: DataFiles, seed: int
) -> Any:
    """Return the text that baselines prune by: token sequences of `max_length`, from the rows to train on.

    Raises:
        PatError: there are too few rows.
    """
    rows = load_training_data(files.train, tokenizer=tokenizer, held_out=0).train
    return baselines.calibration_sequences(
        tokenizer, rows, num_sequences=config.calibration_rows, length=config.max_length, seed=seed
    )
