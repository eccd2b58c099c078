"""Calibration and refit of the MLPs on activations of the base model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import batch, shallow
from tiny_training import attach, largest_difference, logits, tuner_of
from torch import Tensor

from pat.errors import PatError
from pat.surgery.compensate import elimination
from pat.tuner import refit as refitting
from pat.tuner.model import PatModel

CHANNELS, KEPT = 72, 40
DATA = [batch(seed=seed, batch_size=8) for seed in range(4)]


def gated(family: str = "llama", **fields: Any) -> PatModel:
    model = attach(shallow(family, tied=True), axes=["mlp"], pruned_intermediate_size=KEPT, **fields)
    return tuner_of(model)


def inner_activations(path: str) -> Tensor:
    """What goes into a writer of the base model, at real tokens, in float64."""
    model, seen = shallow("llama", tied=True), []
    model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for inputs in DATA:
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    real = [inputs["attention_mask"].bool() for inputs in DATA]
    return torch.cat([rows[mask] for rows, mask in zip(seen, real, strict=True)]).double()


@pytest.mark.parametrize("refits", [True, False])
def test_channels_are_ordered_by_what_is_lost_without_them(refits: bool) -> None:
    tuner = gated(refit=refits)
    assert tuner.needs_calibration()
    assert tuner.calibrate(DATA) is None and not tuner.needs_calibration()
    assert not tuner.mask().calibrated
    for path, gate in tuner.gates().items():
        a, weight = inner_activations(path), shallow("llama", tied=True).get_submodule(path).weight.double()
        score = a.square().mean(0) * weight.square().sum(0)
        if refits:
            score = elimination(a.mT @ a, weight, KEPT)
        assert set(gate.prior.topk(KEPT).indices.tolist()) == set(score.topk(KEPT).indices.tolist())
        assert int((gate.prior > 0).sum()) == KEPT


def test_a_refit_is_a_regression_on_the_bases_own_activations() -> None:
    tuner = gated()
    tuner.calibrate(DATA)
    tuner.set_step(0, 0)
    num_tokens = tuner.refit(DATA)
    for path, gate in tuner.gates().items():
        a = inner_activations(path)
        assert len(a) == num_tokens
        kept, dropped = a[:, gate.keep], a[:, ~gate.keep]
        moment = kept.mT @ kept
        ridge = 1e-4 * moment.diagonal().mean() * torch.eye(KEPT, dtype=torch.float64)
        expected = torch.linalg.solve(moment + ridge, kept.mT @ dropped).mT
        torch.testing.assert_close(gate.reconstruction.double(), expected, atol=1e-4, rtol=1e-3)


def test_a_refit_brings_the_model_nearer_to_its_base() -> None:
    base = logits(shallow("llama", tied=True), DATA[0])
    differences = {}
    for refits in (True, False):
        tuner = gated(refit=refits)
        tuner.calibrate(DATA)
        tuner.set_step(0, 0)
        tuner.refit(DATA)
        differences[refits] = float((logits(tuner.model, DATA[0]) - base).square().mean())
    assert 0 < differences[True] < 0.9 * differences[False]


def test_few_layers_at_a_time_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for limit in (refitting.MAX_BYTES, 4 * CHANNELS**2):
        monkeypatch.setattr(refitting, "MAX_BYTES", limit)
        tuner = gated()
        tuner.calibrate(iter(DATA))
        tuner.set_step(0, 0)
        tuner.refit(iter(DATA))
        found.append([gate.reconstruction for gate in tuner.gates().values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_adapters_are_off_while_it_is_measured_and_on_again_after_it() -> None:
    tuner, other = gated(), gated()
    for parameter in tuner.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5
    for each in (tuner, other):
        each.calibrate(DATA)
        for gate in each.gates().values():  # whose order depends on LoRA
            gate.weight.data.zero_()
            gate.set_prior(torch.linspace(1, -1, CHANNELS))
        each.set_step(0, 0)
        each.refit(DATA)
    for gate, same in zip(tuner.gates().values(), other.gates().values(), strict=True):
        assert torch.equal(gate.reconstruction, same.reconstruction)
    assert largest_difference(logits(tuner.model), logits(other.model)) > 0.1


def test_what_was_measured_for_the_order_serves_the_refit_and_survives_a_copy() -> None:
    tuner = gated()
    tuner.calibrate(iter(DATA))
    twin = tuner_of(copy.deepcopy(tuner))
    again = gated()
    again.calibrate(DATA)
    again._moments = None  # as after a resumption
    for each in (tuner, twin):
        each.set_step(0, 0)
        assert each.refit(()) == sum(int(inputs["attention_mask"].sum()) for inputs in DATA)
    again.set_step(0, 0)
    again.refit(DATA)
    for gates in zip(*(each.gates().values() for each in (tuner, twin, again)), strict=True):
        assert torch.equal(gates[0].reconstruction, gates[1].reconstruction)
        assert torch.equal(gates[0].reconstruction, gates[2].reconstruction)


def test_a_merge_without_the_refit_that_was_asked_for_is_refused() -> None:
    tuner = gated()
    tuner.calibrate(DATA)
    tuner.set_step(0, 0)
    for leaving in (tuner.merge_and_unload, tuner.compact):
        with pytest.raises(PatError, match=r"not refitted; call model.refit\(batches\)"):
            leaving()


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        (None, "these are all that there are: give more rows"),
        (1, "raise refit_tokens, which is 1 here"),
    ],
)
def test_little_text_is_said_with_what_helps(asked: int | None, remedy: str, caplog: pytest.LogCaptureFixture) -> None:
    """A larger number does not help where all text has been read, and another text not where a number was the limit."""
    gated(refit_tokens=asked).calibrate([batch(seed=0, batch_size=1)])
    assert "stand on" in caplog.text and remedy in caplog.text
    assert ("1152 by default" in caplog.text) == (asked is not None)


def test_under_autocast_the_model_alone_computes_in_bfloat16() -> None:
    """The moments are those of the coarse activations, to float32; a product in bfloat16 would be off by 1e-3."""
    tuner, seen = gated(), dict[str, list[Tensor]]()
    for path in tuner.gates():
        module = tuner.model.get_submodule(path)
        module.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(args[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        tuner.calibrate(DATA)
    assert tuner._moments is not None
    mask = torch.cat([inputs["attention_mask"].bool().flatten() for inputs in DATA])
    for path, moment in tuner._moments["default"]:
        assert {rows.dtype for rows in seen[path]} == {torch.bfloat16}
        a = torch.cat([rows.flatten(0, -2) for rows in seen[path]])[mask].double()
        torch.testing.assert_close(moment.double(), a.mT @ a, rtol=1e-5, atol=1e-5)
