"""Where the baselines come from: they are part of the source tree, not of the installed package."""

from __future__ import annotations

import hashlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedTokenizerBase

from compare.config import CompareConfig
from compare.data import DataFiles
from pat.errors import PatError
from pat.training.data import load_training_data


def default_folder() -> Path:
    """Return the folder of the baselines beside this file."""
    return Path(__file__).parent / "baselines"


def baselines_folder(folder: Path | None) -> Path:
    """Return where the baselines are.

    Args:
        folder: where they are said to be; None for `default_folder`.

    Raises:
        PatError: they are not there.
    """
    found = folder or default_folder()
    if found is None or not (found / "__init__.py").is_file():
        raise PatError(
            f"Got no baselines in {found or 'benchmarks/baselines'}; pass --baselines with that folder of a checkout "
            "of the sources."
        )
    return found


def load_baselines(folder: Path | None) -> ModuleType:
    """Import the baselines of `baselines_folder`."""
    found = baselines_folder(folder)
    # Under a name of their own: "baselines" may be another folder's, or a module of somebody else's.
    place = found.resolve()
    name = f"pat_baselines_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, place / "__init__.py", submodule_search_locations=[str(place)])
        assert spec is not None and spec.loader is not None, "it is a file, and ends in .py"
        module = module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


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
