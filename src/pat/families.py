"""THE one place for what differs between model families: which weights write to and read from the residual stream.

A record names modules relative to a decoder layer. The checks in `pat.surgery.residual` refuse a model with a parameter
that its record does not account for, so a record cannot be silently incomplete.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pat.errors import PatError


@dataclass(frozen=True)
class Branch:
    """One residual branch of a decoder layer: pre-norm -> readers -> ... -> writer -> post-norm -> add.

    `readers` and `writer` are linear modules, or bare parameters (experts stacked along a leading axis). `site` is the
    module whose output the operator transforms: the writer itself unless given (MoE: the whole block).
    """

    readers: tuple[str, ...]
    writer: str
    pre_norm: str | None = None
    post_norm: str | None = None
    site: str = ""

    @property
    def hook_site(self) -> str:
        """Module whose output is what this branch writes, before a post-norm."""
        return self.site or self.writer


@dataclass(frozen=True)
class Family:
    """What the method has to know about one `model_type` of transformers."""

    model_type: str
    attention: Branch
    feed_forward: tuple[Branch, ...]
    """Alternatives; in each layer the one whose writer exists is used."""
    gain_offset: float = 0.0
    """1 where a norm multiplies by `1 + weight`."""
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by sqrt(hidden_size)."""
    qk_norm: tuple[str, ...] = ()
    """Norms after the query and key projections: they keep their size but share the config's epsilon."""
    qk_projections: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj")
    expert_parameters: tuple[str, ...] = ()
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    hidden_size_field: str = "hidden_size"
    eps_field: str = "rms_norm_eps"
    also_known_as: tuple[str, ...] = field(default=())
    """Model names a user may look for under this record."""

    @property
    def has_post_norms(self) -> bool:
        """Whether a gain stands between a writer and the residual add, which rules out a global rotation."""
        return any(branch.post_norm for branch in (self.attention, *self.feed_forward))


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

_ATTENTION = Branch(_QKV, "self_attn.o_proj", pre_norm="input_layernorm")
_MLP = Branch(_GATE_UP, "mlp.down_proj", pre_norm="post_attention_layernorm")
_MOE = Branch(("mlp.gate", _EXPERTS[0]), _EXPERTS[1], pre_norm="post_attention_layernorm", site="mlp")
_SANDWICH_ATTENTION = Branch(_QKV, "self_attn.o_proj", pre_norm="input_layernorm", post_norm="post_attention_layernorm")
_SANDWICH_MLP = Branch(
    _GATE_UP, "mlp.down_proj", pre_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"
)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

_RECORDS = (
    Family("llama", _ATTENTION, (_MLP,), also_known_as=("Llama 1-3", "Yi", "SmolLM2")),
    Family("mistral", _ATTENTION, (_MLP,)),
    Family("qwen2", _ATTENTION, (_MLP,), also_known_as=("Qwen2", "Qwen2.5")),
    Family("qwen3", _ATTENTION, (_MLP,), qk_norm=_HEAD_NORMS),
    Family("gemma", _ATTENTION, (_MLP,), gain_offset=1.0, scaled_embedding=True),
    Family("gemma2", _SANDWICH_ATTENTION, (_SANDWICH_MLP,), gain_offset=1.0, scaled_embedding=True),
    Family(
        "gemma3_text",
        _SANDWICH_ATTENTION,
        (_SANDWICH_MLP,),
        gain_offset=1.0,
        scaled_embedding=True,
        qk_norm=_HEAD_NORMS,
        also_known_as=("Gemma 3 (text)",),
    ),
    Family(
        "phi3",
        Branch(("self_attn.qkv_proj",), "self_attn.o_proj", pre_norm="input_layernorm"),
        (Branch(("mlp.gate_up_proj",), "mlp.down_proj", pre_norm="post_attention_layernorm"),),
        also_known_as=("Phi-3", "Phi-4-mini"),
    ),
    Family(
        "olmo2",
        Branch(_QKV, "self_attn.o_proj", post_norm="post_attention_layernorm"),
        (Branch(_GATE_UP, "mlp.down_proj", post_norm="post_feedforward_layernorm"),),
        qk_norm=_HEAD_NORMS,
    ),
    Family("smollm3", _ATTENTION, (_MLP,)),
    # Granite's multipliers are scalars, so they commute with every operator, mask and rotation.
    Family("granite", _ATTENTION, (_MLP,)),
    Family("mixtral", _ATTENTION, (_MOE,), expert_parameters=_EXPERTS),
    Family("qwen3_moe", _ATTENTION, (_MOE, _MLP), qk_norm=_HEAD_NORMS, expert_parameters=_EXPERTS),
)

FAMILIES: dict[str, Family] = {record.model_type: record for record in _RECORDS}


def get_family(model_type: str) -> Family:
    """Return the record of a `model_type`.

    Raises:
        PatError: the family has no record; the message lists those that have one and says what a record needs.
    """
    if model_type not in FAMILIES:
        raise PatError(
            f"Got a model of type {model_type!r}, which is not supported; supported: {', '.join(sorted(FAMILIES))}. "
            "A new family needs a record in pat/families.py: its residual branches (norms, readers, writer), how its "
            "norms store their gain, and whether its embeddings are scaled; it must use RMSNorm."
        )
    return FAMILIES[model_type]
