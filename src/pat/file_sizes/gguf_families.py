"""The one place for what llama.cpp makes of a model family: its architecture there, and where the two part.

What a family's tensors are is said in `pat.families`; a record here adds how a GGUF file names the architecture and
what of a configuration it carries. Every record was run on a tiny model, whole, as the default cuts it, and with its
hidden size cut: tokens of llama.cpp beside those of transformers (`pat.serving` has the verdicts, also on the heads
that llama.cpp cannot load). Heads and layers cut by themselves were not run for each family.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pat.errors import PatError
from pat.families import FAMILIES


@dataclass(frozen=True)
class GgufFamily:
    """Record of how a GGUF file describes one `model_type` of transformers."""

    model_type: str
    architecture: str
    interleaved: bool = False
    """Whether llama.cpp rotates neighbouring channels of a head where transformers rotates its halves, so that the rows
    of the query and key projections have to be reordered."""
    derives_head_size: bool = False
    """Whether llama.cpp takes hidden size / heads for the size of a head, and so cannot load a cut hidden size."""
    stand_in: str | None = None
    """Architecture that is the same function and takes head sizes as they are, for models that need that."""
    fields: dict[str, str] = field(default_factory=dict)
    """Numbers of the configuration that it reads, by their key there; those that are None are left out."""
    windows: int | None = None
    """One layer in so many sees everything, the others a window; None where llama.cpp knows no window."""
    writes_windows: bool = True
    """Whether the file says which layers see a window; if not, llama.cpp goes by `windows`."""
    other_scale_at: int | None = None
    """Number of layers of the one model whose attention llama.cpp scales by hidden size / heads instead."""
    unrotated: int | None = None
    """One layer in so many has no rotary embedding."""
    ffn_norm: str = "ffn_norm"
    """Name of the norm before the MLP."""
    tied_only: bool = False
    """Whether llama.cpp knows no head that is not the embedding."""
    scale_of_head: bool = False
    """Whether llama.cpp takes 1 / sqrt(head size) for the factor of the attention, whatever the configuration says."""
    activation: tuple[str, ...] = ("silu", "swish")
    """transformers' names of the activation that llama.cpp has in this architecture."""
    activation_field: str = "hidden_act"
    """Field of the configuration that names the activation."""
    expects: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values that llama.cpp takes fields of the configuration to have, without reading them."""
    present: tuple[str, ...] = ()
    """Fields that must not be None, because llama.cpp has a value of its own for a number that is not in the file."""

    rotates_part: bool = False
    """Whether llama.cpp loads a file in which only a part of each head is rotated."""
    no_bias: frozenset[str] = frozenset()
    """Names of tensors that have no bias in llama.cpp; it does not load a file that holds one."""

    def unlike(self, config: Any) -> tuple[str, Any, str] | None:
        """Return a field that llama.cpp would take otherwise than it is, its value, and what is expected instead."""
        allowed = {"use_bidirectional_attention": (None, False), self.activation_field: self.activation} | self.expects
        for name, values in allowed.items():
            if (given := getattr(config, name, None)) not in values:
                return name, given, " or ".join(repr(value) for value in values)
        for name in self.present:
            if getattr(config, name, None) is None:
                return name, None, "a number"
        return None


_GELU = ("gelu_pytorch_tanh",)
_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_MULTIPLIERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}

_OUTPUT = frozenset({"attn_output"})
_MLP = frozenset({"ffn_gate", "ffn_up", "ffn_down"})

_RECORDS = (
    GgufFamily("llama", "llama", interleaved=True),
    GgufFamily("iquestcoder", "llama", interleaved=True),
    GgufFamily("internlm3", "llama", interleaved=True),
    GgufFamily("mistral", "llama", interleaved=True),
    GgufFamily("mixtral", "llama", interleaved=True),
    GgufFamily("qwen2", "qwen2", derives_head_size=True, stand_in="llama"),
    GgufFamily("qwen3", "qwen3", no_bias=_OUTPUT),
    GgufFamily(
        "qwen3_moe",
        "qwen3moe",
        fields={"expert_feed_forward_length": "moe_intermediate_size"},
        expects={"norm_topk_prob": (True,), "mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
        no_bias=_OUTPUT,
    ),
    GgufFamily(
        "gemma", "gemma", tied_only=True, scale_of_head=True, activation=_GELU, no_bias=_OUTPUT, rotates_part=True
    ),
    GgufFamily(
        "gemma2",
        "gemma2",
        fields=_SOFTCAPS,
        windows=2,
        writes_windows=False,
        other_scale_at=46,
        tied_only=True,
        scale_of_head=True,
        activation=_GELU,
        activation_field="hidden_activation",
        present=tuple(_SOFTCAPS),
        no_bias=_OUTPUT,
    ),
    GgufFamily(
        "gemma3_text",
        "gemma3",
        windows=6,
        other_scale_at=62,
        scale_of_head=True,
        activation=_GELU,
        activation_field="hidden_activation",
        expects=dict.fromkeys(_SOFTCAPS, (None,)),
        no_bias=_OUTPUT,
    ),
    GgufFamily("phi3", "phi3", derives_head_size=True, rotates_part=True),
    GgufFamily("glm4", "glm4", rotates_part=True),
    GgufFamily("olmo2", "olmo2", derives_head_size=True, no_bias=_OUTPUT),
    GgufFamily("olmo3", "olmo2", derives_head_size=True, windows=4, no_bias=_OUTPUT),
    GgufFamily("smollm3", "smollm3", interleaved=True, unrotated=4, no_bias=_OUTPUT | _MLP),
    GgufFamily("granite", "granite", interleaved=True, fields=_MULTIPLIERS),
    GgufFamily("granitemoe", "granitemoe", interleaved=True, fields=_MULTIPLIERS),
    GgufFamily("arcee", "arcee", interleaved=True, activation=("relu2",), no_bias=_OUTPUT | _MLP),
    GgufFamily("ernie4_5", "ernie4_5", no_bias=_MLP),
    GgufFamily("seed_oss", "seed_oss", ffn_norm="post_attention_norm", no_bias=_OUTPUT | _MLP),
)

GGUF_FAMILIES: dict[str, GgufFamily] = {record.model_type: record for record in _RECORDS}


def gguf_family(model_type: str) -> GgufFamily:
    """Return the record of a `model_type`.

    Raises:
        PatError: it has none; the message lists those that have.
    """
    if model_type not in GGUF_FAMILIES:
        others = ", ".join(sorted(set(FAMILIES) - set(GGUF_FAMILIES)))
        raise PatError(
            f"Got a model of type {model_type!r}, which cannot be written as GGUF; expected one of "
            f"{', '.join(sorted(GGUF_FAMILIES))} (not: {others}). Use --format onnx, or llama.cpp's own converter."
        )
    return GGUF_FAMILIES[model_type]
