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
    ONE_PLUS_FAMILIES,
    PAD_ID,
    RMS_NORM_EPS,
    SLIDING_WINDOW,
    UNK_ID,
    VOCAB_SIZE,
    batch,
    build,
    norm_modules,
    tiny_tokenizer,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

WITHOUT_BIAS = {"mistral", "phi3", "mixtral"}
QK_NORM_FAMILIES = {"qwen3", "gemma3_text", "olmo2", "qwen3_moe"}
VISIBLE = 1e-4  # ten times the strictest parity tolerance (1e-5): a change this big cannot pass as rounding


@torch.no_grad()
def logits_of(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Logits at the unpadded positions, shape (tokens, vocabulary)."""
    inputs = inputs or batch()
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def shift(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


def rebuilt(model: PreTrainedModel, **changes: object) -> PreTrainedModel:
    """The same weights under a changed config."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("tied", [True, False])
def test_tying_follows_the_argument(family: str, tied: bool) -> None:
    model = build(family, tied=tied)
    assert model.config.model_type == family
    assert model.config.tie_word_embeddings is tied
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) is tied
    if not tied:
        assert shift(embedding, head) > 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_of_order_one_and_channels_differ(family: str, tied: bool) -> None:
    model = build(family, tied=tied)
    inputs = batch()
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    mask = inputs["attention_mask"].bool()
    assert not model.training
    assert 0.5 < output.logits[mask].std().item() < 2
    for hidden in output.hidden_states:
        energy = hidden[mask].pow(2).mean(0)
        assert energy.max() > 2 * energy.min()


def test_building_is_reproducible_and_leaves_the_global_generator_alone(family: str) -> None:
    before = torch.get_rng_state()
    first, second, other = (build(family, tied=True, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    for (name, weight), again, different in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, again), name
        assert not torch.equal(weight, different), name


def test_every_gain_is_spread_around_one(family: str) -> None:
    norms = dict(norm_modules(build(family, tied=False)))
    assert any(name.endswith("q_norm") for name in norms) is (family in QK_NORM_FAMILIES)
    for name, norm in norms.items():
        gain = norm.weight + 1 if family in ONE_PLUS_FAMILIES else norm.weight
        assert 0.15 < gain.std().item() < 0.45, name
        assert 0.7 < gain.mean().item() < 1.3, name


def test_gain_form_is_what_the_forward_pass_uses(family: str) -> None:
    norm = build(family, tied=False).model.norm
    states = torch.randn(5, 48)
    normed = states / (states.pow(2).mean(-1, keepdim=True) + RMS_NORM_EPS).sqrt()
    gain = norm.weight + 1 if family in ONE_PLUS_FAMILIES else norm.weight
    torch.testing.assert_close(norm(states), normed * gain)


def test_every_bias_is_on_and_matters(family: str) -> None:
    model = build(family, tied=False)
    reference = logits_of(model)
    biases = {name: value for name, value in model.named_parameters() if name.endswith("bias")}
    assert bool(biases) is (family not in WITHOUT_BIAS)
    if family not in WITHOUT_BIAS | {"qwen2"}:
        assert "model.layers.0.self_attn.o_proj.bias" in biases
    for name, bias in biases.items():
        assert bias.abs().min() > 0, name
        with torch.no_grad():
            original = bias.clone()
            bias.zero_()
            # Softmax ignores a key bias where no rotary embedding stands between.
            if (family, name) != ("smollm3", "model.layers.1.self_attn.k_proj.bias"):
                assert shift(logits_of(model), reference) > VISIBLE, name
            bias.copy_(original)


def test_a_wrong_epsilon_shows(family: str) -> None:
    model = build(family, tied=True)
    widened = rebuilt(model, rms_norm_eps=RMS_NORM_EPS * 4 / 3)  # what cutting 25 % of the channels asks for
    assert model.config.rms_norm_eps == RMS_NORM_EPS
    assert shift(logits_of(widened), logits_of(model)) > VISIBLE


def test_attention_heads_are_grouped_and_head_dim_is_sometimes_explicit() -> None:
    explicit = set()
    for family in FAMILIES:
        config = build(family, tied=True).config
        assert config.num_attention_heads in (4, 6)
        assert config.num_key_value_heads == 2
        if getattr(config, "head_dim", None) == HEAD_DIM != config.hidden_size // config.num_attention_heads:
            explicit.add(family)
    assert explicit >= {"llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "mixtral"}
    assert not explicit & {"qwen2", "phi3", "olmo2", "smollm3", "granite"}  # head_dim derived from the width


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_the_sliding_window_cuts_the_test_sequences(family: str) -> None:
    model = build(family, tied=True)
    assert batch()["input_ids"].shape[1] > 2 * SLIDING_WINDOW
    assert shift(logits_of(rebuilt(model, sliding_window=100)), logits_of(model)) > VISIBLE
    if family != "mistral":
        assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("granite", "embedding_multiplier"),
        ("granite", "residual_multiplier"),
        ("granite", "attention_multiplier"),
        ("granite", "logits_scaling"),
        ("gemma2", "attn_logit_softcapping"),
        ("gemma2", "final_logit_softcapping"),
        ("gemma2", "query_pre_attn_scalar"),
        ("gemma3_text", "query_pre_attn_scalar"),
    ],
)
def test_multipliers_and_caps_matter(family: str, field: str) -> None:
    model = build(family, tied=True)
    assert getattr(model.config, field) != 1
    neutral = 1000.0 if "softcapping" in field else 1
    assert shift(logits_of(rebuilt(model, **{field: neutral})), logits_of(model)) > VISIBLE


def test_smollm3_mixes_rotary_and_plain_layers() -> None:
    layers = build("smollm3", tied=True).model.layers
    assert {bool(layer.self_attn.use_rope) for layer in layers} == {True, False}


def test_moe_layers_route_to_every_expert() -> None:
    for family, sparse in (("mixtral", [True, True, True]), ("qwen3_moe", [True, False, True])):
        model = build(family, tied=True)
        assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == sparse
        with torch.no_grad():
            router_logits = model(**batch(), output_router_logits=True).router_logits
        assert len(router_logits) == sum(sparse)
        for layer_logits in router_logits:
            assert layer_logits.topk(2, dim=-1).indices.unique().numel() == 4


def test_hidden_size_dtype_and_overrides(family: str) -> None:
    model = build(family, tied=False, hidden_size=96, dtype=torch.bfloat16, intermediate_size=32)
    reference = build(family, tied=False, hidden_size=96, intermediate_size=32)
    assert model.config.hidden_size == 96
    assert model.config.intermediate_size == 32
    for (name, rounded), exact in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(rounded, exact.to(torch.bfloat16)), name


def test_an_explicit_head_dim_survives_saving(family: str, tmp_path: Path) -> None:
    model = build(family, tied=True)
    config = copy.deepcopy(model.config)
    config.head_dim = model.model.layers[0].self_attn.head_dim
    config.hidden_size = 36
    narrow = AutoModelForCausalLM.from_config(config).eval()
    narrow.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).head_dim == config.head_dim
    assert loaded.model.layers[0].self_attn.head_dim == config.head_dim
    assert torch.equal(logits_of(loaded), logits_of(narrow))


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="got family 'gpt2', expected one of llama"):
        build("gpt2", tied=True)


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


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padded_batches_give_finite_logits(family: str, padding_side: str) -> None:
    logits = logits_of(build(family, tied=True), **batch(padding_side=padding_side))
    assert logits.isfinite().all()


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
