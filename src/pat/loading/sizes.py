"""Sizes that no model has, refused in a configuration's file before transformers makes anything of them."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from pat.errors import PatError

logger = logging.getLogger(__name__)

COUNTS = {
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**16,
    "max_position_embeddings": 2**40,
    "moe_intermediate_size": 2**24,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "num_experts_per_tok": 2**14,
}
"""Fields that have to be positive whole numbers where a model has them, and the largest that is not taken for a slip.

transformers builds as many layers as it is told, and lists of their kinds even before it builds them.
"""

MAX_NUMBER = 2**53
"""Whole numbers beyond are refused in any other field."""

MAX_DEPTH = 20

MAX_CONFIG_BYTES = 2**24
"""Size of a `config.json`; no known one comes near."""


def check_sizes(name: str, fields: Any, place: str = "config.json", depth: int = 0) -> None:
    """Refuse sizes that no model has, and say that a model's own code is not run.

    Args:
        name: of the model.
        fields: content of its `config.json`, or of a part of that; None if it could not be read.
        place: the part.
        depth: of the part.

    Raises:
        PatError: a whole number is beyond what there is.
    """
    if depth > MAX_DEPTH:
        raise PatError(f"The configuration of the model {name!r} is not usable: config.json is nested too deeply.")
    for item in fields if isinstance(fields, list) else ():
        check_sizes(name, item, place, depth + 1)
    for field, value in fields.items() if isinstance(fields, dict) else ():
        largest = COUNTS.get(field, MAX_NUMBER)
        if isinstance(value, int) and abs(value) > largest:
            raise PatError(
                f"The configuration of the model {name!r} is not usable: {field}={value!r} in {place}; expected at "
                f"most {largest:,}."
            )
        if isinstance(value, dict | list):
            check_sizes(name, value, place if depth else f"{field} of {place}", depth + 1)
    if depth == 0 and isinstance(fields, dict) and "auto_map" in fields:
        _say_that_code_is_not_run(name)


def is_count(value: Any) -> bool:
    """Tell whether a value is a positive whole number, or not there."""
    return value is None or (isinstance(value, int) and value > 0)


@cache
def _say_that_code_is_not_run(name: str) -> None:
    logger.warning(
        "%s brings code of its own (auto_map in its config.json), which is not run; that of transformers is.", name
    )
