"""Load a base model, its configuration and its tokenizer, with one clear line for everything that can be wrong."""

from pat.loading.config import check_kind, check_quantization, empty_model, load_config
from pat.loading.fingerprint import base_fingerprint
from pat.loading.quantized import keep_plain_layout, quantization_of
from pat.loading.tokenizer import TokenSetup, check_special_ids, load_tokenizer, padded
from pat.loading.weights import grow_embedding, grown_rows, incomplete_weights, load_base, seeded, stored_dtype

__all__ = [
    "TokenSetup",
    "base_fingerprint",
    "check_kind",
    "check_quantization",
    "check_special_ids",
    "empty_model",
    "grow_embedding",
    "grown_rows",
    "incomplete_weights",
    "keep_plain_layout",
    "load_base",
    "load_config",
    "load_tokenizer",
    "padded",
    "quantization_of",
    "seeded",
    "stored_dtype",
]
