"""The tiny models must be able to expose a wrong fold: these tests check that each trap is really set."""

import copy
import math
from pathlib import Path

import pytest
import torch
from tiny_models import (
    BOS_ID,
    EOS_ID,
    FAMILIES,
    HEAD_DIM,
    PAD_ID,
    SLIDING_WINDOW,
    UNK_ID,
    VOCAB_SIZE,
    WITHOUT_BIAS,
    batch,
    build,
    norm_modules,
    tiny_tokenizer,
)
from tiny_training import heard, largest_difference, logits
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pat.families import get_family

VISIBLE = 1e-4  # ten times the strictest parity tolerance (1e-5): a change this big cannot pass as rounding

NEUTRAL = {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
    "query_pre_attn_scalar": 1,
    "attn_logit_softcapping": 1000.0,
    "final_logit_softcapping": 1000.0,
    "sliding_window": 100,
}
"""Values that switch a field of a configuration off."""


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param, tied=True)


def test_nothing_is_wrong_with_the_configuration(model: PreTrainedModel) -> None:
    """A warning here, about rope most of all, would be one wherever a small model is loaded."""
    with heard() as messages:
        again = build(model.config.model_type, tied=True)
    assert not [message for message in messages if "xIELU" not in message]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_tying_follows_the_argument(model: PreTrainedModel) -> None:
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = build(model.config.model_type, tied=False)
    assert not untied.config.tie_word_embeddings
    assert largest_difference(untied.lm_head.weight.detach(), untied.model.embed_tokens.weight.detach()) > 0.1


def test_logits_are_of_order_one_and_channels_and_gains_differ(model: PreTrainedModel) -> None:
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    assert 0.5 < output.logits[mask].std().item() < 2
    for hidden in output.hidden_states:
        energy = hidden[mask].pow(2).mean(0)
        assert energy.max() > 2 * energy.min()
    gains = [norm.weight.detach() + get_family(model.config.model_type).gain_offset for _, norm in norm_modules(model)]
    assert all(gain.std() > 0.1 for gain in gains)
    assert torch.cat(gains).mean().item() == pytest.approx(1, abs=0.1)


def test_every_parameter_matters(model: PreTrainedModel) -> None:
    """Biases, attention sinks and every expert among them."""
    model.zero_grad()
    output = model(**batch()).logits
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    parts = dict(model.named_parameters())
    for name, parameter in parts.items():
        if ".layers.0." not in name:
            continue  # softmax ignores a key bias where no rotary embedding stands between, as in some later layers
        rows = parameter.grad.flatten(1).abs().amax(1) if "experts" in name else parameter.grad.abs().max()
        assert (rows > VISIBLE).all(), name
    assert any(name.endswith("bias") for name in parts) == (model.config.model_type not in WITHOUT_BIAS)


def test_multipliers_caps_and_windows_matter(model: PreTrainedModel) -> None:
    before = logits(model)
    for field, neutral in NEUTRAL.items():
        if getattr(model.config, field, None) is None:
            continue
        config = copy.deepcopy(model.config)
        setattr(config, field, neutral)
        other = AutoModelForCausalLM.from_config(config).eval()
        other.load_state_dict(model.state_dict())
        assert largest_difference(logits(other), before) > VISIBLE, field


def test_attention_heads_are_grouped_and_head_dim_is_sometimes_explicit(model: PreTrainedModel) -> None:
    config = model.config
    heads = (config.num_attention_heads, model.model.layers[0].self_attn.head_dim)
    assert heads in ((4, HEAD_DIM), (4, 12), (6, 8)) and config.num_key_value_heads == 2
    assert batch()["input_ids"].shape[1] > 2 * SLIDING_WINDOW


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batch_pads_the_last_row(padding_side: str) -> None:
    inputs = batch(batch_size=3, length=16, padding_side=padding_side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    padded = [0] * 4 + [1] * 12
    assert mask.tolist() == [[1] * 16, [1] * 16, padded if padding_side == "left" else padded[::-1]]
    assert (ids[mask == 0] == PAD_ID).all()
    assert ids[mask == 1].min() > UNK_ID
    assert ids.max() < VOCAB_SIZE
    assert torch.equal(ids, batch(batch_size=3, length=16, padding_side=padding_side)["input_ids"])
    assert not torch.equal(ids, batch(seed=1, batch_size=3, length=16, padding_side=padding_side)["input_ids"])


def test_a_single_row_is_not_padded() -> None:
    assert batch(batch_size=1)["attention_mask"].all()


def test_tokenizer_round_trips_and_fits_the_models(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    assert len(tokenizer) <= VOCAB_SIZE
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (PAD_ID, BOS_ID, EOS_ID, UNK_ID)
    text = "Hi there!  {x: 1}\n\tok"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for candidate in (tokenizer, loaded):
        ids = candidate(text)["input_ids"]
        assert len(ids) == len(text)
        assert candidate.decode(ids) == text
        assert candidate("é")["input_ids"] == [UNK_ID]
        assert candidate(["a", "abc"], padding=True)["attention_mask"] == [[1, 0, 0], [1, 1, 1]]


def test_chat_template_marks_the_assistant(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<s><|user|>hi</s><|assistant|>yo</s>"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(answer) == "yo</s>"


def test_stories260k_is_trained(stories260k: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = stories260k
    inputs = tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt")
    with torch.no_grad():
        loss = model(**inputs, labels=inputs["input_ids"]).loss.item()
    assert loss < 0.5 * math.log(model.config.vocab_size)
