"""The advice to trim a vocabulary that takes much of a model, where `pat tune` would do it."""

from __future__ import annotations

from typing import Any

from pat.data.vocabulary import check_vocabulary_size, trimmed_budget
from pat.errors import PatError
from pat.loading.trimming import MULTIPLE
from pat.plan.options import PlanOptions
from pat.plan.recommend import FIRST_RATIO
from pat.plan.target import named_target
from pat.shape import ShapeOptions, asked_sizes
from pat.surgery.costs import ModelCost

LARGE_EMBEDDING = 0.15
"""Share of the parameters from which on the embedding is large. It is a choice: SmolLM2-135M, where trimming was
measured, has 0.21, and a model with half of that has half as much to gain."""

FEWEST_TOKENS = 32_768
"""Number of tokens below which no vocabulary is advised: on SmolLM2-135M 36,864 of 49,152 gained 0.08 to 0.10 nats, and
24,576 a quarter of that (docs/experiments.md)."""


def three_quarters(vocab_size: int) -> int:
    """Return three quarters of a number of tokens, down to a number that a trimmed vocabulary can have."""
    return vocab_size * 3 // 4 // MULTIPLE * MULTIPLE


def advise_smaller_vocabulary(options: PlanOptions, base_config: Any, base: ModelCost) -> str | None:
    """Return what a smaller vocabulary may gain, where it takes much of a tied model and the flag can be given.

    Args:
        options: of the plan.
        base_config: of the base model.
        base: cost of the base.
    """
    vocab_size = int(base_config.get_text_config().vocab_size)
    share = base.groups["embedding"].num_parameters / base.total.num_parameters
    size = three_quarters(vocab_size)
    if options.vocabulary_size is not None or asked_sizes(options) or named_target(options):
        return None
    if not base.tied or share < LARGE_EMBEDDING or size < FEWEST_TOKENS:
        return None
    try:
        for ratio in options.pruning_ratio or (FIRST_RATIO,):  # which is what the plan recommends
            trimmed_budget(ShapeOptions(pruning_ratio=ratio), base_config, size)
        check_vocabulary_size(options.model_name_or_path, base_config, size)
    except PatError:  # `pat tune` would refuse the flag
        return None
    return (
        f"The vocabulary takes {share:.0%} of the parameters. For data in one language, --vocabulary_size {size} drops "
        "the tokens that the data use least, and more of the layers stays in a model of the same size: SmolLM2-135M, a "
        "quarter cut, lost 0.09 to 0.10 nats less with it after 107,000 tokens (three runs), and 0.08 after 304,000 "
        "(one). Other languages then take more tokens."
    )
