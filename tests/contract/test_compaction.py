"""What becomes of an adapter at the compaction point; that the function stays is asked in `test_families` as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from masked64 import logits64, masked_model
from tiny_models import batch, shallow
from tiny_training import OPERATOR_RANK, RANK, attach, largest_difference, logits, tuner_of
from torch import nn

from pat.errors import PatError
from pat.tuner.compaction import CompactModel


def compacted(model: nn.Module) -> CompactModel:
    compact = tuner_of(model).compact().attach()
    if next(p for p in model.parameters()).dtype == torch.float64:
        compact.model.double()
    compact.model.eval()
    return compact


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 0.2},
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": r".*\.1\.(self_attn\.q_proj|mlp\.down_proj)"},
        {"target_modules": "all-linear"},
        {"untie_word_embeddings": True},
        {"untie_word_embeddings": True, "modules_to_save": ["lm_head", "norm"]},
        {"modules_to_save": ["down_proj"]},
        {"untie_word_embeddings": True, "target_modules": ["q_proj", "embed_tokens"]},
        {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 20}},
    ],
    ids=str,
)
def test_options_of_lora_and_of_the_method_are_kept(fields: dict[str, Any]) -> None:
    model = masked_model("llama", tied=True, rotation="pca", **fields)
    assert largest_difference(logits64(model), logits64(compacted(model).model)) <= 1e-6


def test_lora_stays_and_the_operator_becomes_rank() -> None:
    model = masked_model("qwen2", tied=True)
    compact = compacted(model)
    adapted = tuner_of(model).model.model.layers[0]
    layer = compact.model.get_base_model().model.layers[0]
    keep = tuner_of(model).mask().keep_indices
    query, writer = layer.self_attn.q_proj, layer.mlp.down_proj
    # Readers: A is cut, B is what it was, and the optimizer may go on with both.
    assert torch.equal(query.lora_A.default.weight, adapted.self_attn.q_proj.lora_A.default.weight[:, keep])
    assert torch.equal(query.lora_B.default.weight, adapted.self_attn.q_proj.lora_B.default.weight)
    for factor in (query.lora_A.default, query.lora_B.default):
        inherited = compact.inherited[factor.weight]
        assert torch.equal(inherited.cut(inherited.parameter), factor.weight)
    # Writers: RANK rows of A as before, the operator's below them; the scale is LoRA's own.
    assert writer.r["default"] == RANK + OPERATOR_RANK and query.r["default"] == RANK
    assert torch.equal(writer.lora_A.default.weight[:RANK], adapted.mlp.down_proj.lora_A.default.weight)
    assert writer.scaling["default"] == adapted.mlp.down_proj.scaling["default"] == 2
    assert writer.lora_A.default.weight not in compact.inherited
    # The scale is divided out of A's share alone: it is B that moves what the adapter writes.
    operator = tuner_of(model).operators()["model.layers.0.mlp.down_proj"]
    old_a, old_b = (factor.default.weight for factor in (adapted.mlp.down_proj.lora_A, adapted.mlp.down_proj.lora_B))
    frozen = adapted.mlp.down_proj.base_layer.weight
    scale = writer.scaling["default"]
    through = operator.down @ frozen + scale * operator.down @ old_b @ old_a
    torch.testing.assert_close(writer.lora_A.default.weight[RANK:].double(), through / scale, atol=1e-6, rtol=1e-6)
    written = torch.cat([old_b, operator.up * operator.v()], dim=1)[keep]
    torch.testing.assert_close(writer.lora_B.default.weight.double(), written, atol=1e-6, rtol=1e-6)
    assert compact.model.peft_config["default"].rank_pattern == dict.fromkeys(
        ("o_proj", "down_proj"), RANK + OPERATOR_RANK
    )


def test_lora_on_an_embedding_starts_anew_and_dense_layers_beside_experts_are_said_to_be_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fields: dict[str, Any] = {"untie_word_embeddings": True, "target_modules": ["q_proj", "embed_tokens"]}
    embedding = compacted(masked_model("llama", tied=True, **fields)).model.get_base_model().model.embed_tokens
    assert embedding.r["default"] == RANK and not embedding.lora_embedding_A["default"].any()
    assert not caplog.messages
    compacted(masked_model("qwen3_moe", tied=False))
    assert "is folded and not trained on" in caplog.text


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_pattern_that_fits_a_dense_layer_beside_experts_is_none_of_experts(use_dora: bool) -> None:
    """Peft takes the pattern for one of experts, which have no DoRA."""
    fields: dict[str, Any] = {
        "axes": ["mlp"],
        "pruned": None,
        "use_dora": use_dora,
        "pruning_ratio": 0.2,
        "refit": False,
    }
    model = masked_model("qwen3_moe", tied=False, target_modules=r".*(q_proj|down_proj)", **fields)
    compact = compacted(model).model
    assert largest_difference(logits64(model), logits64(compact)) <= 1e-6
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in compact.named_modules() if ".lora_A" in name}
    assert adapted == {"q_proj"}
    alone = masked_model("qwen3_moe", tied=False, target_modules=r".*mlp\.down_proj", **fields)
    with pytest.raises(PatError, match=r"LoRA on model\.layers\.1\.mlp\.down_proj alone, .* no module left"):
        compacted(alone)


def test_what_starts_anew_is_the_same_whenever_it_is_made() -> None:
    """A run that was cut off between the stages goes on from the same values."""
    model = masked_model("llama", tied=True, use_dora=True)
    torch.manual_seed(1)
    first = compacted(model).model
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    second = compacted(model).model
    assert torch.equal(torch.rand(1), expected)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_compact_model_trains_and_merges_as_any_lora_model() -> None:
    compact = compacted(masked_model("mistral", tied=True, rotation="pca")).model.float()
    before = logits(compact)
    compact(**batch(), labels=batch()["input_ids"]).loss.backward()
    trainable = [p for p in compact.parameters() if p.requires_grad]
    assert trainable and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)
    torch.optim.SGD(trainable, lr=0.1).step()
    assert largest_difference(logits(compact), before) > 1e-3
    after = logits(compact)
    assert largest_difference(logits(compact.merge_and_unload()), after) <= 1e-5


def test_what_cannot_be_compacted_is_refused() -> None:
    soft = attach(shallow("llama", tied=True))
    with pytest.raises(PatError, match="soft"):
        tuner_of(soft).compact()
    model = masked_model("llama", tied=True)
    tuner_of(model).pat_config().base_quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(PatError, match="quantised"):
        tuner_of(model).compact()
