"""Tiny random causal LMs, one per supported family, made so that a wrong fold cannot hide.

Import it as ``from tiny_models import FAMILIES, build, batch, tiny_tokenizer``: ``tests/conftest.py`` puts
this folder on the path, whatever pytest's import mode is.

What makes the models hard to fool: every norm gain is spread around 1, every bias a family can have is
switched on and non-zero, epsilon (1e-3) is a visible part of the mean square, multipliers differ from 1,
attention is grouped-query, and ``head_dim`` is not ``hidden_size / num_attention_heads`` in eight families.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pat.surgery.residual import model_tensors

VOCAB_SIZE = 128
NUM_KEY_VALUE_HEADS = 2
RMS_NORM_EPS = 1e-3  # 0.3 to 5 % of the mean square of these residual streams: a wrong epsilon shows
GAIN_SPREAD = 0.3
SLIDING_WINDOW = 8  # shorter than the sequences of `batch`, so that the window cuts something
HEAD_DIM = 20  # even (rotary pairs) and not 48 / 4

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
NUM_SPECIAL_IDS = 4

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": NUM_KEY_VALUE_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": RMS_NORM_EPS,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "attention_dropout": 0.0,
}

_ALTERNATING = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": SLIDING_WINDOW,
}
_SIX_HEADS = {"num_attention_heads": 6}  # where head_dim is derived from the width, so that both head counts occur
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MULTIPLIERS = {
    "embedding_multiplier": 1.7,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.25,
    "logits_scaling": 0.7,
}
# transformers warns where the original context is not shorter than max_position_embeddings.
_LLAMA3_ROPE = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}

_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": HEAD_DIM, "attention_bias": True, "mlp_bias": True},
    "internlm3": {"head_dim": HEAD_DIM, "qkv_bias": True, "bias": True},
    "iquestcoder": {"head_dim": HEAD_DIM, "attention_bias": True},
    "mistral": {"head_dim": HEAD_DIM, "sliding_window": SLIDING_WINDOW},
    "ministral": {"head_dim": HEAD_DIM} | _ALTERNATING,
    "ministral3": {
        "head_dim": HEAD_DIM,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 8,
            "max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "qwen2": _SIX_HEADS,
    "qwen3": {"head_dim": HEAD_DIM, "attention_bias": True},
    "qwen3_moe": {
        "head_dim": HEAD_DIM,
        "attention_bias": True,
        "moe_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "gemma": {"head_dim": HEAD_DIM, "attention_bias": True},
    "gemma2": {
        "head_dim": HEAD_DIM,
        "attention_bias": True,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    }
    | _ALTERNATING,
    "gemma3_text": {"head_dim": HEAD_DIM, "attention_bias": True, "query_pre_attn_scalar": 10} | _ALTERNATING,
    "vaultgemma": {
        "head_dim": HEAD_DIM,
        "attention_bias": True,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    }
    | _ALTERNATING,
    "phi3": {
        "original_max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    }
    | _SIX_HEADS,
    "glm": {"head_dim": HEAD_DIM, "attention_bias": True},
    "glm4": {"head_dim": HEAD_DIM, "attention_bias": True},
    "olmo2": {"attention_bias": True} | _SIX_HEADS,
    "olmo3": {"attention_bias": True} | _SIX_HEADS | _ALTERNATING,
    "flex_olmo": {"attention_bias": True, "intermediate_size": 40} | _SIX_HEADS | _EXPERTS,
    "exaone4": _SIX_HEADS | _ALTERNATING,
    "smollm3": {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0, 1]},
    "granite": {"attention_bias": True, "mlp_bias": True} | _SIX_HEADS | _MULTIPLIERS,
    "granite_swa": {"attention_bias": True, "mlp_bias": True, "layer_rope_theta": [10_000.0, 0, 1_000.0]}
    | _SIX_HEADS
    | _MULTIPLIERS
    | _ALTERNATING,
    "granitemoe": {"attention_bias": True, "intermediate_size": 40} | _SIX_HEADS | _MULTIPLIERS | _EXPERTS,
    "hyperclovax": {"head_dim": HEAD_DIM, "attention_bias": True, "mlp_bias": True} | _MULTIPLIERS,
    "mixtral": {"head_dim": HEAD_DIM, "intermediate_size": 40} | _EXPERTS,
    "mellum": {
        "head_dim": HEAD_DIM,
        "attention_bias": True,
        "moe_intermediate_size": 40,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
    }
    | _EXPERTS
    | _ALTERNATING,
    "minimax_m2": {"head_dim": HEAD_DIM, "intermediate_size": 40, "rotary_dim": 10} | _EXPERTS,
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM, "attention_bias": True},
    "apertus": {"attention_bias": True} | _SIX_HEADS | _LLAMA3_ROPE,
    "arcee": {"head_dim": HEAD_DIM, "attention_bias": True, "mlp_bias": True},
    "cwm": {"head_dim": HEAD_DIM, "mlp_bias": True} | _ALTERNATING | _LLAMA3_ROPE,
    "ernie4_5": {"head_dim": HEAD_DIM, "use_bias": True},
    "seed_oss": {
        "head_dim": HEAD_DIM,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "residual_dropout": 0.0,
    },
}

FAMILIES: tuple[str, ...] = tuple(_FAMILY)
"""All of them, for the contract tests and the tests of the records."""

WITHOUT_BIAS = frozenset({"mistral", "ministral", "ministral3", "phi3", "exaone4", "mixtral", "minimax_m2"})
"""Families none of whose linear layers can have a bias."""

KINDS: tuple[str, ...] = ("llama", "gemma3_text", "olmo2", "phi3", "qwen3_moe", "apertus")
"""A family of each kind, for everything else: plain; sandwich norms, scaled embedding, gain 1 + weight, sliding window;
post-norms alone; fused readers; experts beside dense layers, q/k-norm; an ungated MLP, bystanders and buffers."""


def build(
    family: str,
    *,
    tied: bool,
    seed: int = 0,
    hidden_size: int = 48,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Make a tiny random causal LM of one family, in eval mode, without touching the global random state.

    Args:
        family: one of `FAMILIES` (a transformers ``model_type``).
        tied: value of ``tie_word_embeddings``; untied models get a head of their own.
        seed: seeds every weight; equal arguments give bit-identical models.
        hidden_size: width of the residual stream; a multiple of the head count (4 or 6).
        dtype: weights are drawn in float32 and then rounded to it.
        **config_overrides: further config fields; with fewer layers, fields that list them (``layer_types``) are cut.
    """
    if family not in _FAMILY:
        raise ValueError(f"got family {family!r}, expected one of {', '.join(FAMILIES)}")
    fields = _BASE | _FAMILY[family] | {"hidden_size": hidden_size, "tie_word_embeddings": tied} | config_overrides
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == _BASE["num_hidden_layers"]:
            fields[name] = value[: fields["num_hidden_layers"]]
    config = AutoConfig.for_model(family, **copy.deepcopy(fields))
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _randomise(model, seed)
    return model.eval()


def shallow(family: str, *, tied: bool, **fields: Any) -> PreTrainedModel:
    """`build` with two layers, which are enough for one to read what another wrote."""
    return build(family, tied=tied, **({"num_hidden_layers": 2} | fields))


def norm_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(name, module)`` of every RMSNorm, q/k-norms included."""
    for name, module in model.named_modules():
        if type(module).__name__.endswith("RMSNorm"):
            yield name, module


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Redraw all that is stored, in name order: gains spread around 1, biases 0.2, matrices 1 / sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, _ in norm_modules(model)}
    for name, tensor in model_tensors(model).items():  # a tied head appears once, as the embedding
        noise = torch.randn(tensor.shape, generator=generator)
        if name in norms or tensor.dim() == 0:
            tensor += GAIN_SPREAD * noise  # new norms have the gain 1, whichever number stands for it
        elif tensor.dim() == 1:
            tensor.copy_(0.2 * noise)
        else:
            # Embedding and head too: their last axis is the hidden size, which puts logits near deviation 1.
            tensor.copy_(noise / math.sqrt(tensor.shape[-1]))


def batch(
    seed: int = 0,
    batch_size: int = 2,
    length: int = 24,
    vocab_size: int = VOCAB_SIZE,
    padding_side: Literal["left", "right"] = "right",
) -> dict[str, Tensor]:
    """Make random token ids and a mask, both ``(batch_size, length)`` int64.

    A quarter of the last row is padding, unless it is the only row. The outputs at padded positions mean
    nothing: compare logits only where ``attention_mask`` is 1.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(NUM_SPECIAL_IDS, vocab_size, (batch_size, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if batch_size > 1:
        padding = slice(None, length // 4) if padding_side == "left" else slice(length - length // 4, None)
        input_ids[-1, padding] = PAD_ID
        attention_mask[-1, padding] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer(directory: Path | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer of at most `VOCAB_SIZE` ids, one a character (printable ASCII, tab and newline).

    Other characters become ``<unk>``. Its pad, bos, eos and unk tokens have the ids of the tiny configs, and
    its chat template marks the assistant's turns. With `directory` it is also saved there.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    characters = ["\t", "\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: index for index, token in enumerate(special + roles + characters)}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special + roles])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    if directory is not None:
        fast.save_pretrained(directory)
    return fast


def fill_hub_cache(cache: Path, name: str, **revisions: Path) -> None:
    """Lay out model folders as the hub's cache has the revisions of one model; `main` is the one taken by default."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    for number, (revision, source) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        shutil.copytree(source, folder / "snapshots" / commit)
        (folder / "refs" / revision).write_text(commit)
