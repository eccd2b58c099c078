"""Calibration and refit of the MLPs on activations of the base model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import batch, shallow
from tiny_training import attach, largest_difference, logits, tuner_of
from torch import Tensor

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


def test_a_channel_counts_by_its_energy_and_its_column() -> None:
    tuner = gated(calibration_tokens=10_000)
    assert tuner.needs_calibration()
    tuner.calibrate(DATA)
    assert not tuner.needs_calibration()
    for path, gate in tuner.gates().items():
        weight = shallow("llama", tied=True).get_submodule(path).weight.double()
        score = inner_activations(path).square().mean(0) * weight.square().sum(0)
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
    tuner = gated()
    tuner.calibrate(DATA)
    for parameter in tuner.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5
    tuner.set_step(0, 0)
    tuner.refit(DATA)
    other = gated()
    other.calibrate(DATA)
    other.set_step(0, 0)
    for gate, same in zip(tuner.gates().values(), other.gates().values(), strict=True):
        same.keep.copy_(gate.keep)
        same._refresh()
    other.refit(DATA)
    for gate, same in zip(tuner.gates().values(), other.gates().values(), strict=True):
        assert torch.equal(gate.reconstruction, same.reconstruction)
    assert largest_difference(logits(tuner.model), logits(other.model)) > 0.1
