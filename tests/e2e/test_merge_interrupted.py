"""`pat merge` killed at any moment: nothing half-written has the target's name, and the next run starts clean."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hardened import hardened
from tiny_models import build, tiny_tokenizer
from transformers import AutoModelForCausalLM

from pat.checkpoint.merge import merge
from pat.checkpoint.shards import ShardWriter
from pat.cli import main

KILLED_MERGE = """
import os, signal, sys
from pat.checkpoint import shards, write
from pat.cli import main

moment = int(sys.argv[1])
count = 0

def counted(function):
    def wrapper(*args, **options):
        global count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return wrapper

shards.ShardWriter.write = counted(shards.ShardWriter.write)
write.compare = counted(write.compare)
os.replace = counted(os.replace)
sys.exit(main(["merge", *sys.argv[2:]]))
"""
"""Kills itself at one of the moments at which something is about to be written, compared or renamed."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    torch.manual_seed(0)
    build("llama", tied=False).save_pretrained(folder / "base", max_shard_size="60KB")
    tiny_tokenizer(folder / "base")
    hardened(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def clean(places: Path) -> Iterator[Path]:
    before = set(places.iterdir())
    yield places
    assert set(places.iterdir()) == before, "the next run has left something"


def run_until_killed(places: Path, moment: int) -> int:
    flags = ["--adapter", str(places / "adapter"), "--output_dir", str(places / "out")]
    command = [sys.executable, "-c", KILLED_MERGE, str(moment), *flags]
    return subprocess.run(command, capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 25, 51, 52, 53])
def test_a_killed_merge_leaves_nothing_under_the_targets_name(moment: int, clean: Path) -> None:
    assert run_until_killed(clean, moment) == -9
    assert not (clean / "out").exists()
    assert len(list(clean.glob(".out.tmp-*"))) == 1
    assert main(["merge", "--adapter", str(clean / "adapter"), "--output_dir", str(clean / "out")]) == 0
    assert not list(clean.glob(".out.tmp-*"))
    assert AutoModelForCausalLM.from_pretrained(clean / "out").config.hidden_size == 36
    for path in (clean / "out").iterdir():
        path.unlink()
    (clean / "out").rmdir()


def test_an_interrupted_merge_leaves_nothing_at_all(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ShardWriter.write

    def interrupted(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        if name == "model.norm.weight":
            raise KeyboardInterrupt
        write(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(clean / "adapter", clean / "out", progress=False)


def test_shards_are_as_large_as_the_bases(places: Path, tmp_path: Path) -> None:
    merge(places / "adapter", tmp_path / "out", progress=False)
    base, out = (
        sorted(path.stat().st_size for path in f.glob("*.safetensors")) for f in (places / "base", tmp_path / "out")
    )
    assert len(base) > 3
    assert 1 < len(out) <= len(base)
    assert base[-1] / 2 < out[-1] <= 60_000 + 10_000  # beside the tensors there is a header
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_the_size_of_shards_can_be_asked_for(places: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = ["--adapter", str(places / "adapter"), "--output_dir", str(output), "--max_shard_size", "1GB"]
    assert main(["merge", *flags]) == 0
    assert [path.name for path in output.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (output / "model.safetensors.index.json").exists()
