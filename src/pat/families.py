"""THE one place for what differs between model families: which weights write to and read from the residual stream.

A record names modules relative to a decoder layer. The checks in `pat.surgery.residual` refuse a model with a tensor
that its record does not account for, so a record cannot be silently incomplete.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    routers: tuple[str, ...] = ()
    """Readers whose outputs choose experts, instead of lying in the space that the writer reads."""
    per_head: tuple[str, ...] = ()
    """Parameters with one entry for each query head. They are bystanders as well."""

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
    bystanders: tuple[str, ...] = ()
    """Parameters and persistent buffers inside a branch that neither read nor write the stream, and are copied as they
    are: attention sinks, constants of an activation. A layer may lack them. A norm among them must have an epsilon of
    its own, see `qk_norm`."""
    expert_parameters: tuple[str, ...] = ()
    """Stacked parameters of the experts. In a family that has them the MLP channels that can be cut are theirs, and a
    dense MLP in some other layer stays as it is (docs/adr/0021)."""
    mlp_field: str = "intermediate_size"
    """Field of the configuration that holds the number of those channels, of each MLP or expert."""
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    hidden_size_field: str = "hidden_size"
    eps_field: str = "rms_norm_eps"
    unloadable_rope: tuple[str, ...] = ()
    """Types of rotary embedding that transformers can load at the full hidden size and number of heads alone."""
    legacy_rope_keys: tuple[str, ...] = ()
    """The only keys that its configuration in transformers 4 takes in `rope_scaling`; by default any."""

    @property
    def has_post_norms(self) -> bool:
        """Whether a gain stands between a writer and the residual add, which rules out a global rotation."""
        return any(branch.post_norm for branch in (self.attention, *self.feed_forward))


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_GRANITE_EXPERTS = ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

# Pre-norm branches, as in Llama.
_ATTENTION = Branch(_QKV, "self_attn.o_proj", pre_norm="input_layernorm")
_MLP = Branch(_GATE_UP, "mlp.down_proj", pre_norm="post_attention_layernorm")
_UNGATED_MLP = replace(_MLP, readers=("mlp.up_proj",))
_FUSED_MLP = replace(_MLP, readers=("mlp.gate_up_proj",))
_MOE = Branch(
    ("mlp.gate", _EXPERTS[0]), _EXPERTS[1], pre_norm="post_attention_layernorm", site="mlp", routers=("mlp.gate",)
)
# Norms on both sides of a branch, as in Gemma 2.
_SANDWICH_ATTENTION = replace(_ATTENTION, post_norm="post_attention_layernorm")
_SANDWICH_MLP = replace(_MLP, pre_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm")
# Norms after a branch alone, as in OLMo 2.
_POST_ATTENTION = replace(_SANDWICH_ATTENTION, pre_norm=None)
_POST_MLP = replace(_SANDWICH_MLP, pre_norm=None)

_RECORDS = (
    Family("llama", _ATTENTION, (_MLP,)),
    Family("internlm3", _ATTENTION, (_MLP,)),
    Family("iquestcoder", _ATTENTION, (_MLP,)),
    Family("mistral", _ATTENTION, (_MLP,)),
    Family("ministral", _ATTENTION, (_MLP,)),
    Family("ministral3", _ATTENTION, (_MLP,)),
    Family("qwen2", _ATTENTION, (_MLP,)),
    Family("qwen3", _ATTENTION, (_MLP,), qk_norm=_HEAD_NORMS),
    Family(
        "qwen3_moe",
        _ATTENTION,
        (_MOE, _MLP),
        qk_norm=_HEAD_NORMS,
        expert_parameters=_EXPERTS,
        mlp_field="moe_intermediate_size",
    ),
    Family("gemma", _ATTENTION, (_MLP,), gain_offset=1.0, scaled_embedding=True),
    Family("gemma2", _SANDWICH_ATTENTION, (_SANDWICH_MLP,), gain_offset=1.0, scaled_embedding=True),
    Family(
        "gemma3_text",
        _SANDWICH_ATTENTION,
        (_SANDWICH_MLP,),
        gain_offset=1.0,
        scaled_embedding=True,
        qk_norm=_HEAD_NORMS,
    ),
    Family(
        "vaultgemma",
        _ATTENTION,
        (replace(_MLP, pre_norm="pre_feedforward_layernorm"),),
        gain_offset=1.0,
        scaled_embedding=True,
    ),
    Family(
        "phi3",
        replace(_ATTENTION, readers=("self_attn.qkv_proj",)),
        (_FUSED_MLP,),
        unloadable_rope=("longrope",),  # its validator derives the head size from the hidden size
        legacy_rope_keys=("type", "short_factor", "long_factor"),
    ),
    Family("glm", _ATTENTION, (_FUSED_MLP,)),
    Family(
        "glm4",
        replace(_ATTENTION, post_norm="post_self_attn_layernorm"),
        (replace(_FUSED_MLP, post_norm="post_mlp_layernorm"),),
    ),
    Family("olmo2", _POST_ATTENTION, (_POST_MLP,), qk_norm=_HEAD_NORMS),
    Family("olmo3", _POST_ATTENTION, (_POST_MLP,), qk_norm=_HEAD_NORMS),
    Family(
        "flex_olmo",
        _POST_ATTENTION,
        (replace(_MOE, pre_norm=None, post_norm="post_feedforward_layernorm"),),
        qk_norm=_HEAD_NORMS,
        expert_parameters=_EXPERTS,
    ),
    Family("exaone4", _POST_ATTENTION, (_POST_MLP,), qk_norm=_HEAD_NORMS),
    Family("smollm3", _ATTENTION, (_MLP,)),
    # Granite's multipliers are scalars, so they commute with every operator, mask and rotation.
    Family("granite", _ATTENTION, (_MLP,)),
    Family(
        "granite_swa",
        replace(_ATTENTION, per_head=("self_attn.sinks",)),
        (_MLP,),
        bystanders=("self_attn.sinks",),
    ),
    Family(
        "granitemoe",
        _ATTENTION,
        (
            replace(
                _MOE,
                readers=("block_sparse_moe.router", _GRANITE_EXPERTS[0]),
                writer=_GRANITE_EXPERTS[1],
                site="block_sparse_moe",
                routers=("block_sparse_moe.router",),
            ),
        ),
        expert_parameters=_GRANITE_EXPERTS,
    ),
    Family("hyperclovax", replace(_ATTENTION, post_norm="post_norm1"), (replace(_MLP, post_norm="post_norm2"),)),
    Family("mixtral", _ATTENTION, (_MOE,), expert_parameters=_EXPERTS),
    Family(
        "mellum",
        _ATTENTION,
        (_MOE, _MLP),
        qk_norm=_HEAD_NORMS,
        expert_parameters=_EXPERTS,
        mlp_field="moe_intermediate_size",
    ),
    Family(
        "minimax_m2",
        _ATTENTION,
        (_MOE,),
        qk_norm=_HEAD_NORMS,
        bystanders=("mlp.e_score_correction_bias",),
        expert_parameters=_EXPERTS,
    ),
    Family("hunyuan_v1_dense", _ATTENTION, (_MLP,), qk_norm=("self_attn.query_layernorm", "self_attn.key_layernorm")),
    Family(
        "apertus",
        replace(_ATTENTION, pre_norm="attention_layernorm"),
        (replace(_UNGATED_MLP, pre_norm="feedforward_layernorm"),),
        qk_norm=_HEAD_NORMS,
        bystanders=tuple(f"mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")),
    ),
    Family("arcee", _ATTENTION, (_UNGATED_MLP,)),
    Family("cwm", _ATTENTION, (_MLP,)),
    Family("ernie4_5", _ATTENTION, (_MLP,)),
    Family("seed_oss", _ATTENTION, (_MLP,)),
)

LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layer_rope_theta")
"""Fields of configurations that hold one entry for each layer."""

FIRST_LAYERS = "max_window_layers"
"""Field that holds how many of the first layers are of one kind (Qwen: without a window)."""

DENSE_LAYERS, SPARSE_STEP = "mlp_only_layers", "decoder_sparse_step"
"""Fields that hold which layers have no experts: their numbers, and all others that are no multiple of a step."""

FAMILIES: dict[str, Family] = {record.model_type: record for record in _RECORDS}

_WITH_LAYER_NORM = (
    "biogpt bloom codegen cohere cohere2 falcon gpt2 gpt_bigcode gpt_neo gpt_neox gptj jais2 mpt nemotron olmo opt "
    "persimmon phi phimoe stablelm starcoder2 xglm"
)

REFUSED: dict[str, str] = {
    **dict.fromkeys(_WITH_LAYER_NORM.split(), "its norms are LayerNorms, and a merge is exact with RMSNorm alone"),
    "helium": "transformers takes its hidden size for the width of all heads (o_proj), so a smaller one does not load",
    "olmoe": "transformers takes its hidden size for the width of all heads (q_norm), so a smaller one does not load",
}
"""Model types that no record can describe, and why."""


def get_family(model_type: str) -> Family:
    """Return the record of a `model_type`.

    Raises:
        PatError: the family has no record; the message lists those that have one and says what a record needs, or why
            there can be none.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = f": {REFUSED[model_type]}" if model_type in REFUSED else ""
    remedy = (
        "Use a model of one of these."
        if reason
        else "A new family needs a record in pat/families.py: its residual branches (norms, readers, writer), how its "
        "norms store their gain, and whether its embeddings are scaled; it must use RMSNorm."
    )
    raise PatError(
        f"Got a model of type {model_type!r}, which is not supported{reason}; supported: "
        f"{', '.join(sorted(FAMILIES))}. {remedy}"
    )
