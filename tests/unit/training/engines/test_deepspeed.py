"""DeepSpeed, without it: which runs are refused under it, and from which of its checkpoints a run goes on."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import build
from tiny_training import attach
from transformers import TrainerState

from pat.errors import PatError
from pat.training.arguments import TuneArguments, build_arguments
from pat.training.engines.accelerated import check_float32
from pat.training.engines.deepspeed import check_goes_on
from pat.training.preflight.check import check
from pat.training.run.whole import flaw, num_parts
from pat.tuner.model import find_tuner

PARTS = "global_step2/zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def arguments(folder: Path, stage: int = 2, **flags: Any) -> TuneArguments:
    """Return arguments of a run under DeepSpeed, as the launcher and its configuration would make them."""
    build("llama", tied=True).config.save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text(json.dumps({"text": "a"}))
    config = flags.pop("config", {})
    places = {
        "model_name_or_path": folder / "base",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "out",
    }
    made = build_arguments(**{**places, "bf16": False, **flags})
    made.sft.deepspeed_plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
    return made


@pytest.mark.parametrize(
    "flags",
    [
        {"axes": "mlp"},
        {"axes": "mlp", "stage": 1},
        {"axes": "hidden", "milestone": 0},
        {"axes": "hidden", "no_compact": True},
    ],
)
def test_a_run_that_hands_nothing_over_is_let_pass(flags: dict[str, Any], tmp_path: Path) -> None:
    check(arguments(tmp_path, **flags))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"stage": 3}, "Got DeepSpeed's ZeRO-3, which leaves no weight whole"),
        ({"stage": 0}, "Got ZeRO-0"),
        ({"milestone": 0.3}, r"Got a milestone of 0.3 with DeepSpeed; .*set --milestone 0 or --no_compact true"),
        ({"axes": "hidden"}, "Got a milestone of 0.02"),
        ({"bf16": True}, "Got --bf16 with DeepSpeed; set --bf16 false"),
        ({"fp16": True}, "Got --fp16"),
        ({"torch_compile": True}, "Got --torch_compile"),
        ({"distill": True}, "Got --distill"),
        ({"load_in_4bit": True, "axes": "mlp"}, "Got a quantised base"),
        ({"config": {"optimizer": {}, "scheduler": {}}}, "Got a configuration with optimizer and scheduler"),
    ],
)
def test_what_it_cannot_do_is_refused(flags: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(PatError, match=words):
        check(arguments(tmp_path, **flags))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of two processes, of which the first has its own files, and DeepSpeed's, each by its name."""
    folder = tmp_path / "out" / "checkpoints" / "compact" / "checkpoint-2"
    (folder / "global_step2").mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    states = ("scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "global_step2/mp_rank_00_model_states.pt")
    for name in (*states, PARTS.format(0), PARTS.format(1)):
        torch.save({}, folder / name)
    (folder / "latest").write_text("global_step2")
    TrainerState(global_step=2).save_to_json(str(folder / "trainer_state.json"))
    return folder


def test_a_checkpoint_is_whole_with_all_of_its_parts(checkpoint: Path) -> None:
    assert flaw(checkpoint) is None and num_parts(checkpoint) == 2
    second = checkpoint / PARTS.format(1)
    content = second.read_bytes()
    second.write_bytes(content[:-50])
    assert f"its latest is not readable ({second.name}: File is not a zip file)" in str(flaw(checkpoint))
    second.unlink()
    assert "global_step2 has parts of the processes [0], of 2" in str(flaw(checkpoint))
    second.write_bytes(content)
    assert flaw(checkpoint) is None
    (checkpoint / "global_step2" / "mp_rank_00_model_states.pt").unlink()
    assert "mp_rank_00_model_states.pt" in str(flaw(checkpoint))
    (checkpoint / "latest").write_text("../../elsewhere")
    assert "names '../../elsewhere' instead of a folder of DeepSpeed's" in str(flaw(checkpoint))
    torch.save({}, checkpoint / "optimizer.pt")  # which hides nothing
    assert "names '../../elsewhere'" in str(flaw(checkpoint))
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "latest").unlink()
    assert flaw(checkpoint) == "it has no optimizer.pt" and num_parts(checkpoint) is None


def test_it_goes_on_from_its_own_checkpoints_in_as_many_processes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = arguments(tmp_path)
    plugin = run.sft.deepspeed_plugin
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_goes_on(str(checkpoint), run)
    check_goes_on(None, run)
    outside = checkpoint.rename(tmp_path / "checkpoint-2")
    with pytest.raises(PatError, match="DeepSpeed opens checkpoints as pickles, which can run programs"):
        check_goes_on(str(outside), run)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(PatError, match="a part for each of 2 processes, and got 4 processes; go on under DeepSpeed"):
        check_goes_on(str(outside), run)
    run.sft.deepspeed_plugin = None
    with pytest.raises(PatError, match="a part for each of 2 processes, and got another engine"):
        check_goes_on(str(outside), run)
    run.sft.deepspeed_plugin = plugin
    monkeypatch.setenv("WORLD_SIZE", "2")
    linked = tmp_path / "out" / "checkpoints" / "compact" / "checkpoint-3"
    linked.mkdir()
    (linked / "latest").write_text("global_step2")
    (linked / "global_step2").symlink_to(outside / "global_step2")
    with pytest.raises(PatError, match="DeepSpeed opens checkpoints as pickles"):
        check_goes_on(str(linked), run)
    run.sft.deepspeed_plugin = None
    (outside / "latest").unlink()
    check_goes_on(str(outside), run)
    run.sft.deepspeed_plugin = plugin
    with pytest.raises(PatError, match="was not written by DeepSpeed"):
        check_goes_on(str(outside), run)


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
@pytest.mark.parametrize("by_flag", [True, False])
def test_where_it_is_not_installed_one_line_says_so(
    by_flag: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"deepspeed": "ds.json"} if by_flag else {}
    if not by_flag:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(PatError, match=r"^Got DeepSpeed, which is not installed: pip install deepspeed"):
        build_arguments(model_name_or_path="m", dataset_name="d", output_dir=str(tmp_path / "out"), **flags)


def test_a_mask_that_an_engine_has_cast_is_refused() -> None:
    tuner = find_tuner(attach(build("llama", tied=True)))
    assert tuner is not None
    check_float32(tuner)
    tuner.bfloat16()
    with pytest.raises(PatError, match="Got a mask in bfloat16, expected float32: something has cast it"):
        check_float32(tuner)
