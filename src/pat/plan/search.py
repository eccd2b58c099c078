"""Tune a shape for a few steps, since what is best before training need not be best after it."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from pat.errors import PatError
from pat.training.tune import tune


def tuned_nll(name: str, dataset: str, sizes: Mapping[str, int], num_steps: int) -> float:
    """Run `pat tune` for some steps, and return the held-out loss of the dense model.

    Raises:
        PatError: see `pat.tune`; or no row is held out.
    """
    with tempfile.TemporaryDirectory() as folder, _silently():
        result = tune(
            model_name_or_path=name,
            dataset_name=dataset,
            output_dir=str(Path(folder) / "run"),
            max_steps=num_steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **sizes,
        )
    if (nll := result.figures["dense"].held_out_nll) is None:
        raise PatError(f"Got {dataset}, of which no row is held out; expected more rows.")
    return nll


@contextmanager
def _silently() -> Iterator[None]:
    """Have runs say nothing: what is worth saying of the data has been said, and the rest is no news of a plan."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
