"""Optimizer states by name, from the engine that wrote a checkpoint to the one that goes on from it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pat.errors import PatError
from pat.training.engines.handover import checkpoint_for, read_states


def trainer(output_dir: Path, *, sharded: bool = False) -> Any:
    model = nn.Linear(3, 2)
    return SimpleNamespace(
        model=model,
        is_fsdp_enabled=sharded,
        args=SimpleNamespace(output_dir=str(output_dir)),
        create_optimizer=lambda: torch.optim.AdamW(model.parameters()),
    )


def test_a_checkpoint_of_another_run_is_copied_before_it_is_changed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs" / "checkpoint-2"
    theirs.mkdir(parents=True)
    states = {"bias": {"step": torch.tensor(2.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
    groups = [{"params": ["weight", "bias"], "lr": 0.25}]
    torch.save({"state": states, "param_groups": groups}, theirs / "optimizer.bin")
    (theirs / "pytorch_model_fsdp.bin").write_bytes(b"sharded")
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    goes_on = trainer(tmp_path / "ours")
    suited_one = checkpoint_for(theirs, goes_on)
    assert suited_one == tmp_path / "ours" / "checkpoint-2"
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before
    assert not (suited_one / "pytorch_model_fsdp.bin").exists()
    read, [group] = read_states(suited_one, goes_on)
    assert list(read) == ["bias"] and torch.equal(read["bias"]["exp_avg"], torch.ones(2)) and group["lr"] == 0.25
    assert checkpoint_for(suited_one, goes_on) == suited_one


def test_fsdp_does_not_go_on_without_a_state_of_the_optimizer(tmp_path: Path) -> None:
    with pytest.raises(PatError, match="has no state of the optimizer, which FSDP does not go on without"):
        read_states(tmp_path, trainer(tmp_path, sharded=True))
