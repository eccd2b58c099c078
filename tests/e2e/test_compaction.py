"""Training in two stages is the run it would have been at full width, and leaves an ordinary LoRA model."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import build, tiny_tokenizer
from tiny_runs import STEPS, tune_flags
from transformers import AutoModelForCausalLM

import pat
from pat.checkpoint.merge import merge
from pat.cli import main
from pat.errors import PatError
from pat.training.arguments import build_arguments
from pat.training.run.checkpoints import last_checkpoint
from pat.training.stages import Stages
from pat.training.tune import run_tune
from pat.tuner import PatModel

MILESTONE = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied Llama in float32 with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    build("llama", tied=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instruction data: three steps an epoch, so that the second stage crosses one."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": f"say {i}", "output": f"it is {i * i}"} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def flags(base: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    return tune_flags(base, data, out) | {
        "per_device_train_batch_size": 4,
        "milestone": MILESTONE / STEPS,
        "learning_rate": 5e-3,
        "max_grad_norm": 0,  # the norm is over other parameters in the second stage
        **more,
    }


def logged(out: Path, name: str) -> list[float]:
    history = json.loads((out / "results.json").read_text(encoding="utf-8"))["log_history"]
    return [row[name] for row in history if "loss" in row]


@pytest.fixture(scope="module", params=["none", "pca"])
def runs(request: pytest.FixtureRequest, base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same run with and without compaction."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"rotation": request.param, "keep_checkpoints": True}
    pat.tune(**flags(base, data, folder / "compact", **options))
    pat.tune(**flags(base, data, folder / "full", no_compact=True, save_strategy="steps", save_steps=1, **options))
    return request.param, folder / "compact", folder / "full"


def test_the_loss_has_no_jump_and_the_schedule_runs_on(runs: Any) -> None:
    _, compact, full = runs
    assert logged(compact, "learning_rate") == logged(full, "learning_rate")
    losses, expected = logged(compact, "loss"), logged(full, "loss")
    assert len(losses) == len(expected) == STEPS
    # The step after the milestone computes its loss on the compact model, with the same weights and rows.
    assert losses[: MILESTONE + 1] == pytest.approx(expected[: MILESTONE + 1], abs=1e-5)
    # Later the second stage trains other factors, on the same rows.
    assert losses[MILESTONE + 1 :] == pytest.approx(expected[MILESTONE + 1 :], abs=0.3)
    assert losses[MILESTONE + 1 :] != expected[MILESTONE + 1 :]


def test_the_optimizer_goes_on_where_the_parameters_do(runs: Any, base: Path, data: Path, tmp_path: Path) -> None:
    """One step after the milestone LoRA on readers is, bit for bit but rounding, what it is at full width."""
    rotation, _, full = runs
    out = tmp_path / "out"
    pat.tune(**flags(base, data, out, rotation=rotation, save_strategy="steps", save_steps=1, keep_checkpoints=True))
    step = f"checkpoint-{MILESTONE + 1}"
    small = load_file(out / "checkpoints" / "compact" / step / "adapter_model.safetensors")
    large = load_file(full / "checkpoints" / step / "adapter_model.safetensors")
    before = load_file(full / "checkpoints" / f"checkpoint-{MILESTONE}" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    assert torch.allclose(small[name], large[name], atol=1e-5)
    assert not torch.allclose(before[name], large[name], atol=1e-3)
    if rotation == "none":
        name = name.replace("lora_B", "lora_A")
        keep = torch.tensor([i for i in range(48) if large["base_model.model.model.pat_mask.masks.keep"][i]])
        assert torch.allclose(small[name], large[name][:, keep], atol=1e-5)


def test_what_the_folder_of_the_compact_model_holds(runs: Any) -> None:
    _, compact, full = runs
    assert not (full / "compact").exists()
    small = AutoModelForCausalLM.from_pretrained(compact / "compact" / "model")
    assert small.config.hidden_size == 36
    model = PeftModel.from_pretrained(small, str(compact / "compact" / "adapter")).eval()
    dense = AutoModelForCausalLM.from_pretrained(compact / "model").eval()
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)
    results = json.loads((compact / "results.json").read_text(encoding="utf-8"))
    assert results["compaction"]["parity"]["max_abs_logit_diff"] <= 1e-4
    assert results["compaction"]["milestone_step"] == MILESTONE
    parts = {"train", "preparation", "stage_one", "compaction", "stage_two"}
    assert set(results["timings"]) == {f"{part}_seconds" for part in parts}


def test_a_milestone_at_zero_skips_stage_one(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pat.tune(**flags(base, data, out, milestone=0.0))
    assert len(logged(out, "loss")) == STEPS
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert "stage_one_seconds" not in results["timings"] and results["cut"]["milestone_step"] == 0
    assert results["num_steps"] == STEPS
    assert set(results["learning_rates"]) == {"LoRA"}  # nothing else has been trained
    assert results["log_history"][0]["step"] == 0 and "pat/energy_kept" in results["log_history"][0]


def test_a_milestone_at_the_end_never_compacts(base: Path, data: Path, tmp_path: Path) -> None:
    pat.tune(**flags(base, data, tmp_path / "out", milestone=1.0))
    assert not (tmp_path / "out" / "compact").exists()


def test_the_large_model_is_gone_while_the_small_one_trains(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    original = Stages._train

    def counting(self: Stages, trainer: Any, part: str, resume_from: Any) -> None:
        gc.collect()
        seen[part] = sum(isinstance(thing, PatModel) for thing in gc.get_objects()) - alive
        original(self, trainer, part, resume_from)

    gc.collect()
    alive = sum(isinstance(thing, PatModel) for thing in gc.get_objects())
    monkeypatch.setattr(Stages, "_train", counting)
    run_tune(build_arguments(**flags(base, data, tmp_path / "out")))
    assert seen == {"stage_one": 1, "stage_two": 0}


# -- interrupted, resumed, refused -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all its checkpoints; experts start anew at the milestone."""
    out = tmp_path_factory.mktemp("kept") / "out"
    pat.tune(**flags(base, data, out, use_dora=True, save_strategy="steps", save_steps=1, keep_checkpoints=True))
    return out


def test_a_checkpoint_of_another_folder_is_resumed_between_the_stages(
    kept: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    checkpoint = kept / "checkpoints" / f"checkpoint-{MILESTONE}"
    out = tmp_path / "out"
    pat.tune(**flags(base, data, out, use_dora=True, resume_from_checkpoint=str(checkpoint)))
    assert logged(out, "loss") == logged(kept, "loss")


def test_a_second_training_leaves_no_stage_two_of_the_first(
    kept: Path, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(kept / "checkpoints", out / "checkpoints")
    first = out / "checkpoints" / "checkpoint-1"

    def cut_off(self: Stages, trainer: Any, part: str, resume_from: Any) -> None:
        if part == "stage_two":
            raise KeyboardInterrupt
        original(self, trainer, part, resume_from)

    original = Stages._train
    monkeypatch.setattr(Stages, "_train", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pat.tune(**flags(base, data, out, use_dora=True, resume_from_checkpoint=str(first)))
    assert last_checkpoint(out / "checkpoints") == str(out / "checkpoints" / "compact" / f"checkpoint-{MILESTONE}")


def test_a_hard_checkpoint_is_gone_on_from_whatever_the_milestone_is(
    kept: Path, base: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = shutil.copytree(kept / "checkpoints" / f"checkpoint-{MILESTONE}", tmp_path / f"checkpoint-{MILESTONE}")
    out = tmp_path / "out"
    pat.tune(**flags(base, data, out, use_dora=True, milestone=0.0, resume_from_checkpoint=str(checkpoint)))
    assert logged(out, "loss") == logged(kept, "loss")
    assert "has no run.json, so its configuration is not known" in caplog.text


def test_checkpoints_of_stage_two_can_be_merged(kept: Path, tmp_path: Path) -> None:
    checkpoint = kept / "checkpoints" / "compact" / f"checkpoint-{STEPS}"
    assert main(["merge", "--adapter", str(checkpoint), "--output_dir", str(tmp_path / "again")]) == 0
    first, second = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (kept / "model", tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_compact_model_than_its_own_takes_no_adapter(
    kept: Path, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in a merge nor where a run goes on; of the same shape, with other weights."""
    out = shutil.copytree(kept, tmp_path / "out")
    file = out / "compact" / "model" / "model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert main(["merge", "--adapter", str(out / "compact" / "adapter"), "--output_dir", str(tmp_path / "again")]) == 2
    assert "model: is not the compact model that the adapter was made for" in capsys.readouterr().err
    for name in ("compact/adapter/training.json", "results.json"):
        (out / name).unlink()
    shutil.rmtree(out / "model")
    with pytest.raises(PatError, match=r"^model: is not the compact model .*, or was changed since"):
        pat.tune(**flags(base, data, out, use_dora=True, save_strategy="steps", save_steps=1, keep_checkpoints=True))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 3}, "do not belong together .* The base model model is the one it was made for"),
        ({"init_lora_weights": "zzz"}, "init_lora_weights='zzz'.* The base model model is the one it was made for"),
        ({"lora_dropout": 5}, "config.json: not a usable configuration .*lora_dropout=5; expected"),
    ],
)
def test_an_adapter_of_the_small_model_that_was_edited_is_not_said_to_be_of_another_base(
    fields: dict[str, Any], words: str, kept: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(kept / "compact", tmp_path / "compact") / "adapter"
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(PatError, match=words):
        merge(adapter, tmp_path / "merged", progress=False)


def test_full_width_cannot_be_had_from_a_checkpoint_of_the_compact_model(
    kept: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    checkpoint = kept / "checkpoints" / "compact" / f"checkpoint-{STEPS - 1}"
    with pytest.raises(PatError, match="no_compact"):
        pat.tune(
            **flags(
                base, data, tmp_path / "out", use_dora=True, no_compact=True, resume_from_checkpoint=str(checkpoint)
            )
        )


def test_without_an_order_of_the_channels_nothing_is_left(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(PatError, match="no prior order"):
        pat.tune(**flags(base, data, out, milestone=0.0, rotation="none"))
    assert not out.exists()


@pytest.mark.parametrize("rotation", ["none", "pca"])
def test_mixed_precision(rotation: str, base: Path, data: Path, tmp_path: Path) -> None:
    """The masked and the compact model are compared without the autocast that the trainer puts around them."""
    result = pat.tune(**flags(base, data, tmp_path / "out", rotation=rotation, bf16=True))
    assert result.parity.dtype == "float32" and result.parity.max_abs_logit_diff <= 1e-4


def test_a_checkpoint_that_was_not_finished_is_passed_over(kept: Path, tmp_path: Path) -> None:
    checkpoints = shutil.copytree(kept / "checkpoints", tmp_path / "checkpoints")
    assert last_checkpoint(checkpoints) == str(checkpoints / "compact" / f"checkpoint-{STEPS}")
    (checkpoints / "compact" / f"checkpoint-{STEPS}" / "trainer_state.json").unlink()  # the trainer writes it last
    assert last_checkpoint(checkpoints) == str(checkpoints / "compact" / f"checkpoint-{STEPS - 1}")
    shutil.rmtree(checkpoints / "compact")
    assert last_checkpoint(checkpoints) == str(checkpoints / f"checkpoint-{MILESTONE}")
    assert last_checkpoint(tmp_path / "nothing") is None


def test_checkpoints_of_an_unknown_run_are_gone_on_from_only_if_asked_for(
    kept: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(kept / "checkpoints", tmp_path / "out" / "checkpoints")
    with pytest.raises(PatError, match="--resume_from_checkpoint true"):
        pat.tune(**flags(base, data, tmp_path / "out"))


def test_a_dense_model_uses_its_cache(kept: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(kept / "model").config.use_cache


def test_merging_the_adapter_of_the_milestone_points_to_the_last_one(
    kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["merge", "--adapter", str(kept / "adapter"), "--output_dir", str(tmp_path / "early")]) == 0
    assert str(kept / "compact" / "adapter") in caplog.text
