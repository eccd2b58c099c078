"""The engine that trains, as launcher and flags choose it: one process, DDP or FSDP2 (see `deepspeed.py` as well)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from pat import ranks
from pat.errors import PatError
from pat.loading import quantization_of

if TYPE_CHECKING:
    from pat.training.arguments import TuneArguments

ROOM = 1.2
"""How much larger than a model the free memory of a device has to be for a forward pass on it."""


def quantises(arguments: TuneArguments, base_config: Any) -> bool:
    """Tell whether a run's base is quantised, by a flag or in its checkpoint."""
    model = arguments.model
    return bool(model.load_in_4bit or model.load_in_8bit) or quantization_of(base_config) is not None


def check_engine(arguments: TuneArguments, base_config: Any) -> None:
    """Check that a run can be trained by the engine that it is started under.

    Args:
        arguments: of the run.
        base_config: configuration of the base.

    Raises:
        PatError: it cannot; the message says what can.
    """
    sft = arguments.sft
    if not shards(sft):
        return
    given = sft.fsdp_plugin_args or {}
    version = given.get("fsdp_version", _environment("FSDP_VERSION") or 1)
    form = given.get("state_dict_type", _environment("FSDP_STATE_DICT_TYPE").upper() or "FULL_STATE_DICT")
    loading = given.get("cpu_ram_efficient_loading", _environment("FSDP_CPU_RAM_EFFICIENT_LOADING"))
    for wrong, what, remedy in (
        (int(version) != 2, f"fsdp_version {version}", "set fsdp_version: 2"),
        (form != "FULL_STATE_DICT", f"fsdp_state_dict_type {form}", "set FULL_STATE_DICT: an adapter is small"),
        (
            loading in (True, "true"),
            "fsdp_cpu_ram_efficient_loading",
            "set it to false: it leaves out a mask's buffers",
        ),
        (sft.torch_compile, "--torch_compile", "leave it out"),
        (arguments.distill.distill, "--distill", "leave it out: a sharded student cannot be looked into"),
        (
            quantises(arguments, base_config),
            "a quantised base",
            "load it in 16 bits, or use DDP",
        ),
    ):
        if wrong:
            raise PatError(f"Got {what} with FSDP; {remedy} (see configs/accelerate/fsdp2.yaml).")


def shards(sft: Any) -> bool:
    """Tell whether the engine leaves each process a part of the weights (FSDP)."""
    return bool(sft.fsdp) or (ranks.num_processes() > 1 and _environment("ACCELERATE_USE_FSDP") == "true")


def place_for(model: torch.nn.Module, sft: Any) -> torch.device:
    """Return where a base model goes once it is loaded: onto the trainer's device.

    One that is to be sharded stays on the CPU if it is too large for that, and is moved part by part.
    """
    device: torch.device = sft.device
    if not shards(sft) or device.type != "cuda":
        return device
    size = sum(parameter.nbytes for parameter in model.parameters())
    return device if ROOM * size < torch.cuda.mem_get_info(device)[0] else torch.device("cpu")


def describe(device: str) -> str:
    """Say on what a run is trained: the device, and the number of processes, or of GPUs that are left idle."""
    if ranks.num_processes() > 1:
        return f"{device}, in {ranks.num_processes()} processes"
    num_devices = torch.cuda.device_count()
    idle = num_devices > 1 and device.startswith("cuda")
    return f"{device}, one of {num_devices} GPUs (`pat launch` takes them all)" if idle else device


def _environment(name: str) -> str:
    return os.environ.get(name, "").lower()
