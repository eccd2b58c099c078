"""What accelerate's engines would do to an adapter without knowing of its mask: cast it, or take it apart."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from torch.distributed.fsdp import MixedPrecisionPolicy

from pat.errors import PatError
from pat.tuner.model import PatModel
from pat.tuner.prepare import NO_ZERO_3

HALVES = (torch.bfloat16, torch.float16)


def check_zero() -> None:
    """Check that DeepSpeed leaves the weights whole, which are read beside the forward pass.

    Raises:
        PatError: it is to take them apart (ZeRO-3).
    """
    plugin = _plugin("deepspeed_plugin")
    if plugin is not None and plugin.zero_stage == 3:
        raise PatError(NO_ZERO_3)


def check_float32(tuner: PatModel) -> None:
    """Check that the engine has left mask, gates and operators in float32.

    Raises:
        PatError: it has not, as DeepSpeed's own bf16 and fp16 do.
    """
    modules = [*tuner.all_gates(), *tuner.operators().values()]
    found = next((p.dtype for module in modules for p in module.parameters() if p.dtype in HALVES), None)
    if found is not None:
        raise PatError(
            f"Got a mask in {str(found).removeprefix('torch.')}, to which DeepSpeed's own bf16 and fp16 cast whatever "
            "is trained; set bf16=False and fp16=False in the trainer's arguments, or use DDP or FSDP2."
        )


def leave_sharded_dtypes() -> None:
    """Have FSDP2 gather every parameter in its own dtype, mask and operators in float32; autocast does the rest.

    Raises:
        PatError: it is the first FSDP, which hides parameters in flat ones.
    """
    plugin = _plugin("fsdp_plugin")
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise PatError(f"Got fsdp_version {plugin.fsdp_version}; set fsdp_version: 2 (configs/accelerate/fsdp2.yaml).")
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def has_deepspeed() -> bool:
    """Tell whether a trainer of this process has begun with DeepSpeed, whose settings are those of all later ones."""
    return _plugin("deepspeed_plugin") is not None


def _plugin(name: str) -> Any:
    return getattr(AcceleratorState(), name, None) if is_initialized() else None
