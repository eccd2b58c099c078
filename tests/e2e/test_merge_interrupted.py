"""`pat merge` killed at any moment: nothing half-written has the target's name, and the next run starts clean."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import faults
import pytest
import torch
from hardened import hardened
from tiny_models import build, tiny_tokenizer
from transformers import AutoModelForCausalLM

from pat.checkpoint.merge import merge
from pat.checkpoint.shards import ShardWriter
from pat.cli import main


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    torch.manual_seed(0)
    build("llama", tied=False).save_pretrained(folder / "base", max_shard_size="60KB")
    tiny_tokenizer(folder / "base")
    hardened(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "adapter")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_killed_or_torn_at_any_operation_it_leaves_all_or_nothing_under_the_targets_name(
    places: Path, tmp_path: Path
) -> None:
    """The merge runs once; its folder is copied as a kill at each file operation would leave it, some go on."""
    made, kept = tmp_path / "made", tmp_path / "kept"
    made.mkdir()
    kept.mkdir()
    argv = ["merge", "--adapter", str(places / "adapter"), "--output_dir", str(made / "out")]
    outcome = faults.run(argv, made, kept=kept)
    assert outcome.status == 0, outcome.said
    whole = digests(made / "out")
    left = sorted(kept.iterdir(), key=lambda copy: (int(copy.name.partition("-")[0]), copy.name))
    assert len(left) > 20
    for copy in left:
        names = {path.name for path in copy.iterdir()}
        staged = [name for name in names if name.startswith(".out.tmp-")]
        assert names == {*staged, *(["out"] if "out" in names else [])} and len(staged) <= 1, copy.name
        assert "out" not in names or digests(copy / "out") == whole, copy.name
    unfinished = [copy for copy in left if not (copy / "out").exists()]
    for copy in (unfinished[1], unfinished[len(unfinished) // 2], unfinished[-1]):
        shutil.rmtree(made)
        shutil.copytree(copy, made)
        assert main(argv) == 0
        assert [path.name for path in made.iterdir()] == ["out"]
        again = digests(made / "out")
        assert {name for name, digest in again.items() if whole.get(name) != digest} <= {
            "results.json"
        }  # holds seconds
        assert again.keys() == whole.keys()


def test_an_interrupted_merge_leaves_nothing_at_all(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShardWriter.write

    def interrupted(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        if name == "model.norm.weight":
            raise KeyboardInterrupt
        write(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(places / "adapter", tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


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
