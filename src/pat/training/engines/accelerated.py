"""Keeps accelerate's engines from casting the mask and operators of an adapter, or taking their weights apart."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from torch.distributed.fsdp import MixedPrecisionPolicy

from pat.errors import PatError
from pat.tuner.model import PatModel
from pat.tuner.zero import NO_ZERO_3

HALVES = (torch.bfloat16, torch.float16)


def check_installed(deepspeed: Any) -> None:
    """Check that DeepSpeed is there, if it is asked for; transformers would say so in words of its own.

    Args:
        deepspeed: the flag of this name; a launcher says it by a variable of the environment.

    Raises:
        PatError: it is not.
    """
    asked = deepspeed is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if asked and find_spec("deepspeed") is None:
        raise PatError("Got DeepSpeed, which is not installed: pip install deepspeed, or use DDP or FSDP2.")


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
        PatError: one of them is in half precision.
    """
    modules = [*tuner.all_gates(), *tuner.operators().values()]
    found = next((p.dtype for module in modules for p in module.parameters() if p.dtype in HALVES), None)
    if found is not None:
        cause, remedy = "something has cast it", "leave mask and operators as they are attached, and train by autocast"
        if has_deepspeed():
            cause = "DeepSpeed's own bf16 and fp16 cast whatever is trained"
            remedy = "set bf16=False and fp16=False in the trainer's arguments, or use DDP or FSDP2"
        raise PatError(f"Got a mask in {str(found).removeprefix('torch.')}, expected float32: {cause}; {remedy}.")


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
