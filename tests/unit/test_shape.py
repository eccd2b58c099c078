"""What is asked for, and one budget that becomes the sizes of a pruned model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pat.budget import choose_shape
from pat.errors import PatError
from pat.prunable import HEADS, HIDDEN, LAYERS, MLP, Prunable, Sizes
from pat.shape import Shape, ShapeOptions, check_request

SMOLLM2 = {HIDDEN: 576, MLP: 1536, HEADS: 3, LAYERS: 30}
VOCABULARY, HEAD_SIZE, QUERIES = 49152, 64, 3


def count(sizes: Sizes) -> int:
    """The parameters of SmolLM2-135M at some sizes, written down by hand."""
    width, group = sizes[HIDDEN], HEAD_SIZE * sizes[HEADS]
    per_layer = (2 * QUERIES + 2) * group * width + 3 * sizes[MLP] * width + 2 * width
    return VOCABULARY * width + sizes[LAYERS] * per_layer + width


def shape(**request: Any) -> Shape:
    base = Prunable(SMOLLM2, count, QUERIES, **request.pop("base", {}))
    return choose_shape(base, **({"axes": ["auto"]} | request))


def at(**sizes: int) -> int:
    names = {"hidden": HIDDEN, "mlp": MLP, "heads": HEADS, "layers": LAYERS}
    return count(SMOLLM2 | {names[axis]: size for axis, size in sizes.items()})


def test_the_whole_model_is_known() -> None:
    assert at() == 134_515_008


def test_a_share_of_the_parameters_comes_off_the_mlps_to_the_channel() -> None:
    # A quarter of all parameters leaves 887 channels; 864 is a multiple of 32 at most 3 % below.
    found = shape(axes=["mlp"], pruning_ratio=0.25)
    assert (found.pruned("hidden"), found.pruned("mlp")) == (576, 864)
    assert "leaves 887 of 1536" in found.reason and "multiple of 32" in found.reason
    assert found.pruning_ratio == 1 - at(mlp=864) / at()


def test_the_hidden_size_alone_is_cut_by_the_ratio_itself() -> None:
    found = shape(axes=["hidden"], pruning_ratio=0.25)
    assert (found.pruned("hidden"), found.pruned("mlp")) == (432, 1536)
    assert found.pruning_ratio == pytest.approx(0.25) and found.cuts("hidden") and not found.cuts("mlp")


def test_of_both_axes_each_gives_half() -> None:
    found = shape(axes=["mlp", "hidden"], pruning_ratio=0.25)
    assert found.pruned("hidden") == 504
    assert abs(at(hidden=504, mlp=found.pruned("mlp")) / at() - 0.75) < 0.02


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.29])
def test_auto_takes_the_mlps_while_half_of_their_channels_stay(ratio: float) -> None:
    assert shape(pruning_ratio=ratio) == shape(axes=["mlp"], pruning_ratio=ratio)


@pytest.mark.parametrize("ratio", [0.32, 0.375, 0.5])
def test_auto_takes_what_is_left_off_the_hidden_size(ratio: float) -> None:
    found = shape(pruning_ratio=ratio)
    assert found.cuts("hidden") and 0.5 <= found.pruned("mlp") / 1536 < 0.62
    assert found.pruned("hidden") % 9 == 0
    assert found.pruning_ratio == pytest.approx(ratio, abs=0.02)
    # The next wider model would have to give more than half of its channels.
    assert at(hidden=found.pruned("hidden") + 9, mlp=768) > (1 - ratio) * at()


def test_explicit_sizes_come_before_the_axes() -> None:
    found = shape(axes=["hidden"], asked={"mlp": 1000})
    assert (found.pruned("hidden"), found.pruned("mlp")) == (576, 1000)
    found = shape(asked={"hidden": 432})
    assert (found.pruned("hidden"), found.pruned("mlp")) == (432, 1536)


def test_more_than_the_mlps_hold_is_refused() -> None:
    with pytest.raises(PatError, match=r"the MLPs hold 59\.2% of the parameters; add 'hidden'"):
        shape(axes=["mlp"], pruning_ratio=0.7)


def test_where_mlps_cannot_be_cut_auto_cuts_the_hidden_size() -> None:
    base = {"obstacles": {"mlp": "this family has experts"}}
    assert shape(base=base) == shape(axes=["hidden"])
    for request in ({"axes": ["mlp"]}, {"asked": {"mlp": 8}}):
        with pytest.raises(PatError, match="experts"):
            shape(base=base, **request)


def test_layers_and_heads_take_the_size_that_comes_nearest() -> None:
    found = shape(axes=["layers"])
    assert found.pruned("layers") == 21 and found.describe() == "layers 30 to 21"
    assert abs(at(layers=21) - 0.75 * at()) <= min(abs(at(layers=n) - 0.75 * at()) for n in (20, 22))
    assert shape(axes=["heads"], pruning_ratio=0.1).pruned("heads") == 1
    assert found.pruning_ratio == 1 - at(layers=21) / at()


def test_heads_and_channels_go_by_one_ratio() -> None:
    found = shape(axes=["mlp", "heads"], pruning_ratio=0.25)
    assert (found.pruned("heads"), found.pruned("mlp")) == (2, 1056)  # 0.67 and 0.69 of them
    assert not shape(axes=["mlp", "heads"], pruning_ratio=0.05).cuts("heads")  # a third would be far too many
    assert shape(axes=["mlp", "heads"], pruning_ratio=0.55).pruned("heads") == 1


@pytest.mark.parametrize(
    "axes", [["layers", "mlp"], ["mlp", "layers"], ["heads", "layers", "mlp"], ["heads", "hidden"]]
)
def test_several_axes_share_a_budget_and_the_finest_makes_up_for_the_rest(axes: list[str]) -> None:
    found = shape(axes=axes, pruning_ratio=0.25)
    assert all(found.cuts(axis) == (axis in axes) for axis in ("hidden", "mlp", "heads", "layers"))
    assert found.pruning_ratio == pytest.approx(0.25, abs=0.02)
    if "layers" in axes:  # each by itself gives its share, to half a step
        step = at() - at(layers=29)
        assert abs(at() - at(layers=found.pruned("layers")) - 0.25 / len(axes) * at()) <= step / 2


@pytest.mark.parametrize(
    ("axes", "ratio"),
    [(["heads", "layers"], 0.4), (["heads", "layers"], 0.6), (["mlp", "layers"], 0.75), (["mlp", "hidden"], 0.95)],
    ids=str,
)
def test_what_the_finest_axis_cannot_give_falls_to_the_coarser_ones(axes: list[str], ratio: float) -> None:
    """The heads, or the MLPs of what is left, have fewer parameters than an equal part."""
    found = shape(axes=axes, pruning_ratio=ratio)
    assert found.pruning_ratio == pytest.approx(ratio, abs=0.03) and all(found.cuts(axis) for axis in axes)
    assert "coarser axes give more" in found.reason
    least = 1 - at(heads=1, layers=1) / at()
    with pytest.raises(PatError, match=rf"can give {least:.1%} .*\(key/value heads 3 to 1, layers 30 to 1\); add"):
        shape(axes=["heads", "layers"], pruning_ratio=0.9)


def test_of_the_heads_that_are_left_the_hidden_size_is_a_multiple() -> None:
    found = shape(asked={"heads": 2, "hidden": 570})
    assert (found.pruned("heads"), found.pruned("hidden")) == (2, 570)
    with pytest.raises(PatError, match="must be a multiple of num_attention_heads=6"):
        shape(asked={"heads": 2, "hidden": 567})
    base = Prunable(SMOLLM2 | {HIDDEN: 8 * 64, HEADS: 8}, count, 1)
    with pytest.raises(PatError, match=r"pruned_num_key_value_heads=3; expected 1 or 2 or 4 of 8 .*transformers"):
        choose_shape(base, axes=["auto"], asked={"heads": 3})


@pytest.mark.parametrize(
    "request_",
    [{"axes": ["heads"]}, *({"axes": [name], "pruning_ratio": 0.99} for name in ("layers", "hidden", "auto"))],
    ids=str,
)
def test_more_than_an_axis_can_give_is_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(PatError, match=r"can give \d+\.\d% of the parameters at most.*; (add .*, or )?ask for less"):
        shape(**request_)


def test_layers_of_rarer_kinds_stay() -> None:
    with pytest.raises(PatError, match=r"pruned_num_hidden_layers=3; expected 4 to 29 of 30 \(4 are of rarer kinds"):
        shape(asked={"layers": 3}, base={"fewest_layers": 4})


@pytest.mark.parametrize(("axis", "size"), [("layers", 0), ("layers", 30), ("heads", 0), ("heads", 3), ("heads", -1)])
def test_a_number_of_layers_or_heads_that_cannot_be_is_refused(axis: str, size: int) -> None:
    with pytest.raises(PatError, match=f"={size}; expected 1 "):
        shape(asked={axis: size})


@pytest.mark.parametrize("size", [0, -1, 1536, 1537])
def test_a_size_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(PatError, match=f"pruned_intermediate_size={size}; expected a number below"):
        shape(asked={"mlp": size})


def test_experts_keep_a_multiple_of_what_their_kernel_wants() -> None:
    experts = {"mlp_step": 8}
    assert shape(asked={"mlp": 1528}, base=experts).pruned("mlp") == 1528
    with pytest.raises(PatError, match=r"pruned_intermediate_size=1530; .* a multiple of 8\."):
        shape(asked={"mlp": 1530}, base=experts)
    assert shape(axes=["mlp"], pruning_ratio=0.25, multiple_of=12, base=experts).pruned("mlp") % 24 == 0


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.2, 1.5, math.nan])
def test_a_ratio_outside_the_open_interval_is_refused(ratio: float) -> None:
    with pytest.raises(PatError, match=r"above 0 and below 1"):
        check_request(ShapeOptions(pruning_ratio=ratio))


@pytest.mark.parametrize("size", [f"pruned_{field}" for field in SMOLLM2])
def test_ratio_and_size_together_are_refused(size: str) -> None:
    with pytest.raises(PatError, match="one of the two"):
        check_request(ShapeOptions(pruning_ratio=0.25, **{size: 2}))


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
    with pytest.raises(PatError, match="expected 'auto', or some of hidden, mlp, heads, layers"):
        check_request(ShapeOptions(axes=axes))


def test_what_the_hidden_size_cannot_give_falls_to_the_mlps() -> None:
    sizes = {HIDDEN: 128, MLP: 2048, HEADS: 1, LAYERS: 2}
    wide = Prunable(sizes, lambda s: s[LAYERS] * (3 * s[MLP] * s[HIDDEN] + 4 * s[HIDDEN] ** 2) + s[HIDDEN])
    request: dict[str, Any] = {"pruning_ratio": 0.95, "multiple_of": 64}
    found = choose_shape(wide, axes=["layers", "hidden", "mlp"], **request)
    assert found.pruned("hidden") == 64
    assert found.pruning_ratio == pytest.approx(0.95, abs=0.005)  # as near as multiples of 64 MLP channels come
    with pytest.raises(PatError, match=r"at most \(hidden size 128 to 64, layers 2 to 1\); add mlp or heads, or"):
        choose_shape(wide, axes=["layers", "hidden"], **request)
