"""Predicted ratios are those of counts that can be written down by hand; see also the tests of `pat.surgery.costs`."""

from pathlib import Path

import pytest
from tiny_models import build

from pat.benchmark.prediction import Predictor
from pat.errors import PatError

CONTEXT, NEW_TOKENS = 16, 4


def predictor(folder: Path, hidden_size: int = 48, dtype: str | None = None) -> Predictor:
    """Llama without attention biases to count, untied: 3 layers, 4 heads of 20, 2 key heads, MLP 72, vocabulary 128."""
    fields = {"attention_bias": False, "mlp_bias": False}
    build("llama", tied=False, hidden_size=hidden_size, **fields).config.save_pretrained(folder)
    return Predictor(str(folder), dtype=dtype, new_tokens=NEW_TOKENS)


def test_generation_is_counted_midway_and_memory_at_its_end(tmp_path: Path) -> None:
    counts, batch_size = predictor(tmp_path), 5
    matmul = 3 * 48 * (2 * 4 * 20 + 2 * 2 * 20 + 3 * 72)
    cached = batch_size * 3 * 2 * (2 * 20)
    read = matmul + 128 * 48 + 7 * 48 + cached * (CONTEXT + NEW_TOKENS // 2)
    assert counts.count("decode", batch_size, CONTEXT) == 4 * read
    whole = matmul + 2 * 128 * 48 + 7 * 48 + cached * (CONTEXT + NEW_TOKENS)
    assert counts.memory_bytes(batch_size, CONTEXT) == 4 * whole
    flops = CONTEXT * (2 * matmul + 4 * 3 * 4 * 20 * (CONTEXT + 1) / 2) + 2 * 128 * 48
    assert counts.count("prefill", batch_size, CONTEXT) == batch_size * flops


def test_the_ratio_falls_from_the_weights_to_one_as_the_cache_grows(tmp_path: Path) -> None:
    base, small = predictor(tmp_path / "base"), predictor(tmp_path / "small", 36)
    ratios = [base.count("decode", size, 64) / small.count("decode", size, 64) for size in (1, 8, 10_000)]
    assert 48 / 36 > ratios[0] > ratios[1] > ratios[2] == pytest.approx(1, abs=1e-3)


def test_bytes_follow_the_dtype_and_flops_do_not(tmp_path: Path) -> None:
    full, half = predictor(tmp_path), predictor(tmp_path, dtype="bfloat16")
    assert full.weight_bytes == 2 * half.weight_bytes
    assert full.count("decode", 2, 8) == 2 * half.count("decode", 2, 8)
    assert full.count("prefill", 2, 8) == half.count("prefill", 2, 8)


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    config = build("llama", tied=True).config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    with pytest.raises(PatError, match="quantised"):
        Predictor(str(tmp_path), dtype=None, new_tokens=1)
