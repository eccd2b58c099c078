"""Temperature and offset of the soft mask: pure functions of the optimizer step (paper, eq. 7 and 8)."""

from __future__ import annotations

import math

HARD_TEMPERATURE = 1e8
"""1/epsilon of eq. 7. The hard mask never evaluates a sigmoid with it; the value documents the limit."""


def milestone_step(milestone: float, num_steps: int) -> int:
    """Return s0, the optimizer step from which the mask is 0/1.

    Args:
        milestone: share of all optimizer steps, in [0, 1].
        num_steps: number of optimizer steps of the run.
    """
    return round(milestone * num_steps)


def temperature(step: int, milestone_step: int) -> float:
    """Return tau(s) of eq. 7: 1 at the first step, growing without bound towards the milestone.

    ln(0) is read as ln(1), and s0 = 1 has the single soft value tau(0) = 1.
    """
    if step >= milestone_step:
        return HARD_TEMPERATURE
    if step <= 1:
        return 1.0
    return 1.0 / (1.0 - math.log(step) / math.log(milestone_step))


def offset(step: int, milestone_step: int) -> float:
    """Return beta(s) of eq. 8: 1/2 at step 0, falling linearly to 0 at half of the milestone."""
    if step >= milestone_step / 2:
        return 0.0
    return 0.5 - step / milestone_step
