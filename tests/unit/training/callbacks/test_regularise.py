"""The regularisers' gradients reach a step once, whatever the engine does with the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pat.errors import RunFailed
from pat.method.gate import Gate
from pat.method.operator import LowRankOperator
from pat.training.callbacks.regularise import Regularisers, loss_scale_of

SIZE, KEPT, RANK = 12, 8, 3
WEIGHTS = {"active": 0.3, "identity": 0.7}


class Site(nn.Module):
    """A gate behind an operator, as a writer of the stream has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.operator = Gate(SIZE, KEPT, lr_multiplier=5.0), LowRankOperator(SIZE, RANK)
        self.gate.set_step(1, 100)
        with torch.no_grad():
            self.operator.down.mul_(1.3)
            self.operator.scale.add_(0.1)

    def forward(self, y: Tensor) -> Tensor:
        return self.gate(y + self.operator.change(y))

    def arm(self, regularisers: Regularisers, **more: float) -> None:
        regularisers.arm(self, {"active": [self.gate], "identity": [self.operator]}, WEIGHTS, **more)

    def expected(self) -> dict[str, Tensor]:
        """Return the gradients of the weighted regularisers alone."""
        total = WEIGHTS["active"] * self.gate.active_loss() + WEIGHTS["identity"] * self.operator.identity_loss()
        parameters = {name: p for name, p in self.named_parameters() if name != "operator.scale"}
        return dict(zip(parameters, torch.autograd.grad(total, [*parameters.values()]), strict=True))


def gradients(site: Site, backward: Callable[[Site], None], *, armed: bool, **more: float) -> dict[str, Tensor]:
    regularisers = Regularisers()
    if armed:
        site.arm(regularisers, **more)
    backward(site)
    regularisers.check()
    regularisers.release()
    found = {name: p.grad.clone() for name, p in site.named_parameters() if p.grad is not None}
    site.zero_grad()
    return found


def batches(num: int) -> Iterator[Tensor]:
    yield from torch.randn(num, 4, SIZE, generator=torch.Generator().manual_seed(1))


def once(site: Site) -> None:
    site(next(batches(1))).square().mean().backward()


def accumulated(site: Site) -> None:
    for y in batches(4):
        (site(y).square().mean() / 4).backward()


def twice_forward(site: Site) -> None:
    sum(site(y).square().mean() for y in batches(2)).backward()


def recomputed(site: Site, *, reentrant: bool) -> None:
    y = next(batches(1)).requires_grad_()
    checkpoint(site, y, use_reentrant=reentrant).square().mean().backward()


@pytest.mark.parametrize(
    "backward",
    [
        once,
        accumulated,
        twice_forward,
        lambda site: recomputed(site, reentrant=False),
        lambda site: recomputed(site, reentrant=True),
    ],
    ids=["once", "accumulated", "two forward passes", "recomputed", "recomputed reentrantly"],
)
def test_the_gradients_are_added_once(backward: Callable[[Site], None]) -> None:
    site = Site()
    plain, armed = (gradients(site, backward, armed=armed) for armed in (False, True))
    expected = site.expected()
    assert expected.keys() == {"gate.weight", "operator.down", "operator.up"}
    assert all(value.abs().max() > 1e-4 for value in expected.values())
    for name, value in armed.items():
        torch.testing.assert_close(value - plain[name], expected.get(name, torch.zeros_like(value)))


def test_a_loss_scale_is_on_them_as_on_the_task() -> None:
    site = Site()
    plain, armed = (gradients(site, once, armed=armed, loss_scale=1024.0) for armed in (False, True))
    for name, value in site.expected().items():
        torch.testing.assert_close(armed[name] - plain[name], 1024.0 * value)


class Engine:
    """An engine that steps inside its `backward`, as DeepSpeed does."""

    def __init__(self, site: Site) -> None:
        self.optimizer = torch.optim.SGD(site.parameters(), lr=0.1)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_an_engine_that_steps_inside_backward_has_them() -> None:
    site = Site()
    before = {name: parameter.detach().clone() for name, parameter in site.named_parameters()}
    task, expected = gradients(site, once, armed=False), site.expected()
    regularisers = Regularisers()
    site.arm(regularisers)
    Engine(site).backward(site(next(batches(1))).square().mean())
    regularisers.check()
    assert regularisers.values()["identity"] > 0
    for name, parameter in site.named_parameters():
        step = task[name] + expected.get(name, torch.zeros_like(parameter))
        torch.testing.assert_close(before[name] - parameter, 0.1 * step)


def test_gradients_that_do_not_arrive_end_the_run() -> None:
    site, regularisers = Site(), Regularisers()
    site.arm(regularisers)
    next(batches(1)).requires_grad_().sum().backward()  # of something else
    with pytest.raises(RunFailed, match="did not reach"):
        regularisers.check()


def test_a_hard_gate_is_let_go_of() -> None:
    site, regularisers = Site(), Regularisers()
    site.arm(regularisers)
    once(site)
    site.gate.set_step(100, 100)
    site.arm(regularisers)
    site.zero_grad()
    once(site)
    regularisers.check()
    assert site.gate.weight is not None and site.gate.weight.grad is not None
    assert not site.gate.weight.grad.any()
    assert regularisers.values()["active"] == 0


def test_the_loss_scale_is_that_of_the_engine() -> None:
    class Scaler:
        def get_scale(self) -> float:
            return 65536.0

    class Accelerated:
        scaler: Scaler | None = Scaler()

    class DeepSpeeds:
        class optimizer:
            loss_scale = 256.0

    assert loss_scale_of(Accelerated()) == 65536.0
    assert loss_scale_of(DeepSpeeds()) == 256.0
    assert loss_scale_of(torch.optim.SGD([torch.zeros(1)], 0.1)) == loss_scale_of(None) == 1.0
