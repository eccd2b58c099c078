"""Measure on text what cutting each axis costs before any training, and which shapes come out best under a budget.

`scorer.py` cuts and scores; here the time that it takes is said, the shapes are tuned if that is asked for, and what
was measured until an interruption is shown.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

from pat.errors import Interrupted, RunFailed
from pat.families import Family
from pat.plan.curves import Measured, Point, print_measured
from pat.plan.scorer import ShapeScorer
from pat.plan.search import tuned_nll
from pat.plan.work import say_expected_time
from pat.report.progress import hidden, phase, progress_bar
from pat.training.preflight.threads import using


def measure_shapes(
    name: str,
    dataset: str,
    base_config: Any,
    family: Family,
    *,
    pruning_ratio: float,
    target: Mapping[str, Any] | None = None,
    num_steps: int = 0,
    shown: bool = True,
) -> Measured:
    """Measure curves and candidates.

    Args:
        name: base model.
        dataset: instruction data, as for `pat tune`.
        base_config: of the base model.
        family: of the base model.
        pruning_ratio: budget, as a share of all parameters.
        target: for the size or the speed, by its option, if it is what the budget comes from; no candidate exceeds it.
        num_steps: optimizer steps to tune each candidate for.
        shown: whether a bar is drawn if a person is looking.

    Raises:
        PatError: the data cannot be used, or no axis can be cut as far as the budget asks.
    """
    scorer = ShapeScorer(name, dataset, base_config, family, target)
    tuned: list[Point] = []
    try:
        with using(scorer.threads):
            # The phases within are hidden: what is left of them says nothing of the whole.
            with phase("Measuring shapes", "shapes", shown=shown) as state, hidden():
                scorer.run(pruning_ratio, state, partial(say_expected_time, num_steps=num_steps) if shown else None)
            measured = scorer.measured()
            if not num_steps:
                return measured
            del scorer.model  # it is not needed beside those that are tuned
            with progress_bar("Tuning shapes", "shapes", shown=shown) as bar:
                for point in measured.candidates:
                    tuned.append(replace(point, tuned_nll=tuned_nll(name, dataset, point.sizes, num_steps)))
                    bar(len(tuned), len(measured.candidates))
    except (KeyboardInterrupt, RunFailed) as error:
        if scorer.losses:  # minutes of work, which must not be lost
            found = scorer.measured()
            found = replace(found, candidates=(*tuned, *found.candidates[len(tuned) :]))
            print("Measured until then:", file=sys.stderr)
            print_measured(replace(found, num_steps=num_steps if tuned else 0), file=sys.stderr)
        if isinstance(error, Interrupted):  # it speaks of a checkpoint, whose folder is gone
            raise Interrupted("Interrupted while shapes were tuned.", error.exit_status - 128) from error
        raise
    best_first = sorted(tuned, key=lambda point: cast(float, point.tuned_nll))
    return replace(measured, candidates=tuple(best_first), num_steps=num_steps)
