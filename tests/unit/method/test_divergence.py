"""The divergence from a teacher: the formula, and what is left of it when most tokens count as one."""

import pytest
import torch
from torch import Tensor

from pat.method.divergence import bucketed_divergence, divergence, largest

N, V = 7, 23

ROUNDING = 1e-5
"""Relative; sums of a few dozen float32 numbers of one size."""


def logits(seed: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


def expected(student: Tensor, teacher: Tensor) -> float:
    """Sum p ln(p / q), in float64."""
    p, q = (x.double().exp() / x.double().exp().sum(-1, keepdim=True) for x in (teacher, student))
    return float((p * (p / q).log()).sum())


def test_it_is_the_formula() -> None:
    assert float(divergence(logits(0), logits(1))) == pytest.approx(expected(logits(0), logits(1)), rel=ROUNDING)
    assert float(divergence(logits(0), logits(0) + 5)) == pytest.approx(0, abs=ROUNDING)


def test_half_precision_is_widened_before_the_sums() -> None:
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    assert float(divergence(student, teacher)) == float(divergence(student.float(), teacher.float()))


@pytest.mark.parametrize("num", [1, 4, V - 1])
def test_joined_tokens_bound_it_from_below(num: int) -> None:
    student, teacher = logits(0), logits(1)
    bound, whole = float(bucketed_divergence(student, *largest(teacher, num))), float(divergence(student, teacher))
    assert 0 < bound < whole * (1 + ROUNDING)
    assert bound > float(bucketed_divergence(student, *largest(teacher, max(1, num - 1)))) * (1 - ROUNDING)


def test_joined_tokens_by_hand() -> None:
    tokens, log_probs = largest(logits(1), 3)
    p, q = (x.double().softmax(-1) for x in (logits(1), logits(0)))
    assert torch.equal(tokens.long(), p.argsort(descending=True)[:, :3])
    kept = [x.gather(-1, tokens.long()) for x in (p, q)]
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in kept)
    assert torch.allclose(log_probs.double().exp(), p, atol=ROUNDING)
    by_hand = float((p * (p / q).log()).sum())
    assert float(bucketed_divergence(logits(0), tokens, log_probs)) == pytest.approx(by_hand, rel=ROUNDING)


def test_all_tokens_are_the_whole_vocabulary_with_the_same_gradient() -> None:
    one, other = (logits(0).requires_grad_() for _ in range(2))
    whole = divergence(one, logits(1))
    joined = bucketed_divergence(other, *largest(logits(1), V))
    whole.backward()
    joined.backward()
    assert float(joined) == pytest.approx(float(whole), rel=ROUNDING)
    assert one.grad is not None and other.grad is not None
    assert torch.allclose(one.grad, other.grad, atol=ROUNDING)


def test_a_teacher_that_is_sure_makes_no_nan() -> None:
    """Nothing is left for the other tokens, so that its logarithm is that of 0."""
    teacher = torch.full((N, V), -500.0)
    teacher[:, 2] = 500.0
    student = logits(0).requires_grad_()
    joined = bucketed_divergence(student, *largest(teacher, 1))
    joined.backward()
    assert float(joined) == pytest.approx(expected(logits(0), teacher / 10), rel=ROUNDING)
    assert student.grad is not None and bool(student.grad.isfinite().all())
