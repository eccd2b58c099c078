"""What a score depends on changes its fingerprint, and nothing else does."""

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import build, tiny_tokenizer

from pat.evaluation.tasks.fingerprints import _stride, fingerprint_model, fingerprint_tokenizer


def test_a_fingerprint_tells_models_apart() -> None:
    base = fingerprint_model(build("llama", tied=True))
    assert fingerprint_model(build("llama", tied=True)) == base
    assert fingerprint_model(build("llama", tied=True, dtype=torch.bfloat16)) != base
    changed = build("llama", tied=True)
    with torch.no_grad():
        next(changed.parameters())[-1, -1] += 1e-3
    assert fingerprint_model(changed) != base


def test_what_is_no_tensor_counts_too() -> None:
    prints = {
        fingerprint_model(build("llama", tied=True, **options))
        for options in ({}, {"rms_norm_eps": 1e-2}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}})
    }
    assert len(prints) == 3


def test_adapters_count_by_what_is_on_and_how_much() -> None:
    model = get_peft_model(build("llama", tied=True), LoraConfig(r=2, target_modules=["q_proj"]))
    prints = [fingerprint_model(model)]
    with model.disable_adapter():
        prints.append(fingerprint_model(model))
    assert fingerprint_model(model) == prints[0]
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    layer.set_scale("default", 0.5)
    prints.append(fingerprint_model(model))
    assert len(set(prints)) == 3


def test_a_tokenizer_counts_by_how_it_reads_and_not_by_how_it_was_used() -> None:
    tokenizer = tiny_tokenizer()
    base = fingerprint_tokenizer(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert fingerprint_tokenizer(tokenizer) == base
    tokenizer.add_tokens(["Question"])
    assert fingerprint_tokenizer(tokenizer) != base


def test_a_sample_reaches_every_column() -> None:
    for num_rows, row_length in ((1000, 64), (49152, 576), (300, 4096), (4096, 7 * 11 * 13)):
        stride = _stride(num_rows * row_length, row_length)
        assert stride > 1
        columns = {index % row_length for index in range(0, stride * row_length, stride)}
        assert len(columns) == row_length
        assert num_rows * row_length // stride >= 4096
    assert _stride(5000, 50) == _stride(0, 1) == 1
