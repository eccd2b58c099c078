"""One budget becomes the sizes of a pruned model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pat.errors import PatError
from pat.shape import Shape, ShapeOptions, check_request, choose_shape

HIDDEN, HEADS, CHANNELS = 576, 9, 1536  # SmolLM2-135M's
VOCABULARY, LAYERS, ATTENTION = 49152, 30, 576 + 2 * 192 + 576


def count(hidden: float, mlp: float) -> int:
    """The parameters of SmolLM2-135M at shares of its axes, written down by hand."""
    width = round(hidden * HIDDEN)
    per_layer = ATTENTION * width + 3 * round(mlp * CHANNELS) * width + 2 * width
    return VOCABULARY * width + LAYERS * per_layer + width


def shape(**request: Any) -> Shape:
    return choose_shape(HIDDEN, HEADS, CHANNELS, count, **({"axes": ["auto"]} | request))


def test_the_whole_model_is_known() -> None:
    assert count(1, 1) == 134_515_008


def test_a_share_of_the_parameters_comes_off_the_mlps_to_the_channel() -> None:
    # A quarter of all parameters leaves 887 channels; 896 is a multiple of 128 within 3 %.
    found = shape(axes=["mlp"], pruning_ratio=0.25)
    assert (found.hidden.pruned_hidden_size, found.pruned_intermediate_size) == (576, 896)
    assert "leaves 887 of 1536" in found.reason and "multiple of 128" in found.reason
    assert found.pruning_ratio == 1 - count(1, 896 / 1536) / count(1, 1)


def test_the_hidden_size_alone_is_cut_by_the_ratio_itself() -> None:
    found = shape(axes=["hidden"], pruning_ratio=0.25)
    assert (found.hidden.pruned_hidden_size, found.pruned_intermediate_size) == (432, 1536)
    assert found.pruning_ratio == pytest.approx(0.25) and found.cuts_hidden and not found.cuts_mlp


def test_of_both_axes_each_gives_half() -> None:
    found = shape(axes=["mlp", "hidden"], pruning_ratio=0.25)
    assert found.hidden.pruned_hidden_size == 504
    assert abs(count(504 / 576, found.pruned_intermediate_size / 1536) / count(1, 1) - 0.75) < 0.02


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.29])
def test_auto_takes_the_mlps_while_half_of_their_channels_stay(ratio: float) -> None:
    assert shape(pruning_ratio=ratio) == shape(axes=["mlp"], pruning_ratio=ratio)


@pytest.mark.parametrize("ratio", [0.32, 0.375, 0.5])
def test_auto_takes_what_is_left_off_the_hidden_size(ratio: float) -> None:
    found = shape(pruning_ratio=ratio)
    assert found.cuts_hidden and 0.5 <= found.pruned_intermediate_size / CHANNELS < 0.62
    assert found.hidden.pruned_hidden_size % HEADS == 0
    assert found.pruning_ratio == pytest.approx(ratio, abs=0.02)
    # The next wider model would have to give more than half of its channels.
    wider = (found.hidden.pruned_hidden_size + HEADS) / HIDDEN
    assert count(wider, 0.5) > (1 - ratio) * count(1, 1)


def test_explicit_sizes_come_before_the_axes() -> None:
    found = shape(axes=["hidden"], pruned_intermediate_size=1000)
    assert (found.hidden.pruned_hidden_size, found.pruned_intermediate_size) == (576, 1000)
    found = shape(pruned_hidden_size=432)
    assert (found.hidden.pruned_hidden_size, found.pruned_intermediate_size) == (432, 1536)


def test_more_than_the_mlps_hold_is_refused() -> None:
    with pytest.raises(PatError, match=r"the MLPs hold 59\.2% of the parameters; add 'hidden'"):
        shape(axes=["mlp"], pruning_ratio=0.7)


def test_where_mlps_cannot_be_cut_auto_cuts_the_hidden_size() -> None:
    assert choose_shape(48, 4, 0, lambda hidden, _: round(1000 * hidden), axes=["auto"]).hidden.pruned_hidden_size == 36
    for request in ({"axes": ["mlp"]}, {"axes": ["auto"], "pruned_intermediate_size": 8}):
        with pytest.raises(PatError, match="experts"):
            choose_shape(48, 4, 0, lambda hidden, _: round(1000 * hidden), **request)


@pytest.mark.parametrize("size", [0, -1, 1536, 1537])
def test_a_size_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(PatError, match=f"pruned_intermediate_size={size}; expected a number below"):
        shape(pruned_intermediate_size=size)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.2, 1.5, math.nan])
def test_a_ratio_outside_the_open_interval_is_refused(ratio: float) -> None:
    with pytest.raises(PatError, match=r"strictly between 0 and 1"):
        check_request(ShapeOptions(pruning_ratio=ratio))


@pytest.mark.parametrize("size", ["pruned_hidden_size", "pruned_intermediate_size"])
def test_ratio_and_size_together_are_refused(size: str) -> None:
    with pytest.raises(PatError, match="one of the two"):
        check_request(ShapeOptions(pruning_ratio=0.25, **{size: 36}))


@pytest.mark.parametrize("multiple_of", [0, -8])
def test_a_senseless_alignment_is_refused(multiple_of: int) -> None:
    with pytest.raises(PatError, match="multiple_of"):
        check_request(ShapeOptions(multiple_of=multiple_of))


def test_an_alignment_beyond_the_mlp_is_refused() -> None:
    with pytest.raises(PatError, match="multiple_of=2048; expected at most"):
        shape(axes=["mlp"], multiple_of=2048)


def test_cutting_nothing_is_refused() -> None:
    with pytest.raises(PatError, match="cuts nothing"):
        shape(axes=["mlp"], pruning_ratio=0.01, multiple_of=1536)


def test_one_axis_may_be_given_by_its_name_alone() -> None:
    options = ShapeOptions(axes="mlp")  # type: ignore[arg-type]
    check_request(options)
    assert options.axes == ["mlp"]


@pytest.mark.parametrize("axes", [[], ["depth"], ["auto", "mlp"]])
def test_an_unknown_axis_is_refused(axes: list[str]) -> None:
    with pytest.raises(PatError, match="expected 'auto', or some of hidden, mlp"):
        check_request(ShapeOptions(axes=axes))
