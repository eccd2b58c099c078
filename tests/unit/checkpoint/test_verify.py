"""Comparing two models: the figures themselves, what is left out, what is put back, and the verdict."""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from hardened import hardened
from tiny_models import KINDS, PAD_ID, batch, build
from torch import Tensor, nn

from pat.checkpoint import verify
from pat.checkpoint.verify import MAX_LOGIT_DIFF, Parity, check, compare, permutation_floor
from pat.errors import ParityMissed, PatError, RunFailed

NO_DIFFERENCE = Parity(0.0, 0.0, 1.0, 100, 1.0, "float32")

ROUNDING = 2e-5
"""Float32 rounding on logits of deviation 1 in three layers; the tiny models of all families stay below 1e-5."""


def test_a_model_equals_itself_on_every_real_token() -> None:
    model = build("llama", tied=True)
    parity = compare(model, model, [batch(), batch(seed=1)])
    assert parity.max_abs_logit_diff == 0
    assert parity.mean_kl == 0
    assert parity.top1_agreement == 1
    assert parity.num_tokens == 2 * int(batch()["attention_mask"].sum())
    assert parity.dtype == "float32"


def test_the_figures_are_those_of_the_textbook(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = build("llama", tied=True), build("llama", tied=True, seed=1)
    inputs = batch()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        x, y = a(**inputs).logits[real].double(), b(**inputs).logits[real].double()
    monkeypatch.setattr(verify, "LOGIT_ROWS", 5)  # several chunks, the last one smaller
    parity = compare(a, b, [inputs])
    kl = torch.nn.functional.kl_div(y.log_softmax(-1), x.log_softmax(-1), reduction="batchmean", log_target=True)
    assert parity.max_abs_logit_diff == pytest.approx((x - y).abs().max().item(), rel=1e-5)
    assert parity.mean_kl == pytest.approx(kl.item(), rel=1e-4)
    assert parity.top1_agreement == pytest.approx((x.argmax(-1) == y.argmax(-1)).double().mean().item())
    assert 0 < parity.top1_agreement + 1e-9 < 1
    assert parity.logit_std == pytest.approx(x.std(-1).mean().item(), rel=1e-5)


def test_padding_takes_no_part() -> None:
    a = build("llama", tied=False)
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.get_input_embeddings().weight[PAD_ID] += 1
    parity = compare(a, b, [batch(padding_side="right")])
    assert parity.max_abs_logit_diff == 0
    without_mask = compare(a, b, [{"input_ids": batch()["input_ids"]}])
    assert without_mask.max_abs_logit_diff > 0.1, "the models do differ where padding is read"
    assert without_mask.num_tokens == batch()["input_ids"].numel()


def test_modes_and_settings_are_as_before() -> None:
    model = hardened(build("llama", tied=True))
    dense = model.merge_and_unload().train()
    model.train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    modes = [module.training for module in model.modules()]
    setting = torch.backends.cuda.matmul.fp32_precision
    compare(model, dense, [batch()])
    assert [module.training for module in model.modules()] == modes
    assert dense.training
    assert torch.backends.cuda.matmul.fp32_precision == setting


def test_dropout_is_off_while_comparing() -> None:
    model = hardened(build("llama", tied=True), lora_dropout=0.5)
    dense = model.merge_and_unload()
    model.train()
    assert compare(model, dense, [batch()]).max_abs_logit_diff < ROUNDING


def test_a_trainers_mixed_precision_is_looked_past() -> None:
    """After a bf16 training accelerate's autocast stays around the outermost model's forward."""
    model = hardened(build("llama", tied=True))
    dense = model.merge_and_unload()
    plain = model.forward

    def autocast(*args: object, **kwargs: object) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(*args, **kwargs)

    model.forward = autocast
    with torch.no_grad():
        assert (model(**batch()).logits.float() - dense(**batch()).logits).abs().max() > 1e-2
    parity = compare(model, dense, [batch()])
    assert parity.max_abs_logit_diff < ROUNDING
    assert parity.dtype == "float32"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (torch.float32, torch.bfloat16, "bfloat16"),
        (torch.bfloat16, torch.float32, "bfloat16"),
        (torch.float16, torch.float32, "float16"),
        (torch.float16, torch.bfloat16, "bfloat16"),
    ],
)
def test_the_coarser_dtype_counts(first: torch.dtype, second: torch.dtype, expected: str) -> None:
    a, b = (build("llama", tied=True, dtype=dtype, num_hidden_layers=1) for dtype in (first, second))
    assert compare(a, b, [batch()]).dtype == expected


def test_no_token_is_an_error() -> None:
    model = build("llama", tied=True)
    with pytest.raises(PatError, match="no tokens"):
        compare(model, model, [])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", KINDS)
def test_permuting_the_channels_changes_rounding_only(family: str, tied: bool) -> None:
    model = build(family, tied=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    floor = permutation_floor(model, [batch()])
    assert 0 < floor.max_abs_logit_diff < ROUNDING
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_floor_is_of_a_permuted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    original: Callable[..., Parity] = verify.compare

    def spy(model: nn.Module, other: nn.Module, batches: list[dict[str, Tensor]]) -> Parity:
        seen.append(other)
        return original(model, other, batches)

    monkeypatch.setattr(verify, "compare", spy)
    model = build("llama", tied=True)
    permutation_floor(model, [batch()])
    old, new = model.get_input_embeddings().weight, seen[0].get_input_embeddings().weight  # type: ignore[operator]
    assert not torch.equal(old, new)
    assert torch.equal(old.sort(-1).values, new.sort(-1).values)


def test_float32_is_judged_by_its_largest_difference() -> None:
    check(NO_DIFFERENCE)
    check(replace(NO_DIFFERENCE, max_abs_logit_diff=MAX_LOGIT_DIFF, mean_kl=1.0, top1_agreement=0.0))
    with pytest.raises(RunFailed, match=re.escape("max |Δlogit| 0.00101 > 0.001")):
        check(replace(NO_DIFFERENCE, max_abs_logit_diff=1.01 * MAX_LOGIT_DIFF))


def test_past_the_tolerance_the_models_own_rounding_decides() -> None:
    asked = []

    def floor(largest: float, mean_kl: float = 1e-8) -> Callable[[], Parity]:
        def measure() -> Parity:
            asked.append(largest)
            return replace(NO_DIFFERENCE, max_abs_logit_diff=largest, mean_kl=mean_kl)

        return measure

    assert check(NO_DIFFERENCE, floor=floor(1.0)).permutation_floor is None and not asked
    missed = replace(NO_DIFFERENCE, max_abs_logit_diff=4e-3, mean_kl=1e-8)
    accepted = check(missed, floor=floor(1e-3))
    assert accepted == replace(missed, permutation_floor=1e-3)
    assert "permuting its channels alone makes 1.0e-03" in accepted.describe()
    for parity, measured in (
        (missed, floor(0.7e-3)),
        (missed, floor(math.nan)),
        (replace(missed, mean_kl=2e-7), floor(1e-3)),
        (replace(missed, max_abs_logit_diff=math.nan), floor(1e-3)),
        (replace(missed, dtype="bfloat16", mean_kl=1.0), floor(1.0)),
    ):
        with pytest.raises(ParityMissed):
            check(parity, floor=measured)
    assert len(asked) == 5  # not in bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_is_judged_by_what_the_model_expects(dtype: str) -> None:
    parity = replace(NO_DIFFERENCE, dtype=dtype, max_abs_logit_diff=1.0)
    max_kl, max_disagreement = verify.MAX_KL[dtype], verify.MAX_DISAGREEMENT[dtype]
    check(replace(parity, mean_kl=max_kl, top1_agreement=1.001 - max_disagreement))
    with pytest.raises(RunFailed, match="mean KL"):
        check(replace(parity, mean_kl=1.01 * max_kl))
    with pytest.raises(RunFailed, match="disagreement"):
        check(replace(parity, top1_agreement=0.999 - max_disagreement))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_not_a_number_never_passes(dtype: str) -> None:
    model, broken = build("llama", tied=True), build("llama", tied=True)
    with torch.no_grad():
        broken.get_input_embeddings().weight[17] = math.nan
    inputs = batch()
    inputs["input_ids"][0, 3] = 17  # only a few rows are affected, and not the first batch
    parity = compare(model, broken, [batch(seed=5), inputs, batch(seed=6)])
    assert math.isnan(parity.max_abs_logit_diff)
    assert math.isnan(parity.mean_kl)
    with pytest.raises(RunFailed):
        check(replace(parity, dtype=dtype))


def test_the_figures_go_into_results_and_sentences() -> None:
    parity = Parity(1.5e-5, 2e-9, 0.995, 1024, 3.1, "float32")
    assert asdict(parity) == {
        "max_abs_logit_diff": 1.5e-5,
        "mean_kl": 2e-9,
        "top1_agreement": 0.995,
        "num_tokens": 1024,
        "logit_std": 3.1,
        "dtype": "float32",
        "permutation_floor": None,
    }
    assert "1.5e-05" in parity.describe()
    assert "at most 0 in a logit (KL 0 nats" in replace(parity, max_abs_logit_diff=0.0, mean_kl=0.0).describe()
    assert "99.50%" in parity.describe()
