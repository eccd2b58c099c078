"""Rotary embeddings in the words of transformers 4: what transformers 5 makes of them must stay the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batch, build
from tiny_training import logits
from transformers import AutoModelForCausalLM

from pat.checkpoint.write import write_config
from pat.surgery.rope import legacy_rope, rope_of

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"short_factor": [1.1] * 10, "long_factor": [2.0] * 10}
SHORT = {"short_factor": [1.1] * 2, "long_factor": [2.0] * 2}  # of phi3, which rotates half of its 8 channels
LENGTH = "original_max_position_embeddings"

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "default": ("llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
    "llama3": ("llama", LLAMA3 | {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    # transformers 4 refuses it without a length, be it that of the model (128).
    "llama3 of the model's length": (
        "llama",
        LLAMA3 | {"rope_theta": 1e4, LENGTH: 128},
        {"rope_theta": 1e4, "rope_scaling": LLAMA3 | {LENGTH: 128}},
    ),
    # transformers 5 fills the original length in; transformers 4 would read a factor of 1 out of it.
    "yarn": ("qwen2", YARN | {"rope_theta": 2e4}, {"rope_theta": 2e4, "rope_scaling": YARN}),
    "yarn with its length": (
        "qwen3",
        YARN | {"rope_theta": 2e4, "original_max_position_embeddings": 32},
        {"rope_theta": 2e4, "rope_scaling": YARN | {"original_max_position_embeddings": 32}},
    ),
    "longrope with its length": (
        "llama",
        LONG | {"rope_type": "longrope", "rope_theta": 1e4, LENGTH: 32, "factor": 4.0},
        {"rope_theta": 1e4, LENGTH: 32, "rope_scaling": LONG | {"rope_type": "longrope", LENGTH: 32, "factor": 4.0}},
    ),
    "longrope without its length": (
        "llama",
        LONG | {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0},
        {"rope_theta": 1e4, "rope_scaling": LONG | {"rope_type": "longrope", "factor": 4.0}},
    ),
    # Its configuration in transformers 4 takes these three keys alone, and the length beside them.
    "longrope of phi3": (
        "phi3",
        SHORT | {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5, LENGTH: 16, "rope_scaling": SHORT | {"type": "longrope"}},
    ),
    "partial": (
        "phi3",
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "by type of layer": (
        "gemma3_text",
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
        },
        {"rope_theta": 1e6, "rope_local_base_freq": 3e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}

OVERRIDES = {"longrope of phi3": {LENGTH: 16}}


@pytest.mark.parametrize("case", CASES)
def test_both_words_say_the_same(case: str, tmp_path: Path) -> None:
    family, parameters, expected = CASES[case]
    model = build(family, tied=True, rope_parameters=parameters, **OVERRIDES.get(case, {}))
    assert legacy_rope(model.config) == expected
    model.save_pretrained(tmp_path)
    write_config(model.config, tmp_path)
    assert expected.items() <= json.loads((tmp_path / "config.json").read_text()).items()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch(length=48)), logits(model, batch(length=48)))
    # An engine that knows the old words alone is told the same: transformers 5 still reads them.
    old = {k: v for k, v in json.loads((tmp_path / "config.json").read_text()).items() if k != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert rope_of(AutoModelForCausalLM.from_pretrained(tmp_path).config) == rope_of(model.config)


def test_a_family_that_would_misread_the_old_words_is_written_without_them(tmp_path: Path) -> None:
    """Mellum's configuration takes `rope_scaling` for `rope_parameters`."""
    model = build("mellum", tied=True)
    model.save_pretrained(tmp_path)
    write_config(model.config, tmp_path)
    assert "rope_scaling" not in json.loads((tmp_path / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.rope_parameters == model.config.rope_parameters


def test_a_model_without_rotary_embeddings_says_nothing() -> None:
    config = build("llama", tied=True, num_hidden_layers=1).config
    config.rope_parameters = None
    assert legacy_rope(config) == {}
