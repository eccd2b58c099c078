"""`pat plan`: its counts are those of the written checkpoint, its costs those that torch counts, no weights needed."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import KINDS, SLIDING_WINDOW, batch, build
from tiny_training import attach, tuner_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from pat.errors import PatError
from pat.families import get_family
from pat.plan import Plan, make_plan, print_plan
from pat.plan.costs import GROUPS, build_skeleton, cost_at, cost_of
from pat.plan.training import training_memory
from pat.tuner import PatConfig

PRUNED = 36

FLOPS_TOLERANCE = 2e-3
"""Torch also counts the rotary embedding's outer product, a thousandth of a tiny model's work."""

ACTIVATION_TOLERANCE = 0.15
"""What the estimate's docstring claims for float32."""


def save_config(model: PreTrainedModel, folder: Path) -> str:
    """Leave what `pat plan` may read: a model folder without its weights."""
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return str(folder)


def tensor_bytes(folder: Path) -> int:
    """Count the bytes of all tensors in a checkpoint's files."""
    size = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                tensor = tensors.get_tensor(name)
                size += tensor.numel() * tensor.element_size()
    return size


def merged(base: nn.Module, *, untie: bool) -> PreTrainedModel:
    model = attach(base, pruned_hidden_size=PRUNED, rotation="none", operator_rank=2, untie_word_embeddings=untie)
    tuner_of(model).set_step(1, 1)
    return tuner_of(model).merge_and_unload()


def assert_counts_are_those_of(model: PreTrainedModel, planned: Plan, folder: Path) -> None:
    model.save_pretrained(folder)
    total = planned.pruned.total
    assert total.num_bytes == tensor_bytes(folder)
    assert total.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("tied", "untie"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("family", KINDS)
def test_the_plan_counts_what_the_merge_writes(family: str, tied: bool, untie: bool, tmp_path: Path) -> None:
    base = build(family, tied=tied)
    base.save_pretrained(tmp_path / "base")
    plan = make_plan(save_config(base, tmp_path / "config"), pruned_hidden_size=PRUNED, untie_word_embeddings=untie)
    assert plan.base.total.num_bytes == tensor_bytes(tmp_path / "base")
    assert plan.base.total.num_parameters == base.num_parameters()
    assert_counts_are_those_of(merged(base, untie=untie), plan, tmp_path / "small")
    assert (plan.pruned.groups["head"].num_parameters > 0) == (untie or not tied)
    assert plan.pruned.hidden_size == PRUNED


def test_bytes_follow_the_stored_dtype(tmp_path: Path) -> None:
    base = build("llama", tied=True, dtype=torch.bfloat16)
    plan = make_plan(save_config(base, tmp_path / "base"), pruned_hidden_size=PRUNED)
    assert plan.dtype == "bfloat16"
    assert_counts_are_those_of(merged(base, untie=False), plan, tmp_path / "small")


def test_groups_hold_the_parameters_they_are_called_after(tmp_path: Path) -> None:
    model = build("qwen3_moe", tied=False)
    plan = make_plan(save_config(model, tmp_path), pruned_hidden_size=PRUNED)
    marks = {"embedding": "embed_tokens", "head": "lm_head", "attention": "_proj", "MLP": "mlp", "norms": "norm"}
    for group in GROUPS:
        names = [n for n, _ in model.named_parameters() if marks[group] in n]
        if group == "attention":
            names = [n for n in names if "self_attn" in n]
        assert plan.base.groups[group].num_parameters == sum(model.get_parameter(n).numel() for n in names), group


@pytest.mark.parametrize("family", KINDS)
def test_prefill_flops_are_those_that_torch_counts(family: str) -> None:
    length, batch_size = 2 * SLIDING_WINDOW, 3
    # The counter does not know the grouped products that experts take otherwise.
    model = build(family, tied=True, attn_implementation="eager", experts_implementation="eager")
    skeleton = build_skeleton(model.config, get_family(family), torch.float32)
    input_ids = batch(batch_size=batch_size, length=length)["input_ids"]

    def counted(**options: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=input_ids, **options)
        return counter.get_total_flops()

    # Eager attention computes all scores, also those that the mask then takes out: length keys for every token.
    cost = cost_at(skeleton, batch_size=batch_size, context=length)
    keys = sum(min(i + 1, window or length) for window in skeleton.windows() for i in range(length)) / length
    all_keys = length * model.config.num_hidden_layers
    per_key = 4 * model.config.num_attention_heads * skeleton.head_dim
    masked_out = batch_size * length * per_key * (all_keys - keys)
    assert counted(logits_to_keep=1) == pytest.approx(cost.prefill_flops + masked_out, rel=FLOPS_TOLERANCE)
    # With the logits of all tokens every matmul parameter multiplies every token.
    num_matmul = cost_of(skeleton, length).num_matmul_parameters
    assert counted() / (batch_size * length) == pytest.approx(2 * num_matmul + per_key * all_keys, rel=FLOPS_TOLERANCE)


def test_windows_limit_the_keys_that_are_counted_and_cached() -> None:
    length = 4 * SLIDING_WINDOW
    family = get_family("gemma2")
    config = build("gemma2", tied=True).config
    skeleton = build_skeleton(config, family, torch.float32)
    assert skeleton.windows() == [SLIDING_WINDOW, None, SLIDING_WINDOW]
    per_key = 2 * config.num_key_value_heads * skeleton.head_dim * 4
    assert cost_of(skeleton, length).kv_cache_bytes == per_key * (2 * SLIDING_WINDOW + length)


@pytest.mark.parametrize("family", KINDS)
def test_the_cache_is_as_large_as_transformers_makes_it(family: str) -> None:
    length = 20
    model = build(family, tied=True)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=batch(batch_size=1, length=length)["input_ids"], past_key_values=cache)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    skeleton = build_skeleton(model.config, get_family(family), torch.float32)
    cost = cost_of(skeleton, length)
    # A full window is what the next token attends to; transformers keeps one token less of it between two steps.
    num_full_windows = sum(window is not None and window <= length for window in skeleton.windows())
    assert cost.kv_cache_bytes == held + num_full_windows * 2 * skeleton.attention_widths()[1] * 4
    assert cost.inference_bytes == cost.total.num_bytes + cost.kv_cache_bytes
    if not get_family(family).expert_parameters:
        # A tied model reads everything it has for every token: the embedding's matrix is its head.
        assert cost.decode_bytes_per_token == cost.inference_bytes


def test_decoding_reads_one_row_of_an_embedding_that_is_not_the_head_and_the_routed_experts() -> None:
    config = build("mixtral", tied=False).config
    cost = cost_of(build_skeleton(config, get_family("mixtral"), torch.float32), 1)
    experts = sum(
        3 * config.hidden_size * config.intermediate_size * config.num_local_experts
        for _ in range(config.num_hidden_layers)
    )
    idle = experts * (1 - config.num_experts_per_tok / config.num_local_experts)
    read = cost.total.num_parameters - cost.groups["embedding"].num_parameters - idle
    assert cost.decode_bytes_per_token == 4 * read + cost.kv_cache_bytes


def test_a_batch_reads_the_weights_once_and_its_own_caches() -> None:
    skeleton = build_skeleton(build("llama", tied=True).config, get_family("llama"), torch.float32)
    one, eight = (cost_at(skeleton, batch_size=size, context=20) for size in (1, 8))
    assert eight.kv_cache_bytes == 8 * one.kv_cache_bytes
    assert eight.decode_bytes - eight.kv_cache_bytes == one.decode_bytes - one.kv_cache_bytes
    assert eight.prefill_flops == 8 * one.prefill_flops


def test_a_batch_reads_more_experts_than_a_token_and_in_the_end_all() -> None:
    skeleton = build_skeleton(build("mixtral", tied=False).config, get_family("mixtral"), torch.float32)
    everything = cost_of(skeleton, 1).total.num_parameters - cost_of(skeleton, 1).groups["embedding"].num_parameters
    read = [
        (cost.decode_bytes - cost.kv_cache_bytes) / 4
        for cost in (cost_at(skeleton, batch_size=size, context=1) for size in (1, 2, 100))
    ]
    assert read[0] < read[1] < read[2] == pytest.approx(everything)
    # Two tokens with two of four experts each miss one with a chance of a quarter.
    assert (everything - read[1]) / (everything - read[0]) == pytest.approx(0.5)


def test_costs_are_for_the_context_that_was_asked_for(tmp_path: Path) -> None:
    path = save_config(build("llama", tied=True), tmp_path)
    default, short = make_plan(path), make_plan(path, context=32)
    assert (default.context, short.context) == (128, 32)  # all that the model can read, rather than 2048
    assert default.base.kv_cache_bytes == 4 * short.base.kv_cache_bytes
    for context in (0, 129):
        with pytest.raises(PatError, match=f"context={context}; expected a number of tokens from 1 to 128"):
            make_plan(path, context=context)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_adapter_is_counted_exactly(family: str) -> None:
    config = PatConfig(task_type="CAUSAL_LM", r=4)
    skeleton = build_skeleton(build(family, tied=True).config, get_family(family), torch.float32)
    memory = training_memory(skeleton, config, batch_size=2, length=8)
    base = build(family, tied=True)
    known = {id(t) for t in (*base.parameters(), *base.buffers())}
    model = attach(base, r=4, operator_rank=None)
    added = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in known]
    assert memory.num_trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.adapter_bytes == sum(t.numel() * t.element_size() for t in added)


def saved_bytes(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Return the bytes of everything that autograd saves in the decoder layers, weights and buffers excepted."""
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs)
    del output
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_the_estimate_of_activations_is_near_what_autograd_saves(family: str) -> None:
    """The difference of two depths leaves out what does not belong to a layer, such as the logits."""
    inputs = batch(length=128)

    def both(num_layers: int) -> Iterator[int]:
        types = {"layer_types": ["full_attention"] * num_layers} if family == "gemma2" else {}
        shape = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": num_layers} | types
        base = build(family, tied=False, **shape)
        skeleton = build_skeleton(base.config, get_family(family), torch.float32)
        config = PatConfig(task_type="CAUSAL_LM", r=8, rotation="none")
        yield training_memory(skeleton, config, batch_size=2, length=128).activation_bytes
        model = attach(base, r=8, rotation="none", operator_rank=None).train()
        tuner_of(model).set_step(1, 10)
        yield saved_bytes(model, {"input_ids": inputs["input_ids"]})

    (estimated_1, saved_1), (estimated_3, saved_3) = both(1), both(3)
    assert estimated_3 - estimated_1 == pytest.approx(saved_3 - saved_1, rel=ACTIVATION_TOLERANCE)


def test_widths_near_the_one_taken_are_shown_with_it(tmp_path: Path) -> None:
    plan = make_plan(save_config(build("llama", tied=True), tmp_path))
    assert plan.width.pruned_hidden_size == PRUNED
    assert plan.nearby_widths == (24, 28, 32, 36, 40, 44)
    assert plan.width.reason.startswith("cutting 0.25 of 48 leaves 36;")
    aligned = make_plan(str(tmp_path), multiple_of=16, pruning_ratio=0.3)
    assert aligned.nearby_widths == (16, 32)


def test_speedups_are_ratios_and_above_one(tmp_path: Path) -> None:
    plan = make_plan(save_config(build("llama", tied=True), tmp_path), pruning_ratio=0.5)
    ratio = plan.base.prefill_flops_per_token / plan.pruned.prefill_flops_per_token
    assert plan.prefill_speedup == ratio
    # Half of the weights, but the whole of attention and cache, which are most of a tiny model's cost.
    assert 1 < plan.prefill_speedup < 2
    assert 1 < plan.decode_speedup < 2


def test_notes_say_what_was_assumed(tmp_path: Path) -> None:
    model = build("llama", tied=True)
    path = tmp_path / save_config(model, tmp_path)
    stored = json.loads((path / "config.json").read_text())
    del stored["dtype"]
    stored["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (path / "config.json").write_text(json.dumps(stored))
    plan = make_plan(str(path), untie_word_embeddings=True)
    notes = " ".join(plan.notes)
    assert "float32" in notes and "quantised" in notes
    assert f"{plan.pruned.groups['head'].num_parameters:,}" in notes


def test_tables_show_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(save_config(build("mixtral", tied=True), tmp_path))
    print_plan(plan)
    printed = capsys.readouterr()
    for number in (plan.base.total.num_parameters, plan.pruned.total.num_parameters):
        assert f"{number:,}" in printed.out
    for words in ("embedding and head, tied", "experts", "Legal widths nearby", f"{plan.decode_speedup:.2f}x faster"):
        assert words in printed.out
    assert all(heading in printed.out for heading in ("part", "quantity", "purpose", "bytes"))
    assert not printed.err


def test_json_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(save_config(build("llama", tied=False), tmp_path))
    print_plan(plan, as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["width"]["pruned_hidden_size"] == PRUNED
    assert facts["pruned"]["total"]["num_parameters"] == plan.pruned.total.num_parameters
    assert facts["prefill_speedup"] == plan.prefill_speedup
    assert facts["training"]["total_bytes"] == plan.training.total_bytes
