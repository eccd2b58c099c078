"""Stock trainers end with a model that can be merged: Trainer, SFT and DPO, whatever the options of a training."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from tiny_models import shallow, tiny_tokenizer
from tiny_training import (
    Examples,
    arguments,
    attach,
    largest_difference,
    logits,
    losses,
    pat_config,
    train,
    tuner_of,
)
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from pat.training.callbacks.callback import PatCallback
from pat.training.callbacks.regularise import Regularisers

disable_progress_bars()

PARITY = 1e-4

ACCUMULATED = 1e-5
"""Losses and gradients of a batch of eight against four times two: sums in another order, five steps on."""

STEPS = 4

PREFERENCES = [{"prompt": f"say {i}", "chosen": f" yes {i}", "rejected": " no no"} for i in range(16)]
COMPLETIONS = [{"prompt": f"say {i}", "completion": f" yes {i}"} for i in range(16)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"hi {i}"},
            {"role": "assistant", "content": f"yo {i * i}"},
        ]
    }
    for i in range(16)
]


def check_merged(trainer: Trainer) -> PeftModel:
    """The run ended with a hard mask, and the dense model is the masked one."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()  # without autocast
    tuner = tuner_of(model)
    assert tuner.mask().hardened and len(tuner.mask().keep_indices) == 36
    assert all(operator.scale.any() for operator in tuner.operators().values())
    dense = model.merge_and_unload()
    assert dense.config.hidden_size == 36
    assert largest_difference(logits(model), logits(dense)) <= PARITY
    return model


def quietly(make: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant-checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "both": {
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
    "bf16-autocast": {"bf16": True},
}


HANDED_OVER = [
    ("plain", True),
    ("checkpointing", False),
    ("accumulation", True),
    ("both", False),
    ("bf16-autocast", True),
]
"""Options of a training, and whether the trainer is given a `PeftModel` or a `PatConfig`."""


@pytest.fixture
def regularizer_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every step at which all regularisers' gradients have been added."""
    made: list[int] = []
    original = Regularisers.check

    def counting(self: Regularisers) -> None:
        original(self)
        made.append(1)

    monkeypatch.setattr(Regularisers, "check", counting)
    return made


# -- Trainer, SFT, DPO -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "family", "tied", "rotation"),
    [
        ("checkpointing", "gemma3_text", True, "auto"),
        ("reentrant-checkpointing", "qwen3_moe", False, "pca"),
        ("both", "llama", True, "pca"),
        ("bf16-autocast", "gemma2", False, "none"),
    ],
)
def test_trainer(option: str, family: str, tied: bool, rotation: str, regularizer_calls: list[int]) -> None:
    model = attach(shallow(family, tied=tied), rotation=rotation, milestone=0.5)
    trainer = quietly(train, model, max_steps=STEPS, **OPTIONS[option])
    assert all(math.isfinite(loss) for loss in losses(trainer)) and len(losses(trainer)) == STEPS
    assert len(regularizer_calls) == STEPS
    check_merged(trainer)


@pytest.mark.parametrize(("option", "ready"), HANDED_OVER)
def test_sft(option: str, ready: bool, tmp_path: Path, regularizer_calls: list[int]) -> None:
    base = shallow("llama", tied=True)
    fields = {"rotation": "pca", "milestone": 0.5}
    trainer = quietly(
        SFTTrainer,
        model=attach(base, **fields) if ready else base,
        args=SFTConfig(**arguments(tmp_path, max_steps=STEPS, completion_only_loss=True, **OPTIONS[option])),
        train_dataset=Dataset.from_list(COMPLETIONS),
        processing_class=tiny_tokenizer(),
        peft_config=None if ready else pat_config(**fields),
        callbacks=[PatCallback()],
    )
    quietly(trainer.train)
    assert len(regularizer_calls) == STEPS
    check_merged(trainer)


@pytest.mark.parametrize(
    ("extra", "tied"),
    [
        ({"packing": True, "max_length": 32, "padding_free": False}, True),
        ({"assistant_only_loss": True}, False),
        ({"loss_type": "chunked_nll"}, True),
        ({"loss_type": "chunked_nll"}, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else f"tied={value}",
)
def test_sft_options_that_change_the_forward_pass(extra: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """Among them TRL's head in chunks, which reads `lm_head.weight` itself and would pass by a wrapped head."""
    model = attach(shallow("llama", tied=tied), rotation="pca", milestone=0.5)
    trainer = quietly(
        SFTTrainer,
        model=model,
        args=SFTConfig(**arguments(tmp_path, max_steps=STEPS, **extra)),
        train_dataset=Dataset.from_list(CHATS),
        processing_class=tiny_tokenizer(),
        callbacks=[PatCallback()],
    )
    quietly(trainer.train)
    check_merged(trainer)


@pytest.mark.parametrize("tied", [True, False])
def test_sft_s_loss_is_that_of_the_model_s_own_logits(tied: bool, tmp_path: Path) -> None:
    """TRL multiplies by `lm_head.weight` itself: what acts before a tied head must not sit around the head."""
    model = attach(shallow("llama", tied=tied), rotation="none", milestone=1.0)
    with torch.no_grad():
        for operator in tuner_of(model).operators().values():
            operator.scale.fill_(0.4)
    expected: list[float] = []

    def forward(module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if len(expected) == 0 and "labels" in kwargs:
            expected.append(math.nan)  # the call below comes here as well
            output = module(input_ids=kwargs["input_ids"], attention_mask=kwargs.get("attention_mask"))
            targets = kwargs["labels"][:, 1:].flatten()
            expected[0] = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets).item()

    model.register_forward_pre_hook(forward, with_kwargs=True)
    trainer = quietly(
        SFTTrainer,
        model=model,
        args=SFTConfig(**arguments(tmp_path, max_steps=1)),
        train_dataset=Dataset.from_list(COMPLETIONS),
        processing_class=tiny_tokenizer(),
        callbacks=[PatCallback()],
    )
    quietly(trainer.train)
    assert losses(trainer)[0] == pytest.approx(expected[0], abs=1e-5)


@pytest.mark.parametrize(("option", "ready"), [(option, not ready) for option, ready in HANDED_OVER])
def test_dpo(option: str, ready: bool, tmp_path: Path, regularizer_calls: list[int]) -> None:
    base = shallow("llama", tied=False)
    expected = logits(base)
    fields = {"rotation": "pca", "milestone": 0.5}
    trainer = quietly(
        DPOTrainer,
        model=attach(base, **fields) if ready else base,
        args=DPOConfig(**arguments(tmp_path, max_steps=STEPS, **OPTIONS[option])),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer(),
        peft_config=None if ready else pat_config(**fields),
        callbacks=[PatCallback()],
    )
    quietly(trainer.train)
    tolerance = 1e-2 if option == "bf16-autocast" else 1e-5
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=tolerance)  # the policy starts as the reference
    assert len(regularizer_calls) == STEPS
    model = check_merged(trainer)
    assert model.active_adapters == ["default"] and ("ref" in model.peft_config) == ready
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    if ready:
        model.set_adapter("ref")
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("step", [1, 3], ids=["soft", "hard"])
@pytest.mark.parametrize("cut", ["none", "pca", "mlp"])
def test_dpo_on_a_tuned_adapter_starts_from_that_adapter(cut: str, step: int, tmp_path: Path) -> None:
    """TRL copies its parameters to the adapter "ref"; the state of mask and gates has to go with them."""
    fields = {"axes": ["mlp"], "pruned_intermediate_size": 50} if cut == "mlp" else {"rotation": cut}
    model = attach(shallow("llama", tied=True), milestone=0.5, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    tuner = tuner_of(model)
    if cut != "none":
        tuner.calibrate([{"input_ids": Examples(16).ids}])
    tuner.set_step(step, 2)
    tuner.refit(())
    policy = logits(model)
    trainer = quietly(
        DPOTrainer,
        model=model,
        args=DPOConfig(**arguments(tmp_path, max_steps=2, learning_rate=0.0)),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer(),
        callbacks=[PatCallback()],
    )
    model.set_adapter("ref")
    assert torch.equal(logits(model), policy)
    model.set_adapter("default")
    quietly(trainer.train)
    if step == 3:  # a mask that is still soft starts its schedule anew
        assert losses(trainer) == pytest.approx([math.log(2)] * 2, abs=1e-5)


# -- accumulation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3_text", "mixtral"])
def test_eight_at_once_and_four_times_two_give_the_same_losses(family: str, record_property: Any) -> None:
    runs = {}
    for size, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = attach(shallow(family, tied=True), rotation="auto", milestone=0.4)
        # Calibrated alike: batches of another size end a calibration of a given number of tokens elsewhere.
        tuner_of(model).calibrate([{"input_ids": Examples(16).ids}])
        runs[size] = train(
            model,
            max_steps=5,
            num_examples=40,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-3,
        )
    difference = max(abs(a - b) for a, b in zip(losses(runs[8]), losses(runs[2]), strict=True))
    record_property("max_loss_difference", difference)
    assert difference <= ACCUMULATED


def test_gradient_checkpointing_changes_no_loss() -> None:
    measured = []
    for options in (OPTIONS["plain"], OPTIONS["checkpointing"], OPTIONS["reentrant-checkpointing"]):
        torch.manual_seed(0)
        model = attach(shallow("llama", tied=True), rotation="pca", milestone=0.5)
        measured.append(losses(quietly(train, model, max_steps=STEPS, **options)))
    assert measured[0] == pytest.approx(measured[1], abs=1e-6)
    assert measured[0] == pytest.approx(measured[2], abs=1e-6)


def test_a_trainer_of_one_s_own_works_alike(tmp_path: Path) -> None:
    """Nothing is asked of a trainer but its callbacks."""

    class OwnLoss(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            loss = output.logits.square().mean()
            return (loss, output) if return_outputs else loss

    model = attach(shallow("llama", tied=True), rotation="pca", milestone=0.5)
    args = TrainingArguments(**arguments(tmp_path, max_steps=STEPS))
    trainer = OwnLoss(model=model, args=args, train_dataset=Examples(16), callbacks=[PatCallback()])
    trainer.train()
    check_merged(trainer)
