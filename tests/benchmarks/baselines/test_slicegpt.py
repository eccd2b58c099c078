"""SliceGPT: the base's function at full width, an honest count, and the steps of a sliced model's life."""

from __future__ import annotations

import tempfile

import pytest
import torch
from compare.baselines.budget import num_parameters
from compare.baselines.slicegpt import (
    SlicedLayer,
    choose_sliced_width,
    principal_components,
    slice_model,
    sliced_parameters,
)
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import batch, build, tiny_tokenizer
from torch import Tensor
from transformers import DynamicCache
from trl import SFTConfig, SFTTrainer

from pat.errors import PatError

SLICEABLE = ("llama", "qwen3", "gemma", "phi3", "granite")

SAME = 1e-4
"""On logits of deviation about 1: every point of the stream is rotated in float32, which moves them by 1e-5."""

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def sequences(num: int = 9, length: int = 12) -> list[Tensor]:
    return list(batch(seed=5, batch_size=num + 1, length=length)["input_ids"][:num])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SLICEABLE)
def test_at_full_width_it_is_the_base(family: str, tied: bool) -> None:
    model = build(family, tied=tied)
    sliced = slice_model(model, sequences(), width=model.config.hidden_size)
    inputs = batch()
    real = inputs["attention_mask"].bool()
    logits, expected = sliced(**inputs).logits[real], model(**inputs).logits[real]
    assert (logits - expected).abs().max() < SAME
    # Not for want of rotation: the weights are others, and so is the count.
    assert not torch.allclose(sliced.get_input_embeddings().weight, model.get_input_embeddings().weight, atol=0.1)
    assert num_parameters(sliced) > num_parameters(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SLICEABLE)
def test_the_count_is_known_beforehand_and_includes_shortcuts(family: str, tied: bool) -> None:
    model = build(family, tied=tied)
    target = round(0.75 * num_parameters(model))
    width = choose_sliced_width(model, target)
    assert width < 36  # of 48: shortcuts and the untied head are paid for
    sliced = slice_model(model, sequences(), width=width)
    assert num_parameters(sliced) == sliced_parameters(model, width)
    shortcuts = [p for name, p in sliced.named_parameters() if "shortcut" in name]
    assert len(shortcuts) == 6 and all(p.shape == (width, width) and not p.requires_grad for p in shortcuts)
    for other in (width - 1, width + 1):
        assert abs(sliced_parameters(model, other) - target) >= abs(num_parameters(sliced) - target)


def test_a_slice_that_the_data_does_not_need_changes_nothing() -> None:
    # A stream whose last 8 of 48 channels nobody writes: 40 directions are enough, whatever they are.
    model = build("llama", tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 40:] = 0
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight[40:] = 0
                writer.bias[40:] = 0
    calibration = sequences(20)
    narrow, narrower = (slice_model(model, calibration, width=width) for width in (40, 36))
    expected = model(**batch()).logits[0]
    assert (narrow(**batch()).logits[0] - expected).abs().max() < SAME
    assert (narrower(**batch()).logits[0] - expected).abs().max() > 100 * SAME


def test_each_basis_is_that_of_the_states_the_sliced_model_has() -> None:
    model, ids = build("llama", tied=True), torch.stack(sequences(20))
    sliced = slice_model(model, list(ids), width=30)
    points: list[Tensor] = []  # states of every point, as the norms see them
    written: list[Tensor] = []  # what every writer reads
    for layer in sliced.model.layers:
        assert isinstance(layer, SlicedLayer)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_pre_hook(lambda module, args: points.append(args[0].double()))
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.register_forward_pre_hook(lambda module, args: written.append(args[0]))
    sliced.model.norm.register_forward_pre_hook(lambda module, args: points.append(args[0].double()))
    sliced(input_ids=ids, use_cache=False)

    eps = model.config.rms_norm_eps
    embedded = model.model.embed_tokens(ids).double()
    basis = principal_components([embedded], 30, eps)
    assert torch.allclose(points[0], embedded @ basis, atol=1e-5)
    writers = [writer for layer in model.model.layers for writer in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for before, after, read, writer in zip(points[:-1], points[1:], written, writers, strict=True):
        full = before @ basis.mT + writer(read).double()
        basis = principal_components([full], 30, eps)
        # Eigenvectors have no sign, and rounding turns them a little where two eigenvalues are close.
        assert ((full @ basis).abs() - after.abs()).abs().max() < 1e-3
        assert after.abs().max() > 1


def test_cached_steps_equal_one_pass() -> None:
    sliced = slice_model(build("llama", tied=True), sequences(), width=30)
    ids = batch(batch_size=1)["input_ids"]
    expected = sliced(input_ids=ids, use_cache=False).logits
    cache = DynamicCache(config=sliced.config)
    parts = [sliced(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split([10, 1, 13], 1)]
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-5
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    assert torch.equal(sliced(input_ids=ids, position_ids=positions, use_cache=False).logits, expected)
    generated = sliced.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == ids.shape[1] + 3


def test_lora_attaches_and_only_it_is_trained() -> None:
    sliced = slice_model(build("qwen2", tied=True), sequences(), width=30)
    before = {name: p.detach().clone() for name, p in sliced.named_parameters()}
    adapted = get_peft_model(sliced, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    ids = batch()["input_ids"]
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    merged = adapted.merge_and_unload()
    after = dict(merged.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(tuple(f"{target}.weight" for target in TARGETS))}


def test_the_stock_trainer_tunes_it() -> None:
    tokenizer = tiny_tokenizer()
    sliced = slice_model(build("llama", tied=True), sequences(), width=30)
    rows = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=True,
            disable_tqdm=True,
        )
        config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            sliced, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=config
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe"])
def test_families_that_cannot_be_sliced(family: str) -> None:
    with pytest.raises(PatError, match=f"SliceGPT cannot slice a model of type '{family}'"):
        slice_model(build(family, tied=False), sequences(), width=30)


def test_impossible_requests() -> None:
    model = build("llama", tied=False)
    for width in (0, 49):
        with pytest.raises(PatError, match=f"width of {width} .* 1 to the hidden size 48"):
            slice_model(model, sequences(), width=width)
    with pytest.raises(PatError, match="at least one sequence"):
        slice_model(model, [], width=30)


@torch.no_grad()
def test_a_sliced_model_generates_in_padded_batches_as_in_plain_passes() -> None:
    """What accuracies by letter are measured by: SliceGPT's layers of its own take part in cache and padding."""
    model = slice_model(build("llama", tied=True), sequences(), width=36)
    prompts = [ids.tolist()[:length] for ids, length in zip(sequences(3), (12, 9, 4), strict=True)]
    padded = [[0] * (12 - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (12 - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(torch.tensor(padded), attention_mask=torch.tensor(mask), **options)
    for prompt, row in zip(prompts, generated.tolist(), strict=True):
        tokens = list(prompt)
        for token in row[12:]:
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            assert logits.max() - logits[token] < SAME
            tokens.append(token)
