"""float64 where the device has none: on the CPU, from calibration to the merged weights."""

from collections.abc import Iterator

import pytest
import torch
from hardened import hardened
from no_float64 import NoFloat64
from tiny_models import batch, build

from pat.checkpoint.verify import compare
from pat.nll import response_nll
from pat.surgery import precision
from pat.surgery.precision import to_float64


@pytest.fixture
def no_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", frozenset({"cpu"}))
    with NoFloat64():
        yield


def test_a_device_with_float64_keeps_its_tensors() -> None:
    assert "mps" in precision.WITHOUT_FLOAT64
    moved = to_float64(torch.ones(2, device="meta"))
    assert (moved.device.type, moved.dtype) == ("meta", torch.float64)


@pytest.mark.parametrize(("family", "fields"), [("llama", {"rotation": "pca"}), ("gemma3_text", {"rotation": "auto"})])
def test_calibration_merge_and_comparison_need_no_float64_on_the_device(
    no_float64: None, family: str, fields: dict[str, str]
) -> None:
    model = hardened(build(family, tied=True), calibration=[batch(seed=3, batch_size=8)], **fields)
    parity = compare(model, model.merge_and_unload(), [batch()])
    assert parity.max_abs_logit_diff < 1e-3 and parity.mean_kl < 1e-6


def test_an_evaluation_needs_no_float64_on_the_device(no_float64: None) -> None:
    example = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    result = response_nll(build("llama", tied=True), [example], batch_size=1, pad_token_id=0)
    assert result.num_tokens == 3 and result.nll > 0


def test_the_stand_in_refuses(no_float64: None) -> None:
    with pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()
