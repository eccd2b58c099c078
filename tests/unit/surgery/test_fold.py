"""Every folded piece against the masked piece written out by hand, in float64, for random shapes, gains and families.

The masked side is the specification, term by term: einsum for each linear map, an explicit RMSNorm with its epsilon,
D as a matrix. A stream that is masked has no part outside the kept directions, so a reader is fed `h = Q_K h'`. That
real families fold as exactly is for `tests/contract` to show.

Shape suffixes: D hidden size, K pruned hidden size, O a reader's outputs, I a writer's inputs, N samples, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from pat.families import Branch, Family
from pat.method.operator import LowRankOperator
from pat.surgery import fold
from pat.surgery.adapted import AdaptedMatrix, merged
from pat.surgery.fold import Channels, HeadPlan, cut_writer_rows, fold_weights
from pat.surgery.residual import Linear, ResidualBranch, ResidualStream, map_residual_stream
from pat.surgery.rotation import equalised_gain

SAMPLES = 4

EXACT = 1e-12
"""Relative to the largest value: everything is float64 on both sides, in sums of at most 20 products."""

OLD_EPS = 1e-2


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """One model's weights, a mask, operators, and what `fold_weights` makes of them."""

    stream: ResidualStream
    old: dict[str, Tensor]
    new: dict[str, Tensor]
    operators: dict[str, Tensor]
    """D as a matrix by site."""
    q_DK: Tensor
    final_gain: Tensor
    """Gain of the final norm as the masked model uses it (equalised under a tied rotation)."""

    @property
    def widths(self) -> tuple[int, int]:
        return tuple(self.q_DK.shape)  # type: ignore[return-value]

    @property
    def new_eps(self) -> float:
        d, k = self.widths
        return OLD_EPS * d / k

    def operator(self, site: str) -> Tensor:
        return self.operators.get(site, torch.eye(self.widths[0], dtype=torch.float64))

    def gain(self, weights: dict[str, Tensor], norm: str) -> Tensor:
        return weights[f"{norm}.weight"] + self.stream.family.gain_offset


def family(options: dict[str, Any]) -> Family:
    pre, post = options["pre_norm"], options["post_norm"]
    attention = Branch(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        pre_norm="input_layernorm" if pre else None,
        post_norm="post_attention_layernorm" if post else None,
    )
    inner = "mlp.experts." if options["experts"] else "mlp."
    readers = (("mlp.gate",) if options["experts"] else ()) + (f"{inner}up_proj",)
    mlp = Branch(
        readers,
        f"{inner}down_proj",
        pre_norm="pre_mlp_layernorm" if pre else None,
        post_norm="post_mlp_layernorm" if post else None,
        site="mlp" if options["experts"] else "",
    )
    return Family(
        "example",
        attention,
        (mlp,),
        gain_offset=options["gain_offset"],
        scaled_embedding=options["scaled_embedding"],
        qk_norm=("self_attn.q_norm", "self_attn.k_norm") if options["qk_norm"] else (),
    )


def weights_of(record: Family, d: int, options: dict[str, Any], *, tied: bool) -> dict[str, Tensor]:
    """Random weights of a one-layer model: 6 attention outputs in heads of 3, an MLP of 5, 7 words, 2 experts."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (7, d), "model.norm": (d,)}
    if not tied:
        shapes["lm_head"] = (7, d)
    layer = "model.layers.0."
    shapes |= {layer + f"self_attn.{name}_proj": (6, d) for name in "qkv"}
    shapes[layer + "self_attn.o_proj"] = (d, 6)
    for norm in record.qk_norm:
        shapes[layer + norm] = (6,) if options["norm_over_all_heads"] else (3,)
    for branch in (record.attention, *record.feed_forward):
        shapes |= {layer + norm: (d,) for norm in (branch.pre_norm, branch.post_norm) if norm is not None}
    weights = {f"{name}.weight": random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    if options["bias"]:
        linear = [name for name in shapes if "proj" in name or name == "lm_head"]
        weights |= {f"{name}.bias": random(shapes[name][0], seed=50 + i) for i, name in enumerate(linear)}
    if options["experts"]:
        experts = layer + "mlp.experts."
        weights[layer + "mlp.gate.weight"] = random(2, d, seed=30)
        return weights | {
            f"{experts}up_proj": random(2, 5, d, seed=31),
            f"{experts}down_proj": random(2, d, 5, seed=32),
        }
    return weights | {
        f"{layer}mlp.up_proj.weight": random(5, d, seed=33),
        f"{layer}mlp.down_proj.weight": random(d, 5, seed=34),
    }


@st.composite
def cases(draw: Any) -> Case:
    d = draw(st.integers(3, 20))
    k = draw(st.integers(1, d - 1))
    flags = ("pre_norm", "post_norm", "experts", "scaled_embedding", "qk_norm", "norm_over_all_heads", "bias")
    options: dict[str, Any] = {flag: draw(st.booleans()) for flag in flags}
    options["gain_offset"] = draw(st.sampled_from([0.0, 1.0]))
    tied = draw(st.booleans())
    rotated = draw(st.booleans()) and not options["post_norm"]
    record = family(options)
    old = weights_of(record, d, options, tied=tied)
    stream = map_residual_stream(record, old, tied=tied)

    keep = torch.zeros(d, dtype=torch.bool)
    keep[torch.randperm(d, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))[:k]] = True
    gain = old["model.norm.weight"] + record.gain_offset
    basis = None
    if rotated:
        block = torch.ones(d, dtype=torch.bool)
        if tied:  # outliers stay in place, and are kept
            block[keep.nonzero().flatten()[::4]] = False
            gain = equalised_gain(gain, block) if block.any() else gain
        where = block.nonzero().flatten()
        basis = torch.eye(d, dtype=torch.float64)
        basis[where.unsqueeze(1), where] = torch.linalg.qr(random(len(where), len(where), seed=40)).Q
    operators, matrices = {}, {}
    for index, site in enumerate(stream.sites):
        if draw(st.booleans()):
            rank = draw(st.integers(1, d))
            operator = LowRankOperator(d, rank).double().requires_grad_(False)
            for name, parameter in operator.named_parameters():
                parameter.copy_(random(*parameter.shape, seed=70 + index) / (1 if name == "scale" else d**0.5))
            operators[site] = operator
            product = torch.einsum("ir,r,rj->ij", operator.up, operator.scale, operator.down)
            matrices[site] = torch.eye(d, dtype=torch.float64) + product
    plan = HeadPlan(
        tied=tied,
        final_gain=gain if rotated and tied else None,
        embedding_ratio=math.sqrt(d / k) if record.scaled_embedding else 1.0,
    )
    new = dict(fold_weights(stream, old.__getitem__, Channels.from_mask(keep, basis), operators, plan))
    q_DK = (torch.eye(d, dtype=torch.float64) if basis is None else basis)[:, keep]
    return Case(stream, old, new, matrices, q_DK, gain)


def normed(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return x if gain is None else gain * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def linear(weights: dict[str, Tensor], module: Linear, x: Tensor) -> Tensor:
    """Apply a linear map, `(N, I) -> (N, O)`; stacked experts give `(N, E, O)`."""
    weight = weights[module.weight]
    if weight.ndim == 3:
        return torch.einsum("eoi,ni->neo", weight, x)
    y = torch.einsum("oi,ni->no", weight, x)
    return y if module.bias is None else y + weights[module.bias]


# -- the pieces: each returns what the masked model makes of some input, and what the dense model does -----------------


def embedding(case: Case) -> tuple[Tensor, Tensor]:
    name = f"{case.stream.embedding}.weight"
    d, k = case.widths
    old_scale, new_scale = (math.sqrt(d), math.sqrt(k)) if case.stream.family.scaled_embedding else (1.0, 1.0)
    operator = case.operator(case.stream.embedding)
    masked = torch.einsum("dk,de,ne->nk", case.q_DK, operator, old_scale * case.old[name])
    return masked, new_scale * case.new[name]


def writer(case: Case, branch: ResidualBranch) -> tuple[Tensor, Tensor]:
    x = random(SAMPLES, case.old[branch.writer.weight].shape[-1], seed=11)
    written = linear(case.old, branch.writer, x)
    masked = torch.einsum("dk,de,n...e->n...k", case.q_DK, case.operator(branch.site), written)
    return masked, linear(case.new, branch.writer, x)


def reader(case: Case, branch: ResidualBranch, module: Linear) -> tuple[Tensor, Tensor]:
    """Norm, reader and, for a query or key, the norm over its heads."""
    stream_NK = 0.1 * random(SAMPLES, case.widths[1], seed=12)
    stream_ND = torch.einsum("dk,nk->nd", case.q_DK, stream_NK)
    pre = branch.pre_norm
    old_gain, new_gain = (None, None) if pre is None else (case.gain(case.old, pre), case.gain(case.new, pre))
    masked = linear(case.old, module, normed(stream_ND, old_gain, OLD_EPS))
    dense = linear(case.new, module, normed(stream_NK, new_gain, case.new_eps))
    for projection, norm in zip(case.stream.family.qk_projections, case.stream.family.qk_norm, strict=False):
        if module.path.endswith(projection):
            name = module.path.removesuffix(projection) + norm
            gain = case.gain(case.old, name)
            assert torch.equal(case.gain(case.new, name), gain)
            shape = (SAMPLES, -1, len(gain))  # per head, or over all heads at once
            masked = normed(masked.reshape(shape), gain, OLD_EPS)
            dense = normed(dense.reshape(shape), gain, case.new_eps)
    return masked, dense


def post_norm(case: Case, norm: str) -> tuple[Tensor, Tensor]:
    written_NK = 0.1 * random(SAMPLES, case.widths[1], seed=13)
    written_ND = torch.einsum("dk,nk->nd", case.q_DK, written_NK)
    masked = normed(written_ND, case.gain(case.old, norm), OLD_EPS) @ case.q_DK
    return masked, normed(written_NK, case.gain(case.new, norm), case.new_eps)


def logits(case: Case) -> tuple[Tensor, Tensor]:
    stream = case.stream
    state_NK = 0.1 * random(SAMPLES, case.widths[1], seed=14)
    state_ND = torch.einsum("dk,nk->nd", case.q_DK, state_NK)
    masked = normed(state_ND, case.final_gain, OLD_EPS)
    dense = normed(state_NK, case.gain(case.new, stream.final_norm), case.new_eps)
    if stream.head is not None:
        return linear(case.old, stream.head, masked), linear(case.new, stream.head, dense)
    name = f"{stream.embedding}.weight"
    # E D0ᵀ n: the transpose of the operator at the input.
    masked = torch.einsum("vd,ed,ne->nv", case.old[name], case.operator(stream.embedding), masked)
    return masked, torch.einsum("vk,nk->nv", case.new[name], dense)


@settings(max_examples=60)
@given(case=cases())
def test_every_piece_is_exact(case: Case) -> None:
    pieces = {"embedding": embedding(case), "logits": logits(case)}
    for branch in case.stream.branches:
        pieces[branch.writer.path] = writer(case, branch)
        for module in branch.readers:
            pieces[module.path] = reader(case, branch, module)
        if branch.post_norm is not None:
            pieces[branch.post_norm] = post_norm(case, branch.post_norm)
    for name, (masked, dense) in pieces.items():
        error = (masked - dense).abs().max() / masked.abs().max().clamp_min(1)
        assert error <= EXACT, name
    assert case.new.keys() == case.old.keys()
    assert {tensor.dtype for tensor in case.new.values()} == {torch.float64}


@settings(max_examples=20)
@given(case=cases())
def test_folded_norms_have_a_gain_of_exactly_one(case: Case) -> None:
    """sqrt(d/d') as a gain in bfloat16 would be off by 0.13 %, and 1 + w with it."""
    selected = ((case.q_DK == 0) | (case.q_DK == 1)).all()
    for branch in case.stream.branches:
        if branch.pre_norm is not None and not selected:
            assert (case.gain(case.new, branch.pre_norm) == 1).all()
    if case.stream.head is not None and not selected:
        assert (case.gain(case.new, case.stream.final_norm) == 1).all()


# -- a few rows at a time, LoRA beside the weight, other precisions: the same weights ---------------------------------

HIDDEN, KEPT = 12, 9
OPTIONS = dict.fromkeys(("pre_norm", "bias"), True) | dict.fromkeys(
    ("post_norm", "scaled_embedding", "qk_norm", "norm_over_all_heads"), False
)


def folded(weights: dict[str, Tensor | AdaptedMatrix], *, rotated: bool, **options: Any) -> dict[str, Tensor]:
    experts = any("experts" in name for name in weights)
    record = family(OPTIONS | {"experts": experts, "gain_offset": 0.0})
    stream = map_residual_stream(record, weights, tied=False)
    precision = options.get("precision", torch.float64)
    operators = {}
    for index, site in enumerate(stream.sites):
        operator = LowRankOperator(HIDDEN, 3).requires_grad_(False)
        for parameter in operator.parameters():
            parameter.copy_(random(*parameter.shape, seed=index) / 4)
        operators[site] = operator.to(precision)
    keep = torch.arange(HIDDEN) % 4 != 1
    basis = torch.linalg.qr(random(HIDDEN, HIDDEN, seed=8)).Q if rotated else None
    plan = HeadPlan(tied=False, embedding_ratio=1.1)
    return dict(fold_weights(stream, weights.__getitem__, Channels.from_mask(keep, basis), operators, plan, **options))


def stored(*, experts: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    options = OPTIONS | {"experts": experts, "gain_offset": 0.0}
    weights = weights_of(family(options), HIDDEN, options, tied=False)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


@pytest.mark.parametrize(("experts", "rotated"), [(False, True), (True, True), (True, False)])
def test_a_few_rows_at_a_time_is_the_same(experts: bool, rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = stored(experts=experts)
    whole = folded(weights, rotated=rotated)
    monkeypatch.setattr(fold, "CHUNK_ELEMENTS", 2 * HIDDEN)
    pieces = folded(weights, rotated=rotated)
    assert whole.keys() == pieces.keys()
    for name, weight in whole.items():
        assert pieces[name].is_contiguous()
        torch.testing.assert_close(pieces[name], weight, rtol=1e-14, atol=1e-14)


class Recording(LowRankOperator):
    """Notes how many vectors of the stream it is given at a time."""

    seen: list[int]

    def cut_outputs(self, cut: Any) -> Any:
        twin = super().cut_outputs(cut)
        twin.seen = self.seen
        return twin

    def add_change(self, total: Tensor, y: Tensor) -> Tensor:
        self.seen.append(len(y))
        return super().add_change(total, y)


@pytest.mark.parametrize(("chunk", "expected"), [(3 * HIDDEN + 1, [3, 3, 1]), (HIDDEN - 1, [1] * 7), (10**9, [7])])
def test_no_more_is_folded_at_once_than_fits(chunk: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert fold.CHUNK_ELEMENTS * torch.float64.itemsize == 8 * 1024**2  # 8 MB, as it says
    monkeypatch.setattr(fold, "CHUNK_ELEMENTS", chunk)
    record = family(OPTIONS | {"experts": False, "gain_offset": 0.0})
    weights = stored(experts=False)
    stream = map_residual_stream(record, weights, tied=False)
    operator = Recording(HIDDEN, 2).double().requires_grad_(False)
    operator.seen = []
    channels = Channels.from_mask(torch.arange(HIDDEN) % 4 != 1, None)
    operators = {stream.embedding: operator}
    dict(fold_weights(stream, weights.__getitem__, channels, operators, HeadPlan(tied=False)))
    assert operator.seen == expected  # of an embedding of 7 words


@pytest.mark.parametrize("rotated", [False, True])
def test_lora_is_added_to_the_rows_that_are_folded(rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "CHUNK_ELEMENTS", 2 * HIDDEN)

    def adapted(weight: Tensor) -> AdaptedMatrix:
        return AdaptedMatrix(weight, random(len(weight), 3, seed=1), random(3, weight.shape[1], seed=2), scaling=0.3)

    plain = stored(experts=False)
    apart = {name: adapted(weight) if weight.dim() == 2 else weight for name, weight in plain.items()}
    together = {name: merged(weight).double() for name, weight in apart.items()}
    one, other = folded(apart, rotated=rotated), folded(together, rotated=rotated)
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rotated", [False, True])
def test_results_are_rounded_once_and_folding_in_float32_is_off_by_its_rounding(rotated: bool) -> None:
    weights = stored(experts=False)
    exact = folded(weights, rotated=rotated)
    for name, weight in folded(weights, rotated=rotated, dtype=torch.bfloat16).items():
        assert torch.equal(weight, exact[name].bfloat16()), name
    single = folded(weights, rotated=rotated, precision=torch.float32)
    assert {weight.dtype for weight in single.values()} == {torch.float32}
    errors = [(single[name].double() - weight).abs().max().item() for name, weight in exact.items()]
    assert 1e-9 < max(errors) < 1e-5


def test_weights_of_16_bits_that_are_only_selected_are_not_rounded() -> None:
    weights = stored(experts=True, dtype=torch.bfloat16)
    new = folded(weights, rotated=False, dtype=torch.bfloat16)
    keep = torch.arange(HIDDEN) % 4 != 1
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.up_proj"):
        assert torch.equal(new[name], weights[name][..., keep])


def test_vectors_in_the_stream_are_cut_as_a_writer_s_rows_are() -> None:
    rows, keep = random(3, HIDDEN, seed=1), torch.arange(HIDDEN) % 4 != 1
    channels = Channels.from_mask(keep, torch.linalg.qr(random(HIDDEN, HIDDEN, seed=8)).Q)
    operator = LowRankOperator(HIDDEN, 3).double().requires_grad_(False)
    operator.scale.copy_(random(3, seed=2))
    d = torch.eye(HIDDEN) + operator.up @ torch.diag(operator.scale) @ operator.down
    torch.testing.assert_close(cut_writer_rows(rows, operator, channels), rows @ d.mT @ channels.basis)
    torch.testing.assert_close(cut_writer_rows(rows, None, channels), rows @ channels.basis)


# -- Channels --------------------------------------------------------------------------------------------------------


def test_channels_of_a_selection_and_of_a_rotation() -> None:
    keep = torch.tensor([True, False, True, True])
    selection = Channels.from_mask(keep, None)
    assert selection.pruned_hidden_size == 3 and selection.keep.tolist() == [0, 2, 3]
    assert selection.gain == math.sqrt(4 / 3)
    rows = random(2, 4, seed=1)
    assert torch.equal(selection.cut(rows), rows[:, [0, 2, 3]])
    assert torch.equal(selection.select(rows.mT.contiguous().mT), rows[:, [0, 2, 3]])

    q = torch.linalg.qr(random(4, 4, seed=2)).Q
    rotation = Channels.from_mask(keep, q.float())
    assert rotation.basis is not None and rotation.basis.dtype == torch.float64
    assert rotation.to(torch.float32).basis.dtype == torch.float32
    torch.testing.assert_close(rotation.cut(rows), rows @ q.float().double()[:, keep], atol=1e-14, rtol=0)
