"""Sizes are those of the written checkpoint, FLOPs those that torch counts, caches those that transformers makes."""

from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import FAMILIES, KINDS, SLIDING_WINDOW, batch, build
from tiny_training import attach, tuner_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from pat.families import get_family
from pat.plan.command import run_plan
from pat.plan.options import PlanOptions
from pat.surgery.costs import GROUPS, ModelCost, Skeleton, build_skeleton, cost_at, cost_of
from pat.surgery.describe import head_dim

PRUNED = 36

FLOPS_TOLERANCE = 2e-3
"""Torch also counts the rotary embedding's outer product, a thousandth of a tiny model's work."""

COSTED = (*KINDS, "gemma2", "mixtral")

ENDS = ((True, False), (True, True), (False, False))
"""Whether the base is tied, and whether it is untied on the way."""


def skeleton_of(model: PreTrainedModel) -> Skeleton:
    return build_skeleton(model.config, model.dtype)


def stored_bytes(folder: Path, *, without: Collection[str] = ()) -> int:
    """Return the bytes of the tensors in a checkpoint's files."""
    size = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            size += sum(tensors.get_tensor(name).nbytes for name in set(tensors.keys()) - set(without))
    return size


def assert_is_size_of(cost: ModelCost, model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    assert cost.total.num_parameters == sum(p.numel() for p in model.parameters())
    assert cost.total.num_bytes == stored_bytes(folder)
    assert cost.total.num_parameters == sum(group.num_parameters for group in cost.groups.values())
    assert cost.total.num_bytes == sum(group.num_bytes for group in cost.groups.values())


@pytest.mark.parametrize(
    ("family", "tied", "untie", "dtype"),
    [
        *((family, *ENDS[i % 3], torch.float32) for i, family in enumerate(FAMILIES)),
        *(("llama", *ends, torch.bfloat16) for ends in ENDS),
    ],
)
def test_the_plan_counts_what_the_merge_writes(
    family: str, tied: bool, untie: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = build(family, tied=tied, dtype=dtype)
    base.config.save_pretrained(tmp_path)  # a folder without weights
    record = run_plan(
        PlanOptions(model_name_or_path=str(tmp_path), pruned_hidden_size=PRUNED, untie_word_embeddings=untie)
    )
    assert_is_size_of(record.base, base, tmp_path / "base")
    model = attach(base, pruned_hidden_size=PRUNED, rotation="none", operator_rank=2, untie_word_embeddings=untie)
    tuner_of(model).set_step(1, 1)
    pruned = record.candidates[0].cost
    assert_is_size_of(pruned, tuner_of(model).merge_and_unload(), tmp_path / "small")
    assert (pruned.groups["head"].num_parameters > 0) == (untie or not tied) != pruned.tied
    assert pruned.hidden_size == PRUNED


def test_groups_hold_the_parameters_they_are_called_after() -> None:
    model = build("qwen3_moe", tied=False)
    cost = cost_of(skeleton_of(model), 1)
    marks = {"embedding": "embed_tokens", "head": "lm_head", "attention": "_proj", "MLP": "mlp", "norms": "norm"}
    for group in GROUPS:
        names = [n for n, _ in model.named_parameters() if marks[group] in n and ("mlp" not in n or group == "MLP")]
        assert cost.groups[group].num_parameters == sum(model.get_parameter(n).numel() for n in names), group


@pytest.mark.parametrize("family", COSTED)
def test_prefill_flops_are_those_that_torch_counts(family: str) -> None:
    length, batch_size = 2 * SLIDING_WINDOW, 3
    # The counter does not know the grouped products that experts take otherwise.
    model = build(family, tied=True, attn_implementation="eager", experts_implementation="eager")
    skeleton = skeleton_of(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=batch(batch_size=batch_size, length=length)["input_ids"], logits_to_keep=1)
    # Eager attention computes all scores, also those that the mask then takes out: length keys for every token.
    visible = sum(min(i + 1, window or length) for window in skeleton.windows() for i in range(length))
    masked_out = length * length * model.config.num_hidden_layers - visible
    excess = batch_size * 4 * model.config.num_attention_heads * head_dim(model) * masked_out
    flops = cost_at(skeleton, batch_size=batch_size, context=length).prefill_flops
    assert counter.get_total_flops() == pytest.approx(flops + excess, rel=FLOPS_TOLERANCE)
    one = cost_at(skeleton, batch_size=1, context=length)
    assert flops == batch_size * one.prefill_flops
    assert cost_of(skeleton, length).prefill_flops_per_token == one.prefill_flops / length


@pytest.mark.parametrize("family", COSTED)
def test_decoding_reads_the_cache_that_transformers_makes_and_the_weights_of_the_checkpoint(
    family: str, tmp_path: Path
) -> None:
    length, batch_size = 20, 3
    model = build(family, tied=False)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=batch(batch_size=batch_size, length=length)["input_ids"], past_key_values=cache)
    held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    cost = cost_at(skeleton_of(model), batch_size=batch_size, context=length)
    # A full window is what the next token attends to; transformers keeps one token less of it between two steps.
    missing = sum(t.nbytes // t.shape[-2] for t in held if t.shape[-2] == SLIDING_WINDOW - 1)
    assert cost.kv_cache_bytes == sum(t.nbytes for t in held) + missing
    model.save_pretrained(tmp_path)
    embedding = f"{get_family(family).embedding}.weight"  # of which a token reads one row
    if not get_family(family).expert_parameters:
        assert cost.decode_bytes == stored_bytes(tmp_path, without=[embedding]) + cost.kv_cache_bytes


def test_a_tied_model_reads_everything_it_has_once_for_a_token() -> None:
    cost = cost_of(skeleton_of(build("llama", tied=True)), 20)
    assert cost.decode_bytes_per_token == cost.inference_bytes == cost.total.num_bytes + cost.kv_cache_bytes


def test_a_batch_reads_more_experts_than_a_token_and_in_the_end_all() -> None:
    model = build("mixtral", tied=False)
    skeleton = skeleton_of(model)
    whole = cost_of(skeleton, 1)
    everything = whole.total.num_parameters - whole.groups["embedding"].num_parameters
    read = [
        (cost.decode_bytes - cost.kv_cache_bytes) / 4
        for cost in (cost_at(skeleton, batch_size=size, context=1) for size in (1, 2, 100))
    ]
    # Two of four experts for one token; two tokens miss an expert with a chance of a quarter.
    experts = sum(
        p.numel() for name, p in model.named_parameters() if name.endswith(get_family("mixtral").expert_parameters)
    )
    assert everything - read[0] == experts / 2
    assert everything - read[1] == experts / 4
    assert read[2] == pytest.approx(everything)
