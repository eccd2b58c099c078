"""Every folded piece against the masked piece written out by hand, in float64.

The masked side is the specification, term by term: einsum for each linear map, an explicit RMSNorm with its epsilon,
D as a matrix. A stream that is masked has no part outside the kept directions, so a reader is fed `h = Q_K h'`.

Shape suffixes: D hidden size, K pruned hidden size, O a reader's outputs, I a writer's inputs, N samples, E experts.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from tiny_models import KINDS, RMS_NORM_EPS, build
from torch import Tensor

from pat.families import get_family
from pat.method.operator import LowRankOperator
from pat.surgery.fold import Channels, HeadPlan, fold_weights
from pat.surgery.residual import Linear, ResidualBranch, ResidualStream, map_residual_stream, stored_tensors
from pat.surgery.rotation import equalised_gain

HIDDEN, KEPT, SAMPLES = 48, 36, 5

EXACT = 1e-11
"""Everything is float64 on both sides; sums of at most 80 products of size one."""

VISIBLE = 1e-4
"""What a wrong fold must at least amount to: the tolerance of the models in float32 would then catch it too."""

FOLDED_ALIKE = [(family, tied, rotated) for family in KINDS for tied in (True, False) for rotated in (False, True)]
CASES = [
    pytest.param(family, tied, rotated, id=f"{family}-{'tied' if tied else 'untied'}-{'pca' if rotated else 'none'}")
    for family, tied, rotated in FOLDED_ALIKE
    if not (rotated and get_family(family).has_post_norms)
]


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
    head_dim: int

    def gain(self, weights: dict[str, Tensor], norm: str) -> Tensor:
        return weights[f"{norm}.weight"] + self.stream.family.gain_offset

    def normed(self, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        return x if gain is None else gain * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


OLD_EPS = RMS_NORM_EPS
NEW_EPS = RMS_NORM_EPS * HIDDEN / KEPT


@functools.lru_cache(maxsize=2)
def make_case(family: str, tied: bool, rotated: bool) -> Case:
    model = build(family, tied=tied)
    record = get_family(family)
    old = {name: tensor.detach().double() for name, tensor in stored_tensors(model).items()}
    stream = map_residual_stream(record, old, tied=tied)

    keep = torch.zeros(HIDDEN, dtype=torch.bool)
    keep[torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(3))[:KEPT]] = True
    gain = old[f"{stream.final_norm}.weight"] + record.gain_offset
    basis = None
    if rotated:
        block = torch.ones(HIDDEN, dtype=torch.bool)
        if tied:  # outliers stay in place, and are kept
            outliers = keep.nonzero().flatten()[::4]
            block[outliers] = False
            gain = equalised_gain(gain, block)
        where = block.nonzero().flatten()
        basis = torch.eye(HIDDEN, dtype=torch.float64)
        basis[where.unsqueeze(1), where] = torch.linalg.qr(random(len(where), len(where), seed=4)).Q
    channels = Channels.from_mask(keep, basis)

    operators, matrices = {}, {}
    for index, site in enumerate(stream.sites):
        operator = LowRankOperator(HIDDEN, 6).double().requires_grad_(False)
        operator.scale.copy_(0.5 * random(6, seed=index))
        operators[site] = operator
        matrices[site] = torch.eye(HIDDEN, dtype=torch.float64) + torch.einsum(
            "ir,r,rj->ij", operator.up, operator.scale, operator.down
        )
    plan = HeadPlan(
        tied=tied,
        final_gain=gain if rotated and tied else None,
        embedding_ratio=math.sqrt(HIDDEN / KEPT) if record.scaled_embedding else 1.0,
    )
    new = dict(fold_weights(stream, old.__getitem__, channels, operators, plan))
    q_DK = torch.eye(HIDDEN, dtype=torch.float64)[:, keep] if basis is None else basis[:, keep]
    return Case(stream, old, new, matrices, q_DK, gain, model.model.layers[0].self_attn.head_dim)


def linear(weights: dict[str, Tensor], module: Linear, x: Tensor) -> Tensor:
    """Apply a linear map, `(N, I) -> (N, O)`; stacked experts give `(N, E, O)`."""
    weight = weights[module.weight]
    if weight.ndim == 3:
        return torch.einsum("eoi,ni->neo", weight, x)
    y = torch.einsum("oi,ni->no", weight, x)
    return y if module.bias is None else y + weights[module.bias]


# -- the pieces: each returns the largest difference between the masked model's and the dense model's ----------------


def embedding_error(case: Case, *, ratio: float | None = None) -> float:
    site, family = case.stream.embedding, case.stream.family
    old_scale, new_scale = (math.sqrt(d) if family.scaled_embedding else 1.0 for d in (HIDDEN, KEPT))
    masked = torch.einsum(
        "dk,de,ne->nk", case.q_DK, case.operators[site], old_scale * case.old[f"{site}.weight"][:SAMPLES]
    )
    dense = new_scale * case.new[f"{site}.weight"][:SAMPLES] / (ratio or 1.0)
    return float((masked - dense).abs().max())


def writer_error(case: Case, branch: ResidualBranch) -> float:
    x = random(SAMPLES, case.old[branch.writer.weight].shape[-1], seed=11)
    masked = torch.einsum(
        "dk,de,n...e->n...k", case.q_DK, case.operators[branch.site], linear(case.old, branch.writer, x)
    )
    return float((masked - linear(case.new, branch.writer, x)).abs().max())


def reader_error(
    case: Case, branch: ResidualBranch, reader: Linear, *, new_eps: float = NEW_EPS, qk_factor: float = 1.0
) -> float:
    """Norm, reader and, for a query or key, the norm over its heads; `qk_factor` undoes the fold's."""
    stream_NK = 0.1 * random(SAMPLES, KEPT, seed=12)
    stream_ND = torch.einsum("dk,nk->nd", case.q_DK, stream_NK)
    pre = branch.pre_norm
    masked = linear(
        case.old, reader, case.normed(stream_ND, None if pre is None else case.gain(case.old, pre), OLD_EPS)
    )
    dense = linear(case.new, reader, case.normed(stream_NK, None if pre is None else case.gain(case.new, pre), new_eps))
    norm = qk_norm_of(case, reader)
    if norm is not None:
        old_gain, new_gain = case.gain(case.old, norm), case.gain(case.new, norm)
        assert torch.equal(old_gain, new_gain)
        shape = (SAMPLES, -1, len(old_gain))  # per head, or (OLMo 2) over all heads at once
        masked = case.normed(masked.reshape(shape), old_gain, OLD_EPS)
        dense = case.normed((dense / qk_factor).reshape(shape), new_gain, new_eps)
    return float((masked - dense).abs().max())


def qk_norm_of(case: Case, reader: Linear) -> str | None:
    family = case.stream.family
    if not family.qk_norm:
        return None
    for projection, norm in zip(family.qk_projections, family.qk_norm, strict=True):
        if reader.path.endswith(projection):
            return reader.path.removesuffix(projection) + norm
    return None


def post_norm_error(case: Case, norm: str, *, new_eps: float = NEW_EPS) -> float:
    written_NK = 0.1 * random(SAMPLES, KEPT, seed=13)
    written_ND = torch.einsum("dk,nk->nd", case.q_DK, written_NK)
    masked = case.normed(written_ND, case.gain(case.old, norm), OLD_EPS)
    dense = case.normed(written_NK, case.gain(case.new, norm), new_eps)
    return float((masked @ case.q_DK - dense).abs().max())


def logits_error(case: Case, *, new_eps: float = NEW_EPS, unscaled_gain: bool = False) -> float:
    stream = case.stream
    state_NK = 0.1 * random(SAMPLES, KEPT, seed=14)
    state_ND = torch.einsum("dk,nk->nd", case.q_DK, state_NK)
    masked = case.normed(state_ND, case.final_gain, OLD_EPS)
    new_gain = case.gain(case.new, stream.final_norm)
    if unscaled_gain:
        new_gain = new_gain * math.sqrt(HIDDEN / KEPT)
    dense = case.normed(state_NK, new_gain, new_eps)
    if stream.head is None:
        embedding = f"{stream.embedding}.weight"
        # E D0ᵀ n: the transpose of the operator at the input.
        masked = torch.einsum("vd,ed,ne->nv", case.old[embedding], case.operators[stream.embedding], masked)
        dense = torch.einsum("vk,nk->nv", case.new[embedding], dense)
    else:
        masked, dense = linear(case.old, stream.head, masked), linear(case.new, stream.head, dense)
    return float((masked - dense).abs().max())


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tied", "rotated"), CASES)
def test_every_piece_is_exact(family: str, tied: bool, rotated: bool) -> None:
    case = make_case(family, tied, rotated)
    errors = {"embedding": embedding_error(case), "logits": logits_error(case)}
    for branch in case.stream.branches:
        errors[branch.writer.path] = writer_error(case, branch)
        for reader in branch.readers:
            errors[reader.path] = reader_error(case, branch, reader)
        if branch.post_norm is not None:
            errors[branch.post_norm] = post_norm_error(case, branch.post_norm)
    wrong = {name: error for name, error in errors.items() if not error <= EXACT}
    assert not wrong


@pytest.mark.parametrize(("family", "tied", "rotated"), CASES)
def test_every_parameter_gets_the_shape_of_a_model_of_that_size(family: str, tied: bool, rotated: bool) -> None:
    case = make_case(family, tied, rotated)
    small = build(family, tied=tied, hidden_size=KEPT, head_dim=case.head_dim)
    assert {name: tensor.shape for name, tensor in case.new.items()} == {
        name: tensor.shape for name, tensor in stored_tensors(small).items()
    }
    assert {tensor.dtype for tensor in case.new.values()} == {torch.float64}


@pytest.mark.parametrize("family", [family for family in KINDS if not get_family(family).has_post_norms])
def test_folded_norms_have_a_gain_of_exactly_one(family: str) -> None:
    """sqrt(d/d') as a gain in bfloat16 would be off by 0.13 %, and 1 + w with it."""
    case = make_case(family, False, True)
    for branch in case.stream.branches:
        if branch.pre_norm:
            assert (case.gain(case.new, branch.pre_norm) == 1).all()
    assert (case.gain(case.new, case.stream.final_norm) == 1).all()


def test_a_site_without_an_operator_has_the_identity() -> None:
    case = make_case("llama", False, False)
    stream = case.stream
    keep = case.q_DK.sum(1) > 0
    new = dict(fold_weights(stream, case.old.__getitem__, Channels.from_mask(keep, None), {}, HeadPlan(tied=False)))
    writer = stream.branches[0].writer
    assert torch.equal(new[writer.weight], case.old[writer.weight][keep])
    assert torch.equal(new[f"{stream.embedding}.weight"], case.old[f"{stream.embedding}.weight"][:, keep])


# -- a wrong fold would be seen --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_an_epsilon_left_as_it_was_is_seen(family: str) -> None:
    case = make_case(family, False, False)
    branch = case.stream.branches[0]
    assert logits_error(case, new_eps=OLD_EPS) > VISIBLE
    if branch.pre_norm is not None:
        assert reader_error(case, branch, branch.readers[0], new_eps=OLD_EPS) > VISIBLE
    if branch.post_norm is not None:
        assert post_norm_error(case, branch.post_norm, new_eps=OLD_EPS) > VISIBLE


@pytest.mark.parametrize(
    ("family", "rotated"),
    [("qwen3", False), ("qwen3", True), ("gemma3_text", False), ("olmo2", False), ("qwen3_moe", False)],
)
def test_a_missing_qk_norm_factor_is_seen(family: str, rotated: bool) -> None:
    case = make_case(family, False, rotated)
    branch = case.stream.branches[0]
    for reader in branch.readers[:2]:
        assert qk_norm_of(case, reader) is not None
        assert reader_error(case, branch, reader, qk_factor=math.sqrt(HIDDEN / KEPT)) > VISIBLE


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_a_missing_embedding_ratio_is_seen_at_both_ends(family: str, tied: bool) -> None:
    case = make_case(family, tied, False)
    assert embedding_error(case, ratio=math.sqrt(HIDDEN / KEPT)) > VISIBLE
    if tied:  # the factor reaches the logits and has to be taken back in the final norm
        assert logits_error(case, unscaled_gain=True) > VISIBLE


# -- Channels --------------------------------------------------------------------------------------------------------


def test_channels_of_a_selection_and_of_a_rotation() -> None:
    keep = torch.tensor([True, False, True, True])
    selection = Channels.from_mask(keep, None)
    assert selection.pruned_hidden_size == 3 and selection.keep.tolist() == [0, 2, 3]
    assert selection.gain == math.sqrt(4 / 3) and selection.epsilon_ratio == 4 / 3
    rows = random(2, 4, seed=1)
    assert torch.equal(selection.cut(rows), rows[:, [0, 2, 3]])

    q = torch.linalg.qr(random(4, 4, seed=2)).Q
    rotation = Channels.from_mask(keep, q.float())
    assert rotation.basis is not None and rotation.basis.dtype == torch.float64
    torch.testing.assert_close(rotation.cut(rows), rows @ q.float().double()[:, keep], atol=1e-14, rtol=0)
