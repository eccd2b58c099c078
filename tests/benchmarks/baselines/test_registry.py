"""What holds of every baseline: an honest count, the base left alone, a model that runs. And what they learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compare.baselines import METHODS, calibration_sequences, pat_parameters, prune
from compare.baselines.budget import nearest
from compare.baselines.calibration import batched
from compare.baselines.channels import cut_channels, keep_largest, keep_random, magnitude_scores
from compare.budget import lora_targets
from compare.tokens import tokenize_examples
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import KINDS, batch, build, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pat.data.load import load_training_data
from pat.errors import PatError
from pat.nll import response_nll
from pat.plan.command import run_plan
from pat.plan.options import PlanOptions

WIDTH = 36  # of 48

DEEP = {"num_hidden_layers": 16}
"""Enough layers that some lie between those that LLM-Pruner as published spares."""


def sequences(num: int = 6, length: int = 12) -> list[Tensor]:
    return list(batch(seed=5, batch_size=num + 1, length=length)["input_ids"][:num])


def pruned_by(method: str, model: PreTrainedModel, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "target_parameters": pat_parameters(model, WIDTH),
        "pruned_hidden_size": WIDTH,
        "calibration": sequences(),
    }
    return prune(method, model, **(defaults | options))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_every_baseline_keeps_to_the_interface(method: str, tied: bool) -> None:
    model = build("llama", tied=tied, **DEEP).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, state = model.config.to_dict(), torch.get_rng_state()
    pruned = pruned_by(method, model)

    assert model.config.to_dict() == config and torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())

    assert pruned.num_parameters == sum(p.numel() for p in pruned.model.parameters())
    target = pat_parameters(model, WIDTH)
    layer = model.model.layers[0]
    if method == "shortgpt":  # comes as close as whole layers allow
        assert abs(pruned.num_parameters - target) <= sum(p.numel() for p in layer.parameters()) / 2
    elif method == "llm_pruner_published":  # or as one of two groups of heads in ten layers
        assert abs(pruned.num_parameters - target) <= 10 * sum(p.numel() for p in layer.self_attn.parameters()) / 4
    else:
        assert abs(pruned.num_parameters - target) < 0.02 * target
    assert str(WIDTH) in pruned.description or method not in ("magnitude", "random")

    # The two share no memory, so tuning one leaves the other alone.
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not any(p.untyped_storage().data_ptr() in storages for p in pruned.model.parameters())

    adapted = get_peft_model(pruned.model, LoraConfig(r=2, target_modules=lora_targets(model), task_type="CAUSAL_LM"))
    inputs = batch()
    output = adapted(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    assert output.logits.shape[-1] == model.config.vocab_size
    factors = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(factors) == 7 * pruned.model.config.num_hidden_layers
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in factors)


def test_reduced_precision_stays_what_it_is() -> None:
    model = build("llama", tied=True, dtype=torch.bfloat16, **DEEP)
    for method in METHODS:
        assert {p.dtype for p in pruned_by(method, model).model.parameters()} == {torch.bfloat16}


def test_the_same_arguments_give_the_same_model() -> None:
    model = build("llama", tied=True, **DEEP)
    for method in METHODS:
        first, second = (pruned_by(method, model, seed=3).model for _ in range(2))
        assert torch.equal(first(**batch()).logits, second(**batch()).logits)
    first, second = (pruned_by("random", model, seed=seed).model for seed in (3, 4))
    assert not torch.equal(first(**batch()).logits, second(**batch()).logits)


def test_unknown_methods() -> None:
    with pytest.raises(PatError, match="baseline 'wanda'; expected one of llm_pruner, llm_pruner_published, "):
        pruned_by("wanda", build("llama", tied=False))


@pytest.mark.parametrize("tied", [True, False])
def test_the_budget_is_what_pat_plan_says(tied: bool, tmp_path: Path) -> None:
    model = build("gemma3_text", tied=tied)
    model.save_pretrained(tmp_path)
    for untie in (False, True):
        options = PlanOptions(model_name_or_path=str(tmp_path), pruned_hidden_size=WIDTH, untie_word_embeddings=untie)
        planned = run_plan(options).candidates[0].cost.total.num_parameters
        assert pat_parameters(model, WIDTH, untie=untie) == planned


def test_nearest_goes_both_ways() -> None:
    assert nearest([1, 4, 9, 16], lambda n: n, 6) == 4
    assert nearest([1, 4, 9, 16], lambda n: n, 8) == 9
    assert nearest([3, 5], lambda n: n, 4) == 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", KINDS)
def test_cut_channels_are_channels_set_to_zero(family: str, tied: bool) -> None:
    model, keep = build(family, tied=tied), keep_random(48, WIDTH, seed=1)
    dense = cut_channels(model, keep)
    gone = torch.ones(48, dtype=torch.bool).scatter(0, keep, False)
    # Every site of the stream writes zero there, by hooks: nothing of the cut itself is used.
    layers = model.model.layers
    sites = [model.model.embed_tokens, *(layer.self_attn.o_proj for layer in layers), *(layer.mlp for layer in layers)]
    handles = [site.register_forward_hook(lambda module, args, output: output * ~gone) for site in sites]
    expected = model(**batch()).logits
    for handle in handles:
        handle.remove()
    real = batch()["attention_mask"].bool()
    assert (dense(**batch()).logits - expected)[real].abs().max() < 1e-4


@pytest.mark.parametrize("family", KINDS)
def test_magnitude_finds_the_channels_that_hardly_exist(family: str) -> None:
    model = build(family, tied=False)
    faint = torch.tensor([3, 17, 40])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, faint] *= 1e-3
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[faint] *= 1e-3
            down = getattr(layer.mlp, "down_proj", None)
            if down is not None:
                down.weight[faint] *= 1e-3
            else:
                layer.mlp.experts.down_proj[:, faint] *= 1e-3
    scores = magnitude_scores(model)
    assert scores.shape == (48,) and set(scores.argsort()[:3].tolist()) == set(faint.tolist())
    kept = keep_largest(scores, 45)
    assert kept.tolist() == sorted(set(range(48)) - set(faint.tolist()))


def test_magnitude_does_not_depend_on_where_a_channels_scale_is_kept() -> None:
    model = build("llama", tied=False)
    before = magnitude_scores(model)
    with torch.no_grad():
        for norm in (model.model.layers[0].input_layernorm, model.model.norm):
            norm.weight *= 4
        for reader in ("q_proj", "k_proj", "v_proj"):
            getattr(model.model.layers[0].self_attn, reader).weight /= 4
        model.lm_head.weight /= 4
    assert torch.allclose(magnitude_scores(model), before)


def test_random_channels_are_a_seeded_selection() -> None:
    keep = keep_random(48, WIDTH, seed=7)
    assert keep.tolist() == sorted(set(keep.tolist())) and len(keep) == WIDTH and keep.max() < 48
    assert torch.equal(keep, keep_random(48, WIDTH, seed=7)) and not torch.equal(keep, keep_random(48, WIDTH, seed=8))


def rows(num: int) -> Dataset:
    pairs = [(f"question {n}?", f"answer {n}" * (1 + n % 3)) for n in range(num)]
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


def test_calibration_sequences_start_with_rows() -> None:
    tokenizer = tiny_tokenizer()
    cut = calibration_sequences(tokenizer, rows(60), num_sequences=5, length=40, seed=2)
    assert len(cut) == 5 and all(sequence.shape == (40,) and sequence.dtype == torch.long for sequence in cut)
    assert all(tokenizer.decode(sequence).startswith("question ") for sequence in cut)
    again = calibration_sequences(tokenizer, rows(60), num_sequences=5, length=40, seed=2)
    other = calibration_sequences(tokenizer, rows(60), num_sequences=5, length=40, seed=3)
    assert torch.equal(torch.stack(cut), torch.stack(again)) and not torch.equal(torch.stack(cut), torch.stack(other))
    with pytest.raises(PatError, match=r"Got 6 rows, enough for \d calibration sequences of 40 tokens; expected 50"):
        calibration_sequences(tokenizer, rows(6), num_sequences=50, length=40)


def test_batches_hold_equally_long_sequences() -> None:
    lengths = [4, 4, 4, 6, 4]
    batches = list(batched([torch.arange(n) for n in lengths], 2))
    assert [tuple(b.shape) for b in batches] == [(2, 4), (1, 4), (1, 6), (1, 4)]


def test_on_a_trained_model_all_beat_random_channels(
    stories260k: tuple[PreTrainedModel, PreTrainedTokenizerBase], tests_data: Path
) -> None:
    model, tokenizer = stories260k
    data = load_training_data(tests_data / "instructions.jsonl", tokenizer=tokenizer, held_out=40)
    held_out = tokenize_examples(tokenizer, data.held_out, 512)
    calibration = calibration_sequences(tokenizer, data.train, num_sequences=4, length=512)
    target = pat_parameters(model, 48)
    nll = {}
    for method in set(METHODS) - {"llm_pruner_published"}:  # which needs more layers
        pruned = prune(method, model, target_parameters=target, pruned_hidden_size=48, calibration=calibration)
        nll[method] = response_nll(pruned.model, held_out, batch_size=8, pad_token_id=0).nll
    assert nll["llm_pruner"] < nll["random"] - 0.5
    assert nll["shortgpt"] < nll["random"] - 0.5
    assert nll["slicegpt"] < nll["random"] - 0.5
    assert nll["minitron"] < nll["random"] - 0.5
