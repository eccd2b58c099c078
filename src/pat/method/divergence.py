"""The divergence of a student's next-token distributions from a teacher's, over the whole vocabulary or its head.

Shapes: N positions, V tokens of the vocabulary, K of them that are kept by name. All sums are taken in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

SMALLEST_LOG = -1e4
"""Stands for the logarithm of no mass at all: its exponential is 0, and 0 times it is not NaN."""


def divergence(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) in nats, summed over positions; both are given as logits of shape `(N, V)`."""
    student, teacher = log_softmax(student_NV.float(), dim=-1), log_softmax(teacher_NV.float(), dim=-1)
    return kl_div(student, teacher, reduction="sum", log_target=True)


def largest(teacher_NV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the `num` likeliest tokens of each position, and what is known of their probabilities.

    Args:
        teacher_NV: logits of shape `(N, V)`.
        num: K, at most V.

    Returns:
        Token ids of shape `(N, K)`, int32, and log-probabilities of shape `(N, K + 1)`, float32: of these tokens, and
        of all others together.
    """
    log_probs = log_softmax(teacher_NV.float(), dim=-1)
    head_NK, tokens_NK = log_probs.topk(num, dim=-1)
    others_N1 = _others(log_probs, tokens_NK)
    return tokens_NK.int(), torch.cat([head_NK, others_N1], dim=-1)


def bucketed_divergence(student_NV: Tensor, tokens_NK: Tensor, teacher_NK1: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) with all but K tokens counted as one, summed over positions.

    Joining outcomes never adds to a divergence (log-sum inequality): this is a lower bound of `divergence`, 0 where the
    joined distributions are equal, and equal to it for K = V.

    Args:
        student_NV: logits.
        tokens_NK: the tokens that are kept apart, as `largest` returns them.
        teacher_NK1: the teacher's log-probabilities of them, and of all others together.
    """
    log_probs, tokens_NK = log_softmax(student_NV.float(), dim=-1), tokens_NK.long()
    student_NK1 = torch.cat([log_probs.gather(-1, tokens_NK), _others(log_probs, tokens_NK)], dim=-1)
    return kl_div(student_NK1, teacher_NK1, reduction="sum", log_target=True)


def _others(log_probs_NV: Tensor, tokens_NK: Tensor) -> Tensor:
    """Return the logarithm of the mass of all tokens but the given ones, of shape `(N, 1)`."""
    if tokens_NK.shape[-1] == log_probs_NV.shape[-1]:
        return log_probs_NV.new_full((len(log_probs_NV), 1), SMALLEST_LOG)
    others = log_probs_NV.scatter(-1, tokens_NK, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return others.clamp(min=SMALLEST_LOG)
