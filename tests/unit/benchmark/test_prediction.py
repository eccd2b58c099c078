"""Predicted ratios are those of FLOP and byte counts that can be written down by hand."""

from pathlib import Path

import pytest
from tiny_models import build

from pat.benchmark.options import BenchmarkOptions
from pat.benchmark.prediction import Predictor

CONTEXT, NEW_TOKENS = 16, 4


def predictor(folder: Path, hidden_size: int, **options: object) -> Predictor:
    """Llama without attention biases to count, untied: 3 layers, 4 heads of 20, 2 key heads, MLP 72, vocabulary 128."""
    fields = {"attention_bias": False, "mlp_bias": False}
    build("llama", tied=False, hidden_size=hidden_size, **fields).config.save_pretrained(folder)
    return Predictor(str(folder), BenchmarkOptions("m", "b", new_tokens=NEW_TOKENS, **options))  # type: ignore[arg-type]


def matmul_weights(hidden_size: int) -> int:
    return 3 * hidden_size * (2 * 4 * 20 + 2 * 2 * 20 + 3 * 72)


def test_a_prefill_is_matmuls_causal_attention_and_one_head_a_sequence(tmp_path: Path) -> None:
    counts = predictor(tmp_path, 48).at(batch_size=5, context=CONTEXT)
    attention = 3 * 4 * (4 * 20) * (CONTEXT + 1) / 2
    assert counts.prefill_flops == 5 * (CONTEXT * (2 * matmul_weights(48) + attention) + 2 * 128 * 48)


def test_generation_reads_the_weights_once_and_each_sequences_cache(tmp_path: Path) -> None:
    counts = predictor(tmp_path, 48).at(batch_size=5, context=CONTEXT)
    norms = 7 * 48
    cache = 5 * 3 * 2 * (2 * 20)
    midway = CONTEXT + NEW_TOKENS // 2
    assert counts.decode_bytes == 4 * (matmul_weights(48) + 128 * 48 + norms + cache * midway)
    assert counts.kv_cache_bytes == 4 * cache * (CONTEXT + NEW_TOKENS)


def test_the_ratio_falls_from_the_weights_to_one_as_the_cache_grows(tmp_path: Path) -> None:
    base, small = predictor(tmp_path / "base", 48), predictor(tmp_path / "small", 36)
    ratios = [base.at(size, 64).decode_bytes / small.at(size, 64).decode_bytes for size in (1, 8, 10_000)]
    assert 48 / 36 > ratios[0] > ratios[1] > ratios[2] == pytest.approx(1, abs=1e-3)


def test_bytes_follow_the_dtype_and_flops_do_not(tmp_path: Path) -> None:
    full, half = predictor(tmp_path / "full", 48), predictor(tmp_path / "half", 48, dtype="bfloat16")
    assert full.weight_bytes == 2 * half.weight_bytes == 4 * full.num_parameters
    assert full.at(2, 8).decode_bytes == 2 * half.at(2, 8).decode_bytes
    assert full.at(2, 8).prefill_flops == half.at(2, 8).prefill_flops


def test_a_model_beside_itself_is_predicted_to_be_as_fast(tmp_path: Path) -> None:
    one, other = predictor(tmp_path, 48), predictor(tmp_path, 48)
    assert one.at(3, 9) == other.at(3, 9)
