"""Gates on the stacked writers of experts, and what goes into them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import batch, shallow
from tiny_training import attach, largest_difference, logits, tuner_of
from torch import Tensor, nn

from pat.method.inner import ExpertsGate, InnerGate
from pat.surgery.compensate import shrink
from pat.tuner.experts import ExpertsWatch, tokens_per_routed
from pat.tuner.model import PatModel

CHANNELS, KEPT, EXPERTS = 40, 24, 4
DATA = [batch(seed=seed, batch_size=8) for seed in range(2)]
LAYER = "model.layers.0.mlp.experts"


def gated(**fields: Any) -> PatModel:
    model = shallow("mixtral", tied=True)
    return tuner_of(attach(model, **({"axes": ["mlp"], "pruned_intermediate_size": KEPT} | fields)))


def watched(model: nn.Module) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """What goes into the experts of the first layer and what comes out, of each batch."""
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    handle = model.get_submodule(LAYER).register_forward_hook(lambda _, args, out: seen.append((args, out)))
    with torch.no_grad():
        for inputs in DATA:
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    handle.remove()
    return seen


@pytest.mark.parametrize("refits", [True, False])
def test_gates_on_weights_are_those_before_each_writer(refits: bool) -> None:
    torch.manual_seed(0)
    gate = ExpertsGate(6, 4, refits=refits, num_stacked=3)
    weight, a = torch.randn(3, 5, 6), torch.randn(3, 7, 6)
    gate.set_prior(torch.randn(3, 6))
    single = [InnerGate(6, 4, refits=refits) for _ in range(3)]
    for one, prior in zip(single, gate.prior, strict=True):
        one.set_prior(prior)
    for step in (1, 2):  # soft, and hard
        for each in (gate, *single):
            each.set_step(step, 2)
        if step == 2 and refits:
            gate.set_reconstruction(torch.randn(3, 2, 4))
            for one, matrix in zip(single, gate.reconstruction, strict=True):
                one.set_reconstruction(matrix)
        expected = torch.stack([one(x) @ w.mT for one, x, w in zip(single, a, weight, strict=True)])
        torch.testing.assert_close(a @ gate(weight).mT, expected, atol=1e-5, rtol=1e-5)
    assert len({tuple(row.tolist()) for row in gate.keep}) > 1 and (gate.keep.sum(-1) == 4).all()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_sees_the_gate_and_finds_its_parameter_again(implementation: str) -> None:
    tuner = gated()
    tuner.calibrate(DATA)
    tuner.set_step(0, 0)
    tuner.refit(DATA)
    tuner.model.set_experts_implementation(implementation)
    names = list(dict(tuner.model.named_parameters()))
    masked = logits(tuner.model, DATA[0])
    assert list(dict(tuner.model.named_parameters())) == names
    assert largest_difference(masked, logits(tuner.merge_and_unload(), DATA[0])) <= 1e-5
    assert largest_difference(masked, logits(shallow("mixtral", tied=True), DATA[0])) > 1e-2


@pytest.mark.parametrize("targets", [None, []], ids=["with LoRA on experts", "without"])
def test_a_pass_that_fails_leaves_the_parameter_as_it_was(targets: list[str] | None) -> None:
    tuner = gated(target_modules=["q_proj"], target_parameters=targets)
    names = list(dict(tuner.model.named_parameters()))
    experts = next(m for name, m in tuner.model.named_modules() if type(m).__name__ == "MixtralExperts")
    experts.act_fn.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        logits(tuner.model, DATA[0])
    assert list(dict(tuner.model.named_parameters())) == names
    assert type(experts).__name__ == "MixtralExperts"


def test_moments_are_those_of_what_the_module_itself_computes() -> None:
    """With writers that hand on the first channels, the experts' outputs are the weighted activations."""
    model = shallow("mixtral", tied=True)
    experts: Any = model.get_submodule(LAYER)
    with torch.no_grad():
        experts.down_proj.copy_(torch.eye(48, CHANNELS))
    watch = ExpertsWatch(experts)
    outputs = []
    for (rows, routed, weights), _ in watched(model):
        watch(rows, routed, weights)
        for number in range(EXPERTS):  # each expert by itself
            alone = experts(rows, routed, weights * (routed == number))
            outputs.append((number, alone[:, :CHANNELS].detach()))
    for number in range(EXPERTS):
        a = torch.cat([rows for which, rows in outputs if which == number])
        torch.testing.assert_close(watch.moments[number], a.mT @ a, atol=1e-4, rtol=1e-4)
        assert watch.num_tokens[number] == int(a.any(-1).sum())
    assert tokens_per_routed(model.config) == 2 and tokens_per_routed(shallow("llama", tied=True).config) == 1


def test_an_expert_that_saw_no_token_is_ordered_by_its_weights_alone() -> None:
    moment = torch.zeros(3, 3)
    shrink(moment, 0)
    assert torch.equal(moment, torch.eye(3))
    few, enough = 2 * torch.ones(3, 3), 2 * torch.ones(3, 3)
    shrink(few, 3)
    shrink(enough, 6)
    assert torch.equal(few, 2 * torch.ones(3, 3) + torch.eye(3)) and torch.equal(enough, 2 * torch.ones(3, 3))


def test_a_refit_brings_the_experts_nearer_to_the_base() -> None:
    base = [out for _, out in watched(shallow("mixtral", tied=True))]
    errors = {}
    for refits in (True, False):
        tuner = gated(refit=refits)
        tuner.calibrate(DATA)
        tuner.set_step(0, 0)
        if refits:
            tuner.refit(DATA)
        found = [out for _, out in watched(tuner.model)]
        errors[refits] = sum(float((a - b).square().sum()) for a, b in zip(found, base, strict=True))
    assert 0 < errors[True] < errors[False]
