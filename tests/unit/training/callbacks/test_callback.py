"""PatCallback in a stock Trainer: when the mask moves, what the regularisers add, and what calibration leaves alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, tiny_tokenizer
from tiny_training import Examples, StopAt, arguments, attach, losses, train, tuner_of
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from pat.errors import PatError
from pat.method.schedule import offset, temperature
from pat.training.callbacks import callback
from pat.training.callbacks.callback import PatCallback
from pat.tuner import PatModel

KEPT = 36


class Recorder(TrainerCallback):
    """Calls a function at chosen events; later in the list than PatCallback, so after it."""

    def __init__(self, **handlers: Callable[[nn.Module, Any], None]) -> None:
        for event, handler in handlers.items():
            setattr(self, event, self._bind(handler))

    @staticmethod
    def _bind(handler: Callable[[nn.Module, Any], None]) -> Any:
        return lambda args, state, control, **kwargs: handler(kwargs["model"], state)


def llama(*, tied: bool = True, **fields: Any) -> Any:
    return attach(build("llama", tied=tied), **fields)


# -- the mask's schedule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_mask_follows_the_optimizer_steps_not_the_micro_batches(accumulation: int) -> None:
    model = llama(rotation="none", milestone=0.5, operator_lr_multiplier=1.0, use_rslora=False)
    mask, seen = tuner_of(model).mask(), []

    def forward(_module: nn.Module, _args: Any) -> None:
        seen.append((mask.step, mask.hardened, *mask.gate_schedule.tolist()))

    handle = model.base_model.model.model.register_forward_pre_hook(forward)
    train(model, max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, num_examples=48)
    handle.remove()
    steps = [step for step in range(8) for _ in range(accumulation)]
    assert len(seen) == len(steps)
    for step, (mask_step, hardened, tau, beta) in zip(steps, seen, strict=True):
        assert hardened == (step >= 4)
        assert mask_step == min(step, 4)
        if step < 4:
            assert tau == pytest.approx(temperature(step, 4), rel=1e-6)
            assert beta == pytest.approx(offset(step, 4), abs=1e-7)


@pytest.mark.parametrize(("milestone", "max_steps", "s0"), [(1 / 3, 6, 2), (0.25, 10, 2), (1.0, 3, 3), (0.2, 5, 1)])
def test_the_milestone_is_the_rounded_share_of_all_steps(milestone: float, max_steps: int, s0: int) -> None:
    model = llama(rotation="none", milestone=milestone)
    hard_at = []
    recorder = Recorder(
        on_step_end=lambda model, state: hard_at.append(state.global_step) if tuner_of(model).mask().hardened else None
    )
    train(model, max_steps=max_steps, callbacks=[recorder], num_examples=40)
    assert hard_at == list(range(s0, max_steps + 1))
    assert len(tuner_of(model).mask().keep_indices) == KEPT


@pytest.mark.parametrize(("milestone", "warned"), [(0.1, True), (0.2, False), (0.0, False)])
def test_a_milestone_that_rounds_to_step_zero_is_warned_about(
    milestone: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    train(llama(rotation="pca", milestone=milestone), max_steps=3)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("0.1 of 3 optimizer steps rounds to step 0" in message for message in messages) == warned


def test_a_milestone_at_step_zero_with_nothing_to_choose_by_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PatError, match=r"0\.1 of 3 optimizer steps.*train for 6 steps or more"):
        train(llama(rotation="none", milestone=0.1), max_steps=3)
    assert not [message for message in caplog.messages if "rounds to step 0" in message]


@pytest.mark.parametrize("rotation", ["none", "pca"])
@pytest.mark.parametrize("fields", [{"learning_rate": 1e-6}, {"learning_rate": 1e-2}, {"weight_decay": 0.5}], ids=str)
def test_hardening_depends_on_no_learning_rate_and_the_mask_never_changes_again(
    fields: dict[str, float], rotation: str
) -> None:
    model = llama(rotation=rotation, milestone=0.4)
    mask = tuner_of(model).mask()
    kept: list[Tensor] = []
    weights: list[Tensor] = []

    def record(_model: nn.Module, _state: Any) -> None:
        weights.append(mask.weight.detach().clone())
        kept.append(mask.keep.clone())

    train(model, max_steps=5, callbacks=[Recorder(on_step_end=record)], num_examples=20, **fields)
    assert [int(each.sum()) for each in kept] == [48, KEPT, KEPT, KEPT, KEPT]
    assert all(torch.equal(each, kept[1]) for each in kept[2:])
    score = (mask.lr_multiplier * weights[1] + mask.prior).masked_fill(mask.pinned, torch.inf).tolist()
    best = sorted(range(48), key=lambda index: (-score[index], index))[:KEPT]
    assert kept[1].nonzero().flatten().tolist() == sorted(best)
    moved = [float((b - a).abs().max()) for a, b in pairwise(weights)]
    assert all(moved)  # weight decay and Adam's momentum go on with them: it is the mask that must not follow


def test_milestone_zero_needs_a_prior() -> None:
    with pytest.raises(PatError, match="milestone at step 0"):
        train(llama(rotation="none", milestone=0.0))
    model = llama(rotation="pca", milestone=0.0)
    first = []
    train(model, callbacks=[Recorder(on_step_begin=lambda m, s: first.append(tuner_of(m).mask().hardened))])
    assert first == [True, True, True]
    model.merge_and_unload()


def test_a_best_checkpoint_is_only_picked_from_the_milestone_on(tmp_path: Path) -> None:
    """Whatever the metric says: the best one, of a soft mask, would bring back a model that cannot be merged."""
    model = llama(rotation="none", milestone=0.5, operator_lr_multiplier=1.0, use_rslora=False)
    trainer = train(
        model,
        max_steps=4,
        learning_rate=1e-2,
        output_dir=tmp_path,
        eval_dataset=Examples(4, seed=7),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated[0] == max(evaluated)
    assert int(trainer.state.best_model_checkpoint.rpartition("-")[2]) == 2 + evaluated[1:].index(max(evaluated[1:]))
    assert tuner_of(model).mask().hardened
    model.merge_and_unload()


# -- the regularisers --------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts how often the tuner's methods are called."""
    counted = {"calibrate": 0}
    for name in counted:
        original = getattr(PatModel, name)

        def counting(self: PatModel, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            counted[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(PatModel, name, counting)
    return counted


class AtStep(TrainerCallback):
    """Looks at the gradients that the optimizer is given, and at what the regularisers' ought to be."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.expected: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        config, losses = model.peft_config["default"], tuner_of(model).regularizers()
        total = config.active_loss_weight * losses["active"] + config.identity_loss_weight * losses["identity"]
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
        self.expected.append({n: g for (n, _), g in zip(named, found, strict=True) if g is not None})


def step_with(active: float, identity: float, **fields: Any) -> AtStep:
    """Take one step, and return what was seen of it."""
    torch.manual_seed(0)  # of the operators
    model = llama(rotation="none", milestone=1.0, active_loss_weight=active, identity_loss_weight=identity)
    with torch.no_grad():
        for operator in tuner_of(model).operators().values():
            operator.down.mul_(1.2)  # away from the identity loss's zero
    seen = AtStep()
    train(model, max_steps=1, callbacks=[seen], **fields)
    return seen


@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_is_added_to_the_gradients_are_those_of_both_weighted_regularisers(accumulation: int) -> None:
    fields = {"max_grad_norm": 0.0, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 1}
    without, found = (step_with(*weights, **fields) for weights in ((0.0, 0.0), (0.3, 0.7)))
    expected = found.expected[0]
    assert sum(1 for name in expected if "pat_hsm" in name) == 2 * 7
    assert sum(1 for name in expected if "pat_mask" in name) == 1
    assert sum(float(g.square().sum()) for g in expected.values()) ** 0.5 > 0.1
    for name, gradient in found.gradients[0].items():
        added = gradient - without.gradients[0].get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(added, expected.get(name, torch.zeros_like(added)), atol=2e-5, rtol=1e-4)


def test_the_regularisers_gradients_are_clipped_with_those_of_the_task() -> None:
    (gradients,) = step_with(0.3, 0.7, max_grad_norm=1e-3).gradients
    assert sum(float(g.square().sum()) for g in gradients.values()) ** 0.5 == pytest.approx(1e-3, rel=1e-2)


def test_regularisers_are_logged_apart_from_the_loss() -> None:
    trainer = train(llama(rotation="none", milestone=1.0, identity_loss_weight=1e3), max_steps=3)
    plain = train(llama(rotation="none", milestone=1.0, identity_loss_weight=0.0), max_steps=3)
    assert losses(trainer)[0] == losses(plain)[0]  # a weight of 1000 is not in the logged loss
    entries = [entry for entry in trainer.state.log_history if "pat/identity_loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert entries[0]["pat/active_loss"] == KEPT


def test_the_logged_count_is_that_of_equation_9() -> None:
    """Channels with a positive proxy weight plus prior, pinned ones included, whatever their gate is at that step."""
    model = llama(rotation="pca", milestone=1.0)
    counted = []

    def count(_model: nn.Module, _state: Any) -> None:
        mask = tuner_of(model).mask()
        positive = (mask.lr_multiplier * mask.weight + mask.prior > 0) | mask.pinned
        counted.append(int(positive.sum()))

    trainer = train(model, max_steps=6, learning_rate=2e-2, callbacks=[Recorder(on_step_end=count)], num_examples=24)
    assert tuner_of(model).mask().pinned.any()
    logged = [entry["pat/active_channels"] for entry in trainer.state.log_history if "pat/active_channels" in entry]
    assert logged == [*counted[:-1], KEPT] and len(set(counted)) > 1


class Reporter(TrainerCallback):
    """Keeps the logs it is given, as the callbacks of the console and of the trackers do."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_callbacks_that_come_later_see_the_regularisers_in_the_logs() -> None:
    reporter, console = Reporter(), Reporter()
    train(
        llama(rotation="none", milestone=0.5),
        max_steps=2,
        callbacks=[reporter],
        before=lambda trainer: trainer.add_callback(console),
    )
    for logs in (reporter.logs, console.logs):
        steps = [entry for entry in logs if "loss" in entry]
        assert len(steps) == 2
        assert all({"pat/active_loss", "pat/identity_loss", "pat/active_channels"} <= entry.keys() for entry in steps)
        assert not any(name.startswith("pat/") for entry in logs if "train_runtime" in entry for name in entry)


def test_a_frozen_mask_trains_the_operators_only() -> None:
    model = llama(rotation="none", mask="frozen", milestone=0.5)
    train(model, max_steps=4)
    assert not any("pat_mask" in name for name, _ in model.named_parameters())
    assert tuner_of(model).mask().keep_indices.tolist() == list(range(48 - KEPT, 48))
    model.merge_and_unload()


# -- calibration -------------------------------------------------------------------------------------------------------


def trained_on(model: nn.Module, **fields: Any) -> tuple[list[list[int]], Tensor]:
    """Train; return the rows in the order in which training (not calibration) saw them, and the first random state."""
    rows: list[list[int]] = []
    states: list[Tensor] = []

    def forward(module: nn.Module, _args: Any, kwargs: dict[str, Tensor]) -> None:
        if module.training:
            rows.extend(kwargs["input_ids"].tolist())

    handle = model.register_forward_pre_hook(forward, with_kwargs=True)
    train(model, callbacks=[Recorder(on_step_begin=lambda m, s: states.append(torch.get_rng_state()))], **fields)
    handle.remove()
    return rows, states[0]


class Stream(IterableDataset):
    """The examples one after the other, anew for every iterator."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        examples = Examples(24)
        return (examples[index] for index in range(len(examples)))


@pytest.mark.parametrize("dataset", [None, Stream()], ids=["shuffled", "stream"])
def test_calibration_disturbs_neither_the_order_of_the_data_nor_the_random_state(
    calls: dict[str, int], dataset: Any
) -> None:
    fields = {"dataset": dataset, "max_steps": 4}
    torch.manual_seed(3)
    without, state = trained_on(llama(rotation="none", lora_dropout=0.1), **fields)
    assert calls["calibrate"] == 0
    torch.manual_seed(3)
    calibrated, calibrated_state = trained_on(llama(rotation="pca", lora_dropout=0.1), **fields)
    assert calls["calibrate"] == 1
    assert len(without) == 16
    assert calibrated == without
    assert torch.equal(calibrated_state, state)


def test_a_calibration_made_before_is_kept(calls: dict[str, int]) -> None:
    model = llama(rotation="pca")
    tuner_of(model).calibrate([{"input_ids": Examples(8, seed=9).ids}])
    basis = tuner_of(model).mask().basis.clone()
    train(model)
    assert calls["calibrate"] == 1
    assert torch.equal(tuner_of(model).mask().basis, basis)


def test_what_a_calibration_stands_on_is_in_the_log() -> None:
    trainer = train(llama(rotation="pca", calibration_tokens=100))
    (entry,) = [entry for entry in trainer.state.log_history if "pat/calibration_tokens" in entry]
    assert entry["pat/calibration_tokens"] == 128 and 0.5 < entry["pat/energy_kept"] < 1 and entry["step"] == 0


def test_calibration_from_a_text_file(tmp_path: Path, calls: dict[str, int]) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    model = llama(rotation="pca", calibration=str(text))
    with pytest.raises(PatError, match="processing_class"):
        train(model)
    assert not tuner_of(model).mask().calibrated

    def with_tokenizer(trainer: Trainer) -> None:
        trainer.processing_class = trainer.callback_handler.processing_class = tiny_tokenizer()

    train(model, before=with_tokenizer)
    assert tuner_of(model).mask().calibrated
    assert tuner_of(model).mask().prior.any()


def test_a_missing_calibration_file_is_an_error() -> None:
    with pytest.raises(PatError, match=r"nowhere\.txt"):
        train(llama(rotation="pca", calibration="/nowhere.txt"))


# -- what the trainer is for -------------------------------------------------------------------------------------------


class Columns(Examples):
    """The examples, with the columns of another trainer's data."""

    def __init__(self, *names: str) -> None:
        super().__init__(16)
        self.column_names = list(names)


@pytest.mark.parametrize(
    ("columns", "milestone", "kind"),
    [
        (("prompt_ids", "chosen_ids", "rejected_ids"), 0.5, "preferences"),
        (("prompt_ids", "completion_ids", "label"), 0.5, "preferences"),
        (("prompt", "answer"), 0.5, "rewards"),
        (("input_ids", "completion_mask"), 0.5, None),
        (("prompt", "completion"), 0.5, None),
        (("prompt", "rejected"), 0.0, None),  # hard already
    ],
)
def test_training_from_preferences_or_rewards_on_a_soft_mask_is_warned_about_once(
    columns: tuple[str, ...], milestone: float, kind: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama(rotation="pca", milestone=milestone)
    tuner_of(model).calibrate([{"input_ids": Examples(8, seed=9).ids}])
    if milestone == 0:
        tuner_of(model).set_step(0, 0)
    train(model, max_steps=4, dataset=Columns(*columns), remove_unused_columns=False)
    warned = [message for message in caplog.messages if "soft mask" in message]
    assert len(warned) == (kind is not None)
    if kind is not None:
        assert f"Training from {kind}" in warned[0] and "until step 2" in warned[0] and "fine-tuning first" in warned[0]


@pytest.mark.parametrize("quantised", [False, True])
def test_a_second_gpu_in_the_same_process_is_refused(tmp_path: Path, quantised: bool) -> None:
    """transformers would take it unasked, by nn.DataParallel; quantised models it leaves alone."""
    args = TrainingArguments(**arguments(tmp_path))
    args._n_gpu = 2
    model = llama(rotation="none")
    model.base_model.model.is_loaded_in_4bit = quantised
    make = lambda: Trainer(model=model, args=args, train_dataset=Examples(4), callbacks=[PatCallback()])  # noqa: E731
    if quantised:
        make()
        return
    with pytest.raises(PatError, match=r"2 GPUs in one process.*nn\.DataParallel.*CUDA_VISIBLE_DEVICES=0.*torchrun"):
        make()


# -- misuse ------------------------------------------------------------------------------------------------------------


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PatError, match=r"LlamaForCausalLM without a PAT adapter.*get_peft_model"):
        train(build("llama", tied=True))


def test_adapters_cast_to_half_precision_are_put_right_before_the_optimizer_is_made() -> None:
    """As TRL does with the trainable parameters of quantised models."""
    model = llama(rotation="pca")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    train(model)
    ours = {p.dtype for n, p in model.named_parameters() if "pat_mask" in n or "pat_hsm" in n}
    assert ours == {torch.float32}


def test_a_calibration_cast_to_half_precision_is_an_error_before_any_step() -> None:
    model = llama(rotation="pca")
    tuner_of(model).calibrate([{"input_ids": Examples(8, seed=9).ids}])
    model.to(torch.bfloat16)
    with pytest.raises(PatError, match=r"basis.*bfloat16; expected float32"):
        train(model)


def test_the_gates_of_the_mlps_are_looked_after_alike() -> None:
    fields = {"axes": ["mlp"], "pruned_intermediate_size": 50}
    model = llama(**fields)
    tuner_of(model).calibrate([{"input_ids": Examples(8, seed=9).ids}])
    model.to(torch.bfloat16)
    with pytest.raises(PatError, match=r"prior.*bfloat16; expected float32"):
        train(model)
    model = llama(**fields).to(torch.bfloat16)
    train(model)
    for gate in tuner_of(model).gates().values():
        assert {buffer.dtype for buffer in gate.buffers()} == {torch.float32, torch.bool, torch.int64}
        assert gate.weight.dtype == torch.float32 and gate.reconstruction.any()


def test_a_second_adapter_of_its_own_is_no_copy_of_the_first() -> None:
    """Its gates would be hard before its training, on the channels of another."""
    model = llama(axes=["mlp"], pruned_intermediate_size=50)
    train(model)
    model.add_adapter("second", dataclasses.replace(tuner_of(model).pat_config()))
    train(model)  # of the first one again
    assert not any(gate.hardened for gate in tuner_of(model).all_gates("second"))


def test_only_what_is_cut_is_logged() -> None:
    history = {}
    for axes in (["mlp"], ["hidden"], ["mlp", "hidden"]):
        trainer = train(llama(axes=axes, pruning_ratio=0.2))
        history[*axes] = {name for entry in trainer.state.log_history for name in entry if "active_" in name}
    assert history["mlp",] == {"pat/active_loss", "pat/active_mlp_channels"}
    assert history["hidden",] == {"pat/active_loss", "pat/active_channels"}
    assert history["mlp", "hidden"] == history["mlp",] | history["hidden",]


def test_a_calibration_by_hand_serves_the_refit_where_the_data_cannot_be_read() -> None:
    model = llama(axes=["mlp"], pruned_intermediate_size=50)
    tuner_of(model).calibrate([{"input_ids": Examples(8, seed=9).ids}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback, "calibration_batches", None)  # which would raise
        train(model)
    assert all(gate.is_fitted for gate in tuner_of(model).gates().values())


def test_a_cast_of_the_whole_model_before_the_calibration_leaves_no_trace() -> None:
    model = llama(rotation="pca").to(torch.bfloat16)
    train(model)
    mask = tuner_of(model).mask()
    assert {buffer.dtype for buffer in mask.buffers()} == {torch.float32, torch.bool, torch.int64}
    torch.testing.assert_close(mask.basis.mT @ mask.basis, torch.eye(48), atol=1e-5, rtol=0)


def test_the_callback_never_stops_a_run_and_never_compacts() -> None:
    model = llama(milestone=0.25)
    trainer = train(model, max_steps=4)
    assert trainer.state.global_step == 4
    assert model.base_model.model.config.hidden_size == 48
    stopped = train(llama(), max_steps=4, callbacks=[StopAt(2)])
    assert stopped.state.global_step == 2


def test_one_callback_can_serve_one_run_after_the_other(tmp_path: Path) -> None:
    callback = PatCallback()
    for family, milestone in (("llama", 0.25), ("qwen2", 0.75)):
        model = attach(build(family, tied=True), rotation="none", milestone=milestone)
        args = TrainingArguments(**arguments(tmp_path, max_steps=4))
        Trainer(model=model, args=args, train_dataset=Examples(16), callbacks=[callback]).train()
        assert tuner_of(model).mask().milestone_step == 4 * milestone
