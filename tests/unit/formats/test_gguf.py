"""What a GGUF file holds: sizes byte by byte, types as llama.cpp gives them, and what is refused."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build

from pat.errors import PatError
from pat.file_sizes.gguf_families import GGUF_FAMILIES, gguf_family
from pat.file_sizes.gguf_layout import layout_of
from pat.file_sizes.gguf_types import QUANTIZATIONS, Placed, type_of
from pat.file_sizes.gguf_vocabulary import name_in_file, unlike_added, unlike_spaces, unnamed_ends, vocabulary_of
from pat.file_sizes.int4_size import Int4Size, int4_size
from pat.file_sizes.predict import file_sizes
from pat.formats.gguf_file import read_gguf, write_gguf
from pat.loading.tokenizer import load_plain_tokenizer
from pat.surgery.costs import Skeleton
from pat.surgery.describe import map_of
from pat.surgery.residual import model_tensors

gguf = pytest.importorskip("gguf")

STORIES = Path(__file__).resolve().parents[2] / "data" / "stories260K"

ODD_WINDOWS = ["full_attention", "full_attention", "sliding_attention"]

USUAL: dict[str, dict[str, object]] = {
    "gemma2": {"query_pre_attn_scalar": 20},
    "gemma3_text": {"query_pre_attn_scalar": 20},
    "qwen3_moe": {"mlp_only_layers": []},
    "smollm3": {"no_rope_layers": [1, 1, 1]},
}
"""Fields without which a tiny model of a family is one that llama.cpp does not run."""

PLAIN = {"attention_bias": False, "mlp_bias": False, "use_bias": False, "attention_out_bias": False}
BIAS = {"attention_bias": True}


def skeleton(family: str = "llama", *, tied: bool = False, **fields: object) -> Skeleton:
    model = build(family, tied=tied, **(PLAIN | fields))
    return Skeleton(model, map_of(model), torch.float32)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_a_file_has_the_size_and_the_values_that_its_layout_says(tmp_path: Path, kind: str) -> None:
    whole, chosen = skeleton(), QUANTIZATIONS[kind]
    vocabulary = vocabulary_of(load_plain_tokenizer(str(STORIES)), 512, [2, 7, 1, 8, 9])
    ends = {
        entry.key: entry.value
        for entry in vocabulary
        if entry.key.endswith(("eos_token_id", "eot_token_id", "eom_token_id"))
    }
    assert ends == {
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.eom_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert unnamed_ends(load_plain_tokenizer(str(STORIES)), [2, 7, 1]) == []
    assert len(unnamed_ends(load_plain_tokenizer(str(STORIES)), [2, 7, 1, 8, 9])) == 2
    layout = layout_of(whole, vocabulary, name="tiny", kind=chosen)
    path = tmp_path / "tiny.gguf"
    weights = model_tensors(whole.model)
    write_gguf(layout, weights, path, chosen)
    assert path.stat().st_size == layout.num_bytes(chosen)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(stored) == {tensor.name for tensor in layout.tensors}
    for tensor in layout.tensors:
        assert stored[tensor.name].tensor_type.name == layout.type_of(tensor, chosen).name
    down = gguf.quants.dequantize(stored["blk.1.ffn_down.weight"].data, stored["blk.1.ffn_down.weight"].tensor_type)
    np.testing.assert_allclose(down, weights["model.layers.1.mlp.down_proj.weight"].detach().numpy(), atol=0.02)


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_names_are_those_of_the_gguf_package(family: str) -> None:
    whole = skeleton(family, tied=family in ("gemma", "gemma2"), **USUAL.get(family, {}))
    layout = layout_of(whole, [], name="x", kind=QUANTIZATIONS["F32"])
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.architecture)
    known = gguf.get_tensor_name_map(arch, layout.num_layers)
    allowed = {
        gguf.TENSOR_NAMES[kind].format(bid=layer)
        for kind in gguf.MODEL_TENSORS[arch]
        for layer in range(layout.num_layers)
    }
    for tensor in layout.tensors:
        assert tensor.name.rpartition(".")[0] in allowed
        if not any(part in tensor.source for part in ("experts", "router")):  # which the package knows by older names
            assert known.get_name(tensor.source, (".weight", ".bias")) == tensor.name


@pytest.mark.parametrize(
    ("role", "row", "layer", "expected"),
    [
        ("ffn_down", 1536, 1, "Q6_K"),  # the first eighth of the layers
        ("ffn_down", 1536, 3, "Q4_K"),
        ("ffn_down", 864, 3, "Q5_0"),  # no multiple of 256
        ("ffn_down", 864, 1, "Q8_0"),
        ("ffn_down", 430, 3, "F16"),  # nor of 32
        ("attn_v", 2048, 29, "Q6_K"),
        ("attn_norm", 576, 0, "F32"),
        ("token_embd", 576, None, "Q8_0"),  # tied, and therefore the head
        ("token_embd", 2048, None, "Q6_K"),
    ],
)
def test_a_tensor_of_a_q4_k_m_file_has_llama_cpps_type(role: str, row: int, layer: int | None, expected: str) -> None:
    shape = (row,) if role == "attn_norm" else (64, row)
    tensor = Placed(f"{role}.weight", shape, role, layer)
    assert type_of(tensor, QUANTIZATIONS["Q4_K_M"], num_layers=30, tied=True).name == expected


def test_a_head_that_is_no_share_of_the_hidden_size_is_written_otherwise_or_refused() -> None:
    whole = layout_of(skeleton("qwen2"), [], name="x", kind=QUANTIZATIONS["F32"])
    cut = layout_of(skeleton("qwen2", hidden_size=36, head_dim=8), [], name="x", kind=QUANTIZATIONS["F32"])
    assert (whole.architecture, cut.architecture) == ("qwen2", "llama")
    assert all(tensor.num_heads for tensor in cut.tensors if tensor.role in ("attn_q", "attn_k"))
    with pytest.raises(PatError, match=r"do not make up its hidden size 36; .* --axes mlp or layers"):
        layout_of(skeleton("olmo2", hidden_size=36, head_dim=8), [], name="x", kind=QUANTIZATIONS["F32"])


def test_other_families_and_windows_that_llama_cpp_does_not_know_are_refused() -> None:
    with pytest.raises(PatError, match="'minimax_m2', which cannot be written as GGUF"):
        gguf_family("minimax_m2")
    with pytest.raises(PatError, match="whose windows do not alternate"):
        layout_of(
            skeleton(
                "gemma2",
                tied=True,
                layer_types=["full_attention"] * 2 + ["sliding_attention"],
                query_pre_attn_scalar=20,
            ),
            [],
            name="x",
            kind=QUANTIZATIONS["F32"],
        )
    with pytest.raises(PatError, match=r"query_pre_attn_scalar=10; .* the size of a head, 20"):
        layout_of(skeleton("gemma3_text"), [], name="x", kind=QUANTIZATIONS["F32"])


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping=None"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping=None"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                }
            },
            "a rotary embedding of type 'linear'",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act='silu'"),
        ("arcee", {"hidden_act": "silu"}, "hidden_act='silu'"),
        ("qwen3", {"attention_bias": True}, "with a bias in model.layers.0.self_attn.o_proj"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rotates 0.5 of each head",
        ),
        ("smollm3", {"mlp_bias": True}, "with a bias in model.layers.0.mlp"),
        ("ernie4_5", {"use_bias": True}, "with a bias in model.layers.0.mlp"),
    ],
)
def test_what_llama_cpp_would_run_as_another_function_is_refused(
    family: str, fields: dict[str, object], words: str
) -> None:
    usual = USUAL.get(family, {})
    tied = family.startswith("gemma")
    layout_of(skeleton(family, tied=tied, **usual), [], name="x", kind=QUANTIZATIONS["F32"])
    with pytest.raises(PatError, match=words):
        layout_of(skeleton(family, tied=tied, **(usual | fields)), [], name="x", kind=QUANTIZATIONS["F32"])


def tokenizer_with(folder: Path, *, added: tuple[dict[str, Any], ...] = (), **parts: Any) -> Any:
    """Return the tokenizer of stories260K with other parts and further tokens."""
    folder.mkdir()
    shutil.copy(STORIES / "tokenizer_config.json", folder)
    whole = json.loads((STORIES / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    known = {token["content"]: token for token in whole["added_tokens"]}
    for token in added:
        known[token["content"]] = {"id": 512 + len(known), **plain, **known.get(token["content"], {}), **token}
    whole["added_tokens"] = list(known.values())
    whole["model"] |= parts.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(whole | parts))
    return load_plain_tokenizer(str(folder))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
GEMMA = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
AS_BYTES = {"model": {"byte_fallback": False}, "normalizer": None, "pre_tokenizer": BYTES}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, None),
        ({"normalizer": {"type": "NFKC"}}, r"pieces with a byte fallback behind NFKC"),
        ({"normalizer": None}, "pieces with a byte fallback behind none"),
        ({"normalizer": SPACES, "pre_tokenizer": GEMMA}, None),
        ({"pre_tokenizer": GEMMA}, "behind Prepend .*Split"),
        ({"normalizer": None, "pre_tokenizer": METASPACE}, None),
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"split": True}}, "split=True"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "a mark within or behind words"),
        (AS_BYTES, None),
        (AS_BYTES | {"normalizer": {"type": "NFC"}}, None),
        (AS_BYTES | {"normalizer": {"type": "Lowercase"}}, "byte-level BPE behind the normalizer Lowercase"),
        (AS_BYTES | {"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "add_prefix_space=True"),
        (AS_BYTES | {"pre_tokenizer": BYTES | {"use_regex": False}}, "use_regex=False"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"SpecialToken": {"id": "</s>", "type_id": 0}},
                    ],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                    "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
                }
            },
            r"tokens around every text beyond one that opens it \(.*a, </s>\)",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_run_as_another_is_refused(
    parts: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    tokenizer = tokenizer_with(tmp_path / "t", **parts)  # Gemma's and a metaspace as transformers 5 makes them
    if words is None:
        assert vocabulary_of(tokenizer, 520)
    else:
        with pytest.raises(PatError, match=words):
            vocabulary_of(tokenizer, 520)


@pytest.mark.parametrize(
    ("parts", "prefix", "told"),
    [
        ({}, True, None),
        ({"normalizer": SPACES, "pre_tokenizer": GEMMA}, False, None),
        ({"normalizer": None, "pre_tokenizer": METASPACE}, False, None),
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "first"}}, True, "neither with one"),
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "always"}}, True, "unless there is one"),
        (AS_BYTES, None, None),
    ],
)
def test_a_space_before_a_text_is_in_the_file_and_told_where_llama_cpp_puts_more(
    parts: dict[str, Any], prefix: bool | None, told: str | None, tmp_path: Path
) -> None:
    tokenizer = tokenizer_with(tmp_path / "t", **parts)
    entries = {entry.key: entry.value for entry in vocabulary_of(tokenizer, 520)}
    assert entries.get("tokenizer.ggml.add_space_prefix") is prefix
    said = unlike_spaces(tokenizer)
    assert said is None if told is None else told in str(said)


def test_a_file_is_called_phi3_if_and_only_if_its_tokens_are_read_as_those_of_phi3(tmp_path: Path) -> None:
    """llama.cpp goes by the name, and does not load a file of such a name that lacks one of four tokens."""
    plain = tokenizer_with(tmp_path / "plain", added=({"content": "<|user|>"},))
    ours = ({"content": "<|user|>", "rstrip": True}, {"content": "</s>", "rstrip": True}, {"content": "<|endoftext|>"})
    phi = tokenizer_with(tmp_path / "phi", added=ours)
    other = tokenizer_with(tmp_path / "other", added=({"content": "<|user|>", "rstrip": True},))
    assert [name_in_file(name, plain) for name in ("model", "my-Phi3-cut", "phi-3")] == [
        "model",
        "my-phi 3-cut",
        "phi 3",
    ]
    assert [name_in_file(name, phi) for name in ("model", "Phi-3-cut")] == ["phi-3 model", "Phi-3-cut"]
    assert name_in_file("phi3", other) == "phi 3"
    assert (unlike_added(plain), unlike_added(phi), unlike_added(other)) == ([], [], ["<|user|>"])


def test_rows_too_odd_for_blocks_are_counted() -> None:
    layout = layout_of(skeleton(), [], name="x", kind=QUANTIZATIONS["Q4_K_M"])
    assert set(layout.odd_rows(QUANTIZATIONS["Q4_K_M"])) == {48, 72, 80}
    even = replace(layout, tensors=tuple(replace(t, shape=(2, 256)) for t in layout.tensors if t.is_matrix))
    assert not even.odd_rows(QUANTIZATIONS["Q4_K_M"])


def test_eight_bits_are_those_of_linear_modules_and_of_no_router_or_stack_of_experts() -> None:
    whole = skeleton("qwen3_moe")
    sizes, _ = file_sizes(whole, [])
    linear = [
        module.weight
        for name, module in whole.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    assert sizes.bf16 - sizes.int8 == sum(weight.numel() - 4 * len(weight) for weight in linear)
    # Four attention matrices a layer, and the dense MLP of layer 1.
    assert len(linear) == 3 * 4 + 3


def expected(family: str) -> dict[str, torch.Tensor]:
    """Return every tensor of a file by formulas of their own."""
    model = build(family, tied=family == "gemma", **(PLAIN | (BIAS if family == "llama" else {})))
    state, config = model.state_dict(), model.config
    interleave = family != "gemma"

    def heads(weight: torch.Tensor, count: int) -> torch.Tensor:
        rows, size = torch.empty_like(weight), len(weight) // count
        for head in range(count):
            for pair in range(size // 2):
                rows[head * size + 2 * pair] = weight[head * size + pair]
                rows[head * size + 2 * pair + 1] = weight[head * size + size // 2 + pair]
        return rows if interleave else weight

    offset = 1.0 if family == "gemma" else 0.0
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": offset + state["model.norm.weight"],
    }
    if family != "gemma":
        found["output.weight"] = state["lm_head.weight"]
    plain = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate": "ffn_gate_inp"}
    plain |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    turned = {"self_attn.q_proj": ("attn_q", config.num_attention_heads)}
    turned["self_attn.k_proj"] = ("attn_k", config.num_key_value_heads)
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for kind in ("weight", "bias"):
            for name, role in plain.items():
                if f"{ours}{name}.{kind}" in state:
                    found[f"{theirs}{role}.{kind}"] = state[f"{ours}{name}.{kind}"]
            for name, (role, count) in turned.items():
                if f"{ours}{name}.{kind}" in state:
                    found[f"{theirs}{role}.{kind}"] = heads(state[f"{ours}{name}.{kind}"], count)
        for name, role in norms.items():
            found[f"{theirs}{role}.weight"] = offset + state[f"{ours}{name}.weight"]
        if family == "mixtral":
            both = state[f"{ours}mlp.experts.gate_up_proj"]
            found[f"{theirs}ffn_gate_exps.weight"] = both[:, : config.intermediate_size]
            found[f"{theirs}ffn_up_exps.weight"] = both[:, config.intermediate_size :]
            found[f"{theirs}ffn_down_exps.weight"] = state[f"{ours}mlp.experts.down_proj"]
    return found


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral"])
def test_every_tensor_of_a_file_is_that_of_the_model(family: str, tmp_path: Path) -> None:
    whole = skeleton(family, tied=family == "gemma", **(BIAS if family == "llama" else {}))
    layout = layout_of(whole, [], name="tiny", kind=QUANTIZATIONS["F32"])
    write_gguf(layout, model_tensors(whole.model), tmp_path / "tiny.gguf", QUANTIZATIONS["F32"])
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    wanted = expected(family)
    assert set(stored) == set(wanted)
    for name, weight in wanted.items():
        np.testing.assert_array_equal(stored[name], weight.numpy(), err_msg=name)


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_what_is_read_back_is_what_was_written(family: str, kind: str, tmp_path: Path) -> None:
    fields = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96} | (BIAS if family == "llama" else {})
    whole, chosen = skeleton(family, tied=family == "gemma", **fields), QUANTIZATIONS[kind]
    layout = layout_of(whole, [], name="tiny", kind=chosen)
    write_gguf(layout, model_tensors(whole.model), tmp_path / "tiny.gguf", chosen)
    other = build(family, tied=family == "gemma", seed=1, **(PLAIN | fields))
    read_gguf(layout, tmp_path / "tiny.gguf", model_tensors(other))
    for name, weight in model_tensors(whole.model).items():
        # 127 steps on either side of zero, of the largest number in each block; a norm's 1 + weight is rounded once.
        step = weight.detach().abs().max() / 127 if kind == "Q8_0" else 1e-6
        np.testing.assert_allclose(model_tensors(other)[name].detach(), weight.detach(), atol=float(step), err_msg=name)


@pytest.mark.parametrize(("kind", "number", "fits"), [("F16", 7e4, False), ("Q8_0", 7e4, True), ("Q8_0", 9e6, False)])
def test_a_number_that_would_be_infinite_in_the_file_is_refused(
    kind: str, number: float, fits: bool, tmp_path: Path
) -> None:
    whole, chosen = skeleton(hidden_size=64, head_dim=16, intermediate_size=96), QUANTIZATIONS[kind]
    weights = model_tensors(whole.model)
    weights["model.layers.1.mlp.down_proj.weight"].data[3, 4] = number
    layout = layout_of(whole, [], name="x", kind=chosen)
    if fits:
        write_gguf(layout, weights, tmp_path / "x.gguf", chosen)
        return
    with pytest.raises(PatError, match=rf"up to .* in model.layers.1.mlp.down_proj.weight, too large for {kind}"):
        write_gguf(layout, weights, tmp_path / "x.gguf", chosen)


def test_a_special_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path / "t", added=({"content": "<pad>"},))
    tokenizer.pad_token = "<pad>"
    with pytest.raises(PatError, match="its pad_token '<pad>' is token"):
        vocabulary_of(tokenizer, 512)


def test_four_bits_are_counted_by_the_group_that_fits_most_and_what_is_left_is_said() -> None:
    fields: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 128, "head_dim": 32}
    square = 128 * 128 + 2 * 64 * 128 + 128 * 128  # query, key and value, output
    outside = 2 * 128 * 128 + 3 * 128  # embedding, head, norms

    def size(**more: Any) -> Int4Size:
        return int4_size(skeleton(**(fields | more)))

    even = size(intermediate_size=256)
    # A scale of 16 bits and a zero of 4 for each group of inputs and output.
    assert even == Int4Size((square + 3 * 128 * 256) * (4 + 20 / 128) / 8 + 2 * outside, 128, {}, 0.0)
    fine = size(intermediate_size=224)
    assert (fine.group_size, fine.odd_rows) == (32, {})
    assert fine.num_bytes == (square + 3 * 128 * 224) * (4 + 20 / 32) / 8 + 2 * outside
    total = square + 3 * 128 * 224 + outside
    assert fine.off_tiles == pytest.approx(
        224 * 128 / total
    )  # gate and up are 448 outputs at once, down has 224 inputs
    odd = size(intermediate_size=300)
    total = square + 3 * 128 * 300 + outside
    assert odd.group_size == 128 and odd.odd_rows == pytest.approx(
        {"128": 2 * 300 * 128 / total, "300": 300 * 128 / total}
    )
    assert odd.num_bytes == square * (4 + 20 / 128) / 8 + 2 * (outside + 3 * 128 * 300)


def test_experts_have_four_bits_and_routers_have_not() -> None:
    fields: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 128, "head_dim": 32, "intermediate_size": 64}
    whole = skeleton("mixtral", **fields)
    total = sum(math.prod(shape) for shape in whole.shapes().values())
    outside = 2 * 128 * 128 + 3 * 128 + 4 * 128
    found = int4_size(whole)
    assert found.num_bytes == (total - outside) * (4 + 20 / 64) / 8 + 2 * outside and found.group_size == 64
    assert found.off_tiles == 0
    narrow = int4_size(skeleton("mixtral", **(fields | {"hidden_size": 192})))
    assert narrow.off_tiles > 0.3  # Marlin takes no experts at such a hidden size
