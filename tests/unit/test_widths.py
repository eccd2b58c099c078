"""Legal widths: the specification's examples, the rule itself by brute force, and errors that name the way out."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from pat.errors import PatError
from pat.widths import ALIGNMENT_SLACK, ALIGNMENTS, Width, choose_width


@pytest.mark.parametrize(
    ("hidden_size", "heads", "ratio", "expected"),
    [
        (96, 6, 0.25, 72),
        (576, 9, 0.25, 432),  # SmolLM2-135M
        (4096, 32, 0.30, 2816),  # Llama-2 7B; the paper's 2868 cannot be loaded
        (48, 4, 0.25, 36),
        (48, 6, 0.25, 36),
        (64, 8, 0.25, 48),  # stories260K
        (640, 4, 0.25, 480),  # Gemma 3 270M
        (48, 4, 0.999, 4),  # nothing within reach: the nearest
        (48, 4, 0.001, 44),
    ],
)
def test_a_ratio_becomes_the_specifications_width(hidden_size: int, heads: int, ratio: float, expected: int) -> None:
    width = choose_width(hidden_size, heads, pruning_ratio=ratio)
    assert width.pruned_hidden_size == expected
    assert width.pruning_ratio == pytest.approx(1 - expected / hidden_size)
    assert str(expected) in width.reason or "multiples of" in width.reason


@given(
    hidden_size=st.integers(2, 5000),
    heads=st.integers(1, 80),
    ratio=st.floats(0, 1, exclude_min=True, exclude_max=True),
    multiple_of=st.none() | st.sampled_from([1, 8, 48, 64]),
)
def test_among_the_legal_widths_within_3_percent_the_best_aligned_then_the_nearest_is_taken(
    hidden_size: int, heads: int, ratio: float, multiple_of: int | None
) -> None:
    """By brute force, over every width there is."""
    legal = [w for w in range(1, hidden_size) if w % heads == 0 and w % (multiple_of or 1) == 0]
    if not legal:
        with pytest.raises(PatError, match="lower multiple_of"):
            choose_width(hidden_size, heads, pruning_ratio=ratio, multiple_of=multiple_of)
        return
    width = choose_width(hidden_size, heads, pruning_ratio=ratio, multiple_of=multiple_of).pruned_hidden_size
    asked = hidden_size * (1 - ratio)
    assert width in legal
    assert choose_width(hidden_size, heads, pruned_hidden_size=width).pruned_hidden_size == width

    def rank(w: int) -> tuple[int, float, int]:
        alignment = max((a for a in ALIGNMENTS if w % a == 0), default=1)
        return alignment, -abs(w - asked), -w

    near = [w for w in legal if abs(w - asked) <= ALIGNMENT_SLACK * asked]
    if near:
        assert width == max(near, key=rank)
    else:
        assert width == min(legal, key=lambda w: (abs(w - asked), w))


def test_the_constants_are_the_specifications() -> None:
    assert ALIGNMENTS == (256, 128, 64, 32, 16, 8)
    assert ALIGNMENT_SLACK == 0.03


@pytest.mark.parametrize("pruned", [4, 8, 36, 44])
def test_an_explicit_legal_width_is_taken_as_it_is(pruned: int) -> None:
    assert choose_width(48, 4, pruned_hidden_size=pruned) == Width(48, pruned, "asked for explicitly")


@pytest.mark.parametrize(
    ("pruned", "constraint", "nearest"),
    [
        (37, "multiple of num_attention_heads=4", "36 and 40"),
        (35, "multiple of num_attention_heads=4", "32 and 36"),
        (2, "multiple of num_attention_heads=4", "legal: 4"),
        (0, "positive", "legal: 4"),
        (48, "smaller than the base model's hidden size 48", "44"),
        (64, "smaller than the base model's hidden size 48", "44"),
        (-4, "positive", "legal: 4"),
    ],
)
def test_an_explicit_illegal_width_names_the_constraint_and_the_nearest_legal_ones(
    pruned: int, constraint: str, nearest: str
) -> None:
    with pytest.raises(PatError) as error:
        choose_width(48, 4, pruned_hidden_size=pruned)
    message = str(error.value)
    assert f"pruned_hidden_size={pruned}" in message and constraint in message and nearest in message
    assert "\n" not in message


@pytest.mark.parametrize("pruned", [0, -4])
def test_an_error_does_not_speak_of_an_alignment_nobody_asked_for(pruned: int) -> None:
    with pytest.raises(PatError) as error:
        choose_width(48, 4, pruned_hidden_size=pruned)
    assert "None" not in str(error.value)


def test_a_hard_alignment_is_named_in_the_error() -> None:
    with pytest.raises(PatError, match=r"multiple_of=16.*nearest legal: 32"):
        choose_width(48, 4, pruned_hidden_size=36, multiple_of=16)


def test_no_legal_width_at_all_is_an_error() -> None:
    with pytest.raises(PatError, match="lower multiple_of"):
        choose_width(48, 4, pruning_ratio=0.25, multiple_of=48)
