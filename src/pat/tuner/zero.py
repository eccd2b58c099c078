"""Refuses DeepSpeed's ZeRO-3, which takes a model apart where it is made."""

from __future__ import annotations

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from pat.errors import PatError

NO_ZERO_3 = (
    "Got DeepSpeed's ZeRO-3, which leaves no weight whole to choose channels by; set zero_stage: 2, or shard the "
    "weights by FSDP2 (configs/accelerate/fsdp2.yaml)."
)


def check_not_taken_apart() -> None:
    """Check that models of this process are made whole.

    Raises:
        PatError: DeepSpeed takes them apart.
    """
    if is_deepspeed_zero3_enabled():
        raise PatError(NO_ZERO_3)
