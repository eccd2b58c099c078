"""What the tests of several processes share: a short run, a port for it, and what two runs have to have in common."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

STEPS = 6

LOSS = 1e-5
"""Largest difference of a loss in nats: float32, sums in another order. AdamW's epsilon is raised, because with 1e-8 it
turns gradients that are made of rounding into whole steps."""


def run_flags(base: Path, data: Path, out: Path, batch_size: int, **more: Any) -> list[str]:
    """Return the arguments of a short run in float32; `more` wins."""
    given = {
        "model_name_or_path": base,
        "dataset_name": data,
        "output_dir": out,
        "per_device_train_batch_size": batch_size,
        "max_steps": STEPS,
        "held_out": 8,
        "max_length": 64,
        "refit_tokens": 512,
        "adam_epsilon": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": "true",
        "use_cpu": "true",
        "dtype": "float32",
        "bf16": "false",
        **more,
    }
    return ["tune", *(word for name, value in given.items() for word in (f"--{name}", *str(value).split(",")))]


def free_port() -> int:
    """Return a port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def losses(out: Path) -> list[float]:
    """Return the losses of both stages."""
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return [row["loss"] for row in record["log_history"] if "loss" in row]


def check_same(out: Path, reference: Path) -> None:
    """Check that a run has taken the steps of another one and kept the same channels."""
    mine, others = losses(out), losses(reference)
    assert len(mine) == len(others) == STEPS
    assert max(abs(one - other) for one, other in zip(mine, others, strict=True)) <= LOSS
    kept, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, reference))
    gates = [name for name in expected if name.endswith(".keep")]
    assert len(gates) > 1 and all(torch.equal(kept[name], expected[name]) for name in gates)
