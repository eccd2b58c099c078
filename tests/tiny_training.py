"""Short real trainings of the tiny models with the stock trainers, shared by the tests of tuner, callback and contract.

The trainers are transformers' and TRL's own, on the CPU in float32, without any output but the model.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny_models import BOS_ID, EOS_ID, NUM_SPECIAL_IDS, PAD_ID, batch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from pat.training.callbacks.callback import PatCallback
from pat.tuner import PatConfig, PatModel, find_tuner

GAIN_TOLERANCE = 0.4
"""The tiny models' gains are spread by 0.3 around 1: within the default 0.15 only a third could be rotated."""

RANK = 4
OPERATOR_RANK = 6

SETTLED = 5e-3
"""A learning rate at which three steps of Adam change the tiny models' logits by about one unit."""


class Examples(Dataset):  # type: ignore[type-arg]
    """Random token sequences of one length with labels, `num` of them; equal seeds give equal data."""

    def __init__(self, num: int, *, length: int = 16, seed: int = 1) -> None:
        ids = batch(seed=seed, batch_size=num, length=length)["input_ids"]
        ids[ids == PAD_ID] = NUM_SPECIAL_IDS
        ids[:, 0], ids[:, -1] = BOS_ID, EOS_ID
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def pat_config(**fields: Any) -> PatConfig:
    """A PAT configuration for the tiny models: small ranks, a tolerance that fits their gains, a mask that is soft."""
    defaults: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "operator_rank": OPERATOR_RANK,
        "gain_tolerance": GAIN_TOLERANCE,
        "axes": ["hidden"],  # what most properties are about
        "milestone": 1 / 3,  # our recipe's would be step 0 of runs this short
        # Bounds of rounding are for adapters moved this far; our recipe's scales would move them 30 times further.
        "use_rslora": False,
        "operator_lr_multiplier": 1.0,
    }
    return PatConfig(**(defaults | fields))


def attach(base: nn.Module, **fields: Any) -> PeftModel:
    """Put a PAT adapter on a tiny base, without peft's advice about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, pat_config(**fields))


def tuner_of(model: nn.Module) -> PatModel:
    """Return the PAT tuner of an adapted model."""
    tuner = find_tuner(model)
    assert tuner is not None
    return tuner


def arguments(output_dir: str | Path, **fields: Any) -> dict[str, Any]:
    """Fields common to every trainer's arguments: CPU, float32, silent, nothing saved."""
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": SETTLED,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 0,
    }
    return defaults | fields


def train(
    model: PeftModel,
    *,
    num_examples: int = 16,
    callbacks: Sequence[TrainerCallback] = (),
    dataset: Any = None,
    eval_dataset: Any = None,
    resume_from: str | Path | None = None,
    output_dir: str | Path | None = None,
    before: Callable[[Trainer], None] | None = None,
    **fields: Any,
) -> Trainer:
    """Train with a stock `Trainer` and `PatCallback`; returns the trainer, the model is left in eval mode."""
    with tempfile.TemporaryDirectory() as temporary:
        args = TrainingArguments(**arguments(output_dir or temporary, **fields))
        data = Examples(num_examples) if dataset is None else dataset
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=eval_dataset,
            callbacks=[PatCallback(), *callbacks],
        )
        if before is not None:
            before(trainer)
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    model.eval()
    return trainer


class StopAt(TrainerCallback):  # type: ignore[misc]
    """Ends a training after `step` optimizer steps, in the middle of its schedule."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def losses(trainer: Trainer) -> list[float]:
    """Return the logged training losses in order."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """Return the logits at real (unpadded) positions, `(tokens, vocabulary)`, in eval mode."""
    inputs = batch() if inputs is None else inputs
    was_training = model.training
    model.eval()
    output: Tensor = model(**inputs).logits
    model.train(was_training)
    return output[inputs["attention_mask"].bool()]


class Float64(TorchFunctionMode):
    """Turn every cast to float32 into one to float64.

    transformers computes norms, softmax, router, rotary angles and losses in float32 whatever the model's dtype.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return max |a - b|."""
    return float((a.double() - b.double()).abs().max())


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect what transformers warns of, whose loggers hand nothing on to pytest's `caplog`."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", UserWarning)
            yield messages
    finally:
        logger.removeHandler(handler)
    messages += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


# -- the contract: one short training, and everything the tests want to know about it --------------------------------


@dataclass
class Trained:
    """A tiny model before, during and after a training; the masked model is still there to be looked at."""

    base_weights: dict[str, Tensor]
    base_logits: Tensor
    fresh_logits: Tensor
    """Of the adapter just attached, nothing calibrated."""
    calibrated_logits: Tensor
    """At step 0, when training begins."""
    model: PeftModel
    masked_logits: Tensor
    dense: PreTrainedModel
    dense_logits: Tensor
    trainer: Trainer

    @property
    def tuner(self) -> PatModel:
        return tuner_of(self.model)


class _Snapshot(TrainerCallback):  # type: ignore[misc]
    """Takes the logits at the start of training: after PatCallback has calibrated, before the first step."""

    logits: Tensor

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logits = logits(kwargs["model"])


def train_and_merge(base: PreTrainedModel, *, training: dict[str, Any] | None = None, **fields: Any) -> Trained:
    """Attach, train for four steps with the milestone in their middle, merge."""
    base_weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    base_logits = logits(base)
    model = attach(base, **({"milestone": 0.5} | fields))
    fresh_logits = logits(model)
    snapshot = _Snapshot()
    trainer = train(model, callbacks=[snapshot], **({"max_steps": 4} | (training or {})))
    dense = model.merge_and_unload()
    return Trained(
        base_weights=base_weights,
        base_logits=base_logits,
        fresh_logits=fresh_logits,
        calibrated_logits=snapshot.logits,
        model=model,
        masked_logits=logits(model),
        dense=dense,
        dense_logits=logits(dense),
        trainer=trainer,
    )
