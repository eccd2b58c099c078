"""The rehearsal: what can be trained passes in every family, and what a trainer would refuse is refused before."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build, tiny_tokenizer

from pat.errors import PatError
from pat.loading import load_config
from pat.shape import ShapeOptions
from pat.training.arguments import build_arguments
from pat.training.inputs.prepare import prepare
from pat.training.preflight.rehearsal import rehearse

ROWS = [{"instruction": f"say {i}", "output": f"it is {i * i}"} for i in range(22)]


def rehearsed(
    folder: Path, family: str = "llama", *, tied: bool = True, changes: dict[str, Any] | None = None, **flags: Any
) -> int:
    build(family, tied=tied, **changes or {}).save_pretrained(folder / "base")
    tiny_tokenizer(folder / "base")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    given = {"max_length": 64, "held_out": 2, "per_device_train_batch_size": 4, "disable_tqdm": True} | flags
    arguments = build_arguments(
        model_name_or_path=folder / "base", dataset_name=folder / "rows.jsonl", output_dir=folder / "out", **given
    )
    base_config, record = load_config(str(folder / "base"))
    data = prepare(arguments, base_config)
    before = sorted(folder.iterdir())
    try:
        return rehearse(arguments, data, base_config, record)
    finally:
        assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "num_steps"),
    [
        ({}, 5),
        ({"max_steps": 3}, 3),
        ({"gradient_accumulation_steps": 2, "num_train_epochs": 2}, 6),
        ({"packing": True}, None),
        ({"lora_target_modules": ["model.layers.1.mlp.down_proj"], "lora_modules_to_save": ["model.norm"]}, 5),
        ({"lora_target_modules": ["q_proj"]}, 5),
        ({"use_dora": True, "gradient_checkpointing": True, "neftune_noise_alpha": 5}, 5),
        ({"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_steps": 1}, 5),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, dict) else "",
)
def test_what_can_be_trained_passes_and_its_steps_are_known(
    flags: dict[str, Any], num_steps: int | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = torch.is_grad_enabled()
    steps = rehearsed(tmp_path, **flags)
    assert steps == num_steps or (num_steps is None and 1 <= steps < 5)
    assert torch.is_grad_enabled() == before
    assert not capfd.readouterr().out


ASKED = {
    "pruning_ratio": 0.3,
    "axes": ["mlp"],
    "pruned_hidden_size": 36,
    "pruned_intermediate_size": 16,
    "pruned_num_key_value_heads": 1,
    "pruned_num_hidden_layers": 2,
    "target_num_parameters": 16_000,
    "target_bytes": "60kB",
    "target_latency": 0.8,
    "multiple_of": 4,
    "untie_word_embeddings": True,
}


@pytest.mark.parametrize("name", [option.name for option in fields(ShapeOptions)])
def test_each_way_to_ask_for_a_smaller_model_passes(name: str, tmp_path: Path) -> None:
    assert rehearsed(tmp_path, max_steps=1, **{name: ASKED[name]}) == 1


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {"short_factor": [1.1] * 4, "long_factor": [2.0] * 4, "factor": 2.0},  # phi3's are tied to the width
}


@pytest.mark.parametrize("rope", ROPES)
def test_each_type_of_rotary_embedding_passes(rope: str, tmp_path: Path) -> None:
    family = "phi3" if rope == "longrope" else "llama"
    parameters = {"rope_type": rope, "rope_theta": 1e4, "partial_rotary_factor": 1.0} | ROPES[rope]
    changes = {"rope_parameters": parameters, "original_max_position_embeddings": 32}
    assert rehearsed(tmp_path, family, changes=changes, max_steps=1, axes=["mlp"], pruning_ratio=0.1) == 1


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str, tied: bool, tmp_path: Path) -> None:
    assert rehearsed(tmp_path, family, tied=tied) == 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"padding_free": True}, "padding_free"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"optim": "schedule_free_adamw"}, "schedulefree"),
        ({"report_to": "comet_ml"}, "comet"),
        (
            {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "accuracy"}
            | {"load_best_model_at_end": True},
            "eval_accuracy",
        ),
        ({"lora_target_modules": [".*nothing"]}, "nothing not found"),
        ({"attn_implementation": "none_such"}, "none_such"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_library_would_refuse_is_refused_before(flags: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(PatError, match=f"cannot be set up as asked: .*{words}"):
        rehearsed(tmp_path, **flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_train_epochs": 0}, "num_train_epochs=0.*above 0"),
        ({"lora_modules_to_save": ["nothing"]}, "lora_modules_to_save=nothing"),
        ({"lora_target_modules": ["q_proj", "proj"]}, "lora_target_modules=proj"),
        ({"lora_modules_to_save": ["self_attn"]}, "'self_attn', which holds .*q_proj"),
        ({"lora_target_parameters": ["mlp.experts.nothing"]}, "lora_target_parameters=mlp.experts.nothing"),
        ({"weight_decay": -1}, "weight_decay=-1.*at least 0"),
        ({"learning_rate": "inf"}, "learning_rate=inf.*finite"),
        ({"max_length": -5}, "max_length=-5.*at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_libraries_would_pass_over_is_refused(flags: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(PatError, match=words):
        rehearsed(tmp_path, "qwen3_moe", tied=False, **flags)


def test_parameters_of_experts_are_found(tmp_path: Path) -> None:
    flags = {"lora_target_parameters": ["mlp.experts.gate_up_proj"], "lora_modules_to_save": ["model.norm"]}
    assert rehearsed(tmp_path, "qwen3_moe", tied=False, **flags) == 5
