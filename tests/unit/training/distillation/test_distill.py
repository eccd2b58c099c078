"""Learning from a teacher, under transformers' trainer and TRL's: the loss, its normalisation, what is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import KINDS, batch, build, shallow, tiny_tokenizer
from tiny_training import Examples, arguments, attach, largest_difference, logits, losses, train
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from pat.errors import PatError
from pat.nll import IGNORED
from pat.training.callbacks.callback import PatCallback
from pat.training.distillation import distill
from pat.training.distillation.distill import DistillationMixin, Head, Teacher, decoder, scored_positions

ROUNDING = 1e-5
"""Relative, of a mean over some dozen tokens in float32; gradients and losses of size one."""

ROWS = Dataset.from_list(
    [
        {"input_ids": ids, "labels": [IGNORED] * (3 + i % 3) + ids[3 + i % 3 :]}
        for i, ids in enumerate([1, *range(10 + i, 17 + 2 * i), 2] for i in range(8))
    ]
)
"""Rows of differing length, with prompts that are not learned."""


class Distilling(DistillationMixin, Trainer):
    """transformers' trainer with a teacher."""


def student() -> Any:
    """A tiny Llama with LoRA, the same each time."""
    torch.manual_seed(7)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(shallow("llama", tied=True), config)


def large() -> PreTrainedModel:
    """A model of another width over the same vocabulary, with another opinion."""
    torch.manual_seed(3)
    return build("llama", tied=True, hidden_size=64)


def trainer(kind: str, folder: Path, *, teacher: Any = None, weight: float = 0.5, **fields: Any) -> Any:
    fields = {"max_steps": 2, "per_device_train_batch_size": 4, "max_grad_norm": 0} | fields
    more = {} if teacher is None else {"teacher": teacher, "distill_weight": weight}
    if kind == "sft":
        args = SFTConfig(**arguments(folder, **fields), dataset_kwargs={"skip_prepare_dataset": True})
        owner: Any = SFTTrainer if teacher is None else distill.DistillingTrainer
        return owner(model=student(), args=args, train_dataset=ROWS, processing_class=tiny_tokenizer(), **more)
    args = TrainingArguments(**arguments(folder, **fields))
    owner = Trainer if teacher is None else Distilling
    return owner(model=student(), args=args, train_dataset=Examples(8), **more)


def by_hand(model: Any, teacher: Any, inputs: dict[str, Tensor], weight: float) -> float:
    """The loss in float64, from the logits of stock forward passes."""
    ids = inputs["labels"][:, 1:]
    scored = ids != IGNORED
    shown = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        q, p = (m(**shown).logits[:, :-1][scored].double().log_softmax(-1) for m in (model, teacher))
    ce = -q.gather(-1, ids[scored][:, None]).sum()
    kl = (p.exp() * (p - q)).sum()
    return float(((1 - weight) * ce + weight * kl) / scored.sum())


@pytest.mark.parametrize("kind", ["plain", "sft"])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_is_the_formula(kind: str, weight: float, tmp_path: Path) -> None:
    made = trainer(kind, tmp_path, teacher=Teacher(large()), weight=weight)
    inputs = next(iter(made.get_train_dataloader()))
    expected = by_hand(made.model.eval(), large().eval(), inputs, weight)
    made.model.train()
    assert made.compute_loss(made.model, dict(inputs)).item() == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_without_a_share_of_the_teacher_it_is_the_trainers_own_training(kind: str, tmp_path: Path) -> None:
    own, other = trainer(kind, tmp_path), trainer(kind, tmp_path, teacher=Teacher(large()))
    other.distill_weight = 0.0  # which no option can say
    own.train()
    other.train()
    assert losses(own) == losses(other)
    pairs = zip(own.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_accumulated_batches_are_one_batch(kind: str, tmp_path: Path) -> None:
    """Rows have different numbers of tokens: a mean of means would not do."""
    runs = [
        trainer(kind, tmp_path, teacher=Teacher(large()), per_device_train_batch_size=size, **accumulated)
        for size, accumulated in ((4, {}), (1, {"gradient_accumulation_steps": 4}))
    ]
    for run in runs:
        run.train()
    whole, parts = (run.model for run in runs)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=ROUNDING)
    assert largest_difference(logits(whole), logits(parts)) < 100 * ROUNDING  # two steps of Adam, of 5e-3 each
    first, last = (run.state.log_history[0]["distill/kl"] for run in runs)
    assert first == pytest.approx(last, rel=ROUNDING)


def test_parts_of_the_positions_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for rows in (1024, 5):
        monkeypatch.setattr(distill, "ROWS", rows)
        made = trainer("sft", tmp_path, teacher=Teacher(large()))
        made.compute_loss(made.model.train(), dict(next(iter(made.get_train_dataloader())))).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters() if p.requires_grad]))
    assert largest_difference(*gradients) < ROUNDING


def test_the_teacher_is_frozen_and_evaluation_is_the_trainers_own(tmp_path: Path) -> None:
    teacher = large().train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    plain, made = trainer("sft", tmp_path), trainer("sft", tmp_path, teacher=Teacher(teacher))
    rows = ROWS.select(range(4))
    assert made.evaluate(rows)["eval_loss"] == plain.evaluate(rows)["eval_loss"]
    made.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert made.teacher_seconds > 0
    assert json.dumps(made.state.log_history).count("distill/kl") == 2


def test_a_masked_student_learns_from_its_unpruned_self(tmp_path: Path) -> None:
    """The mixin goes with PatCallback as well; where nothing is cut yet the two are one model."""
    model = attach(shallow("llama", tied=True), rotation="none", milestone=1.0)
    args = TrainingArguments(**arguments(tmp_path))
    made = Distilling(
        model=model,
        args=args,
        train_dataset=Examples(8),
        callbacks=[PatCallback()],
        teacher=Teacher(shallow("llama", tied=True)),
    )
    made.train()
    divergences = [row["distill/kl"] for row in made.state.log_history if "distill/kl" in row]
    assert divergences[0] == pytest.approx(0, abs=ROUNDING) and divergences[-1] > 1e-3


def test_a_masked_teacher_is_its_base_with_lora() -> None:
    model = attach(shallow("llama", tied=True), rotation="pca")
    train(model, max_steps=3)
    for name, parameter in model.named_parameters():  # without LoRA it is the base again
        if "lora_B" in name:
            parameter.data.zero_()
    teacher, inputs = Teacher(model), batch()
    scored = inputs["attention_mask"].bool()
    said = teacher.logits(*teacher.look(inputs, scored))
    assert largest_difference(said, logits(shallow("llama", tied=True), inputs)) < ROUNDING
    assert largest_difference(logits(model, inputs), said) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_head_is_what_the_family_makes_of_hidden_states(kind: str) -> None:
    """Also where logits are scaled or capped."""
    model, inputs = shallow(kind, tied=False).eval(), batch()
    states = decoder(model)(**inputs).last_hidden_state
    assert torch.equal(Head(model)(states.flatten(0, 1)), model(**inputs).logits.flatten(0, 1))


def test_what_is_scored() -> None:
    labels = torch.tensor([[5, IGNORED, 6, 7], [8, 9, IGNORED, IGNORED]])
    assert scored_positions(labels).tolist() == [[False, True, True, False], [True, False, False, False]]


@pytest.mark.parametrize("weight", [0.0, -0.1, 1.1, float("nan")])
def test_a_weight_out_of_range_is_refused(weight: float, tmp_path: Path) -> None:
    with pytest.raises(PatError, match="distill_weight"):
        trainer("plain", tmp_path, teacher=Teacher(large()), weight=weight)
