"""Calibration: what it measures, on which tokens, and that it leaves no trace but its result."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import PAD_ID, batch, build
from tiny_training import attach, largest_difference, logits, tuner_of
from torch import Tensor, distributed

from pat.errors import PatError
from pat.families import get_family
from pat.surgery.residual import map_residual_stream
from pat.tuner.calibration import DEFAULT_TOKENS_PER_CHANNEL, StreamStatistics, real_tokens, watch_inputs

HIDDEN, KEPT = 48, 36

FLOAT32 = 1e-5
"""Relative: the stream is read in float32."""


STREAM = map_residual_stream(
    get_family("llama"), [n for n, _ in build("llama", tied=False).named_parameters()], tied=False
)


def batches() -> list[dict[str, Tensor]]:
    return [batch(seed=seed, batch_size=4) for seed in (3, 4)]


def read_inputs(model: PeftModel, inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What every branch and the final norm read, `(tokens, d)`, each token scaled to a mean square of 1."""
    base = model.base_model.model
    family = get_family(base.config.model_type)
    read: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
            read.setdefault(name, []).append(args[0].double())

        return hook

    handles = []
    for index, layer in enumerate(base.model.layers):
        for kind, branch in (("attention", family.attention), ("mlp", family.feed_forward[-1])):
            module = branch.pre_norm or branch.readers[0]
            handles.append(layer.get_submodule(module).register_forward_pre_hook(keep(f"{index}.{kind}")))
    handles.append(base.model.norm.register_forward_pre_hook(keep("final")))
    result: dict[str, list[Tensor]] = {}
    with torch.no_grad(), model.disable_adapter():
        for each in inputs:
            read.clear()
            model(**each)
            for name, (hidden,) in read.items():
                rows = [
                    hidden[row, position]
                    for row in range(hidden.shape[0])
                    for position in range(hidden.shape[1])
                    if each["attention_mask"][row, position]
                ]
                result.setdefault(name, []).extend(row / row.square().mean().sqrt() for row in rows)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(rows) for name, rows in result.items()}


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral"])
def test_the_basis_is_the_pca_of_what_the_stream_s_readers_read(family: str) -> None:
    model = attach(build(family, tied=False), rotation="pca")
    order = tuner_of(model).calibrate(batches())
    inputs = read_inputs(model, batches())
    assert len(inputs) == 2 * 3 + 1
    num_tokens = len(inputs["final"])
    moment = sum(torch.einsum("ti,tj->ij", rows, rows) for rows in inputs.values()) / num_tokens
    rotated = order.basis.mT @ moment @ order.basis
    energy = rotated.diagonal()
    assert (rotated - torch.diag(energy)).abs().max() < FLOAT32 * energy.max()
    assert (energy.diff() <= FLOAT32 * energy.max()).all()
    assert order.energy_kept == pytest.approx((energy[:KEPT].sum() / energy.sum()).item(), rel=1e-4)
    assert torch.equal(tuner_of(model).mask().basis, order.basis.float())


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_without_a_rotation_importance_is_energy_times_what_the_readers_make_of_it(family: str) -> None:
    model = attach(build(family, tied=True), rotation="auto")
    order = tuner_of(model).calibrate(batches())
    base, record = model.base_model.model, get_family(family)
    inputs = read_inputs(model, batches())
    importance = torch.zeros(HIDDEN, dtype=torch.float64)
    with model.disable_adapter(), torch.no_grad():
        for name, rows in inputs.items():
            energy = rows.square().mean(0)
            if name == "final":
                weights, norm = [base.model.embed_tokens.weight], base.model.norm
            else:
                index, kind = name.split(".")
                layer = base.model.layers[int(index)]
                branch = record.attention if kind == "attention" else record.feed_forward[0]
                weights = [layer.get_submodule(reader).weight for reader in branch.readers]
                norm = layer.get_submodule(branch.pre_norm) if branch.pre_norm else None
            gain = 1.0 if norm is None else norm.weight.double() + record.gain_offset
            score = energy * torch.as_tensor(gain).square() * sum(w.double().square().sum(0) for w in weights)
            importance += score / score.sum()
    kept = set(importance.topk(KEPT).indices.tolist())
    assert set((order.prior > 0).nonzero().flatten().tolist()) == kept
    assert order.energy_kept == pytest.approx(
        (importance.sort(descending=True).values[:KEPT].sum() / 7).item(), rel=1e-4
    )


def tokens_counted(inputs: dict[str, Tensor]) -> Tensor:
    """Return for each token whether it is measured."""
    given = {name: inputs[name] for name in ("attention_mask", "position_ids") if name in inputs}
    counted = real_tokens(build("llama", tied=False), inputs["input_ids"], given)
    seen: list[Tensor] = []
    assert watch_inputs(build("llama", tied=False), {"model.norm": seen.append}, [inputs], 10_000) == counted.sum()
    assert len(seen[0]) == counted.sum()
    return counted


def test_real_tokens_are_told_from_padding_by_the_mask_or_by_what_a_row_ends_with() -> None:
    one = batch(seed=3, batch_size=2)
    real = one["attention_mask"].bool()
    assert not real.all()
    assert torch.equal(tokens_counted(one), real)
    assert torch.equal(tokens_counted({"input_ids": one["input_ids"]}), real)
    left = batch(seed=3, batch_size=2, padding_side="left")
    assert torch.equal(tokens_counted(left), left["attention_mask"].bool())
    inner = {"input_ids": one["input_ids"].clone()}
    inner["input_ids"][0, 3] = PAD_ID  # a token like any other in the middle of a text
    assert tokens_counted(inner)[0].all()
    # Two packed texts of 9 and 11 tokens, filled up to 24 by a trainer's pad_to_multiple_of.
    positions = torch.cat([torch.arange(9), torch.arange(11), torch.zeros(4, dtype=torch.long)]).unsqueeze(0)
    packed = {"input_ids": one["input_ids"][:1], "position_ids": positions}
    assert tokens_counted(packed).tolist() == [[True] * 20 + [False] * 4]


def test_padding_does_not_count() -> None:
    one = batch(seed=3, batch_size=2)
    garbled = {name: tensor.clone() for name, tensor in one.items()}
    garbled["input_ids"][garbled["attention_mask"] == 0] = 77
    first, second = (tuner_of(attach(build("llama", tied=False), rotation="pca")) for _ in range(2))
    assert torch.equal(first.calibrate([one]).basis, second.calibrate([garbled]).basis)


@pytest.mark.parametrize(("budget", "expected"), [(100, 2), (96, 1), (None, 2)])
def test_reading_stops_at_the_budget(budget: int | None, expected: int) -> None:
    """A full batch of 4 x 24 holds 96 tokens; by default 4 tokens a channel are read."""
    assert DEFAULT_TOKENS_PER_CHANNEL * HIDDEN == 2 * 96
    read = 0

    def endless() -> Iterator[dict[str, Tensor]]:
        nonlocal read
        while True:
            read += 1
            yield {"input_ids": torch.randint(4, 128, (4, 24))}

    order = tuner_of(attach(build("llama", tied=False), rotation="pca", calibration_tokens=budget)).calibrate(endless())
    assert read in (expected, expected + 1)  # whether the batch after the last is fetched is the loop's affair
    assert order.num_tokens == 96 * expected


@pytest.mark.parametrize(
    ("family", "what"), [("llama", "rotation of 48 channels"), ("olmo2", "order of importance of 48 channels")]
)
def test_a_calibration_on_fewer_tokens_than_channels_is_warned_about(
    family: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    def calibrate(length: int) -> None:
        tuner_of(attach(build(family, tied=False))).calibrate([batch(seed=3, batch_size=1, length=length)])

    calibrate(48)
    assert not caplog.messages
    calibrate(47)
    (message,) = caplog.messages
    assert f"The {what} stands on 47 calibration tokens" in message
    assert "give more rows" in message and "rotation='none'" in message


@pytest.mark.parametrize("tolerance", [0.4, 1.5])
def test_a_final_norm_with_gains_of_zero_is_calibrated_and_merged_exactly(tolerance: float) -> None:
    base = build("llama", tied=True)
    with torch.no_grad():
        base.model.norm.weight[[3, 17]] = 0.0
    expected = logits(base)
    model = attach(base, rotation="pca", gain_tolerance=tolerance)
    tuner = tuner_of(model)
    order = tuner.calibrate(batches())
    assert order.pinned[[3, 17]].all()
    factor = tuner.mask().head_factor
    assert factor.isfinite().all() and torch.equal(factor[order.pinned], torch.ones(int(order.pinned.sum())))
    assert logits(model).isfinite().all() and expected.isfinite().all()
    tuner.set_step(1, 1)
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(model), atol=1e-4, rtol=0)


def test_gains_of_zero_before_every_reader_leave_an_order_of_importance() -> None:
    base = build("olmo2", tied=False)
    with torch.no_grad():
        base.model.norm.weight.zero_()
    order = tuner_of(attach(base, rotation="auto")).calibrate(batches())
    assert order.prior.isfinite().all() and int((order.prior > 0).sum()) == KEPT


@pytest.mark.parametrize("training", [True, False])
def test_calibration_leaves_no_trace(training: bool) -> None:
    model = attach(build("llama", tied=False), rotation="pca", lora_dropout=0.1).train(training)
    model.base_model.model.model.layers[0].train(not training)
    modes = [module.training for module in model.modules()]
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "pat_mask" not in name}
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    state = torch.get_rng_state()
    tuner_of(model).calibrate(batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.base_model.active_adapters == ["default"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_trained_adapter_does_not_influence_the_basis() -> None:
    """The basis belongs to the base: whatever an adapter adds is measured out."""
    bases = []
    for scale in (0.0, 0.3):
        model = attach(build("llama", tied=False), rotation="pca")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "scale" in name:
                    parameter.add_(scale)
        bases.append(tuner_of(model).calibrate(batches()).basis)
    assert torch.equal(*bases)


PADDING = {name: torch.zeros(1, 4, dtype=torch.long) for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("data", [[], [PADDING]], ids=["no batch", "only padding"])
def test_data_without_tokens_is_an_error(data: list[dict[str, Tensor]]) -> None:
    model = attach(build("llama", tied=False), rotation="pca").train()
    with pytest.raises(PatError, match=r"no tokens.*input_ids"):
        tuner_of(model).calibrate(data)
    assert not tuner_of(model).mask().calibrated


def test_batches_without_input_ids_are_an_error_that_says_so() -> None:
    model = attach(build("llama", tied=False), rotation="pca").train()
    expected = logits(model)
    with pytest.raises(PatError, match=r"input_ids.*'prompt_ids'"):
        tuner_of(model).calibrate([{"prompt_ids": torch.zeros(1, 4, dtype=torch.long)}])
    assert model.training and torch.equal(logits(model), expected)
    assert tuner_of(model).needs_calibration()


@pytest.mark.parametrize("step", [1, 9, 10])
def test_calibration_after_the_first_step_is_refused(step: int) -> None:
    model = attach(build("llama", tied=False), rotation="pca")
    tuner_of(model).set_step(step, 10)
    with pytest.raises(PatError, match=f"step {step}.*before training"):
        tuner_of(model).calibrate(batches())


@pytest.mark.parametrize(
    ("family", "rotation", "expected"),
    [("llama", "none", False), ("llama", "pca", True), ("llama", "auto", True), ("olmo2", "auto", True)],
)
def test_who_needs_a_calibration(family: str, rotation: str, expected: bool) -> None:
    tuner = tuner_of(attach(build(family, tied=False), rotation=rotation))
    assert tuner.needs_calibration() == expected
    if expected:
        tuner.calibrate(batches())
        assert not tuner.needs_calibration()


def test_calibrating_again_before_training_replaces_the_first() -> None:
    again = tuner_of(attach(build("llama", tied=True), rotation="pca"))
    again.calibrate(batches()[:1])
    again.calibrate(batches())
    once = tuner_of(attach(build("llama", tied=True), rotation="pca"))
    once.calibrate(batches())
    for name in ("basis", "prior", "pinned", "head_factor"):
        assert torch.equal(getattr(again.mask(), name), getattr(once.mask(), name)), name


@pytest.mark.parametrize("enabled", [True, False])
def test_disabled_adapters_stay_disabled(enabled: bool) -> None:
    model = attach(build("llama", tied=True), rotation="pca")
    tuner = tuner_of(model)
    if not enabled:
        tuner.disable_adapter_layers()
    tuner.calibrate(batches())
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert {layer.disable_adapters for layer in layers} == {not enabled}


def forward_arguments(model: PeftModel, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the base model is called with when the adapter is calibrated on `inputs`."""
    seen: dict[str, Any] = {}
    base = model.base_model.model
    handle = base.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    tuner_of(model).calibrate([inputs])
    handle.remove()
    return seen


def test_packed_rows_are_told_apart_by_their_position_ids() -> None:
    """transformers does so only where there is no attention mask: none may be invented."""
    ids = batch(seed=3, batch_size=4)["input_ids"].clamp_min(4).flatten().unsqueeze(0)  # no padding
    length = ids.shape[1] // 4
    packed = {"input_ids": ids, "position_ids": torch.arange(length).repeat(4).unsqueeze(0)}
    rows = {"input_ids": ids.view(4, length)}
    first, second = (attach(build("llama", tied=False), rotation="pca") for _ in range(2))
    assert "attention_mask" not in forward_arguments(first, packed)
    assert "position_ids" not in forward_arguments(second, rows)
    moments = []
    for model in (first, second):
        mask = tuner_of(model).mask()
        moments.append(mask.basis @ torch.diag(mask.prior) @ mask.basis.mT)
    torch.testing.assert_close(*moments, atol=1e-3, rtol=0)


def test_sites_on_other_devices_are_added_on_the_first_one_s() -> None:
    model = attach(build("gemma3_text", tied=False))
    stream = tuner_of(model).residual_stream
    rotation = StreamStatistics(model, stream, full=True)
    rotation.num_tokens = 3
    rotation.record("", torch.randn(3, HIDDEN, device="meta"))
    rotation.record("", torch.randn(3, HIDDEN))
    assert rotation.covariance().device.type == "meta"
    importance = StreamStatistics(model, stream, full=False)
    importance.num_tokens = 3
    for index, site in enumerate(importance._sites()):
        importance.record(site, torch.randn(3, HIDDEN, device="meta" if index == 0 else "cpu"))
    assert importance.importance(model.base_model.model.get_parameter).device.type == "meta"


def calibrate_in_a_process(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    tuner = tuner_of(attach(build("llama", tied=True), rotation="pca"))
    order = tuner.calibrate([batch(seed=0, batch_size=4)] * 4)
    mask = tuner.mask()
    found = [mask.prior, mask.pinned, mask.basis, mask.head_factor, order.prior, order.pinned, order.basis]
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_all_processes_of_a_distributed_run_measure_together_what_one_would_alone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # a new interpreter would import everything again
    processes = [context.Process(target=calibrate_in_a_process, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = tuner_of(attach(build("llama", tied=True), rotation="pca"))
    alone.calibrate([batch(seed=0, batch_size=4)] * 4)
    torch.testing.assert_close(first[2], alone.mask().basis)


@pytest.mark.parametrize("rotation", ["auto", "none"])
@pytest.mark.parametrize("tied", [True, False])
def test_gains_of_zero_are_no_obstacle(tied: bool, rotation: str) -> None:
    """Some channels of the final norm, and a branch that reads nothing: finite when calibrated, exact when merged."""
    base = build("llama", tied=tied)
    with torch.no_grad():
        base.model.norm.weight[[3, 7, 20]] = 0.0
        base.model.layers[1].input_layernorm.weight.zero_()
    model = attach(base, rotation=rotation)
    tuner_of(model).calibrate([batch()])
    tuner_of(model).set_step(1, 1)
    assert largest_difference(logits(model), logits(model.merge_and_unload())) < 2e-5
