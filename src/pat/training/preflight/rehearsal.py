"""A rehearsal: one step of a tiny random model of the base's family, before the base's weights are loaded.

Many options only turn out to be impossible when a library makes a trainer, an optimizer or a batch of them: a package
that is not installed, a schedule that needs arguments, a collator that needs another attention. Making the same objects
with a model of a few thousand channels takes a second, and finds what no list of ours would.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, get_quantization_config

from pat.errors import PatError, one_line
from pat.families import Family
from pat.shape import AXES, TARGETS, Shape
from pat.surgery.dense import shrink_config
from pat.surgery.describe import head_dim
from pat.surgery.rope import rope_of_any_width
from pat.training.arguments import TuneArguments
from pat.training.inputs.prepare import Prepared
from pat.training.trainer import count_steps, make_trainer
from pat.tuner.prepare import check_config

NUM_LAYERS = 2

NUM_TOKENS = 16

ALIGNMENT = 16
"""Divides the hidden size of the tiny model: kernels for experts refuse rows that are not a multiple of 16 bytes."""


def rehearse(arguments: TuneArguments, data: Prepared, base_config: Any, family: Family) -> int:
    """Make what a run will make, on a tiny model and a few tokens of its own data, and take one step.

    Returns:
        The number of optimizer steps of the run.

    Raises:
        PatError: something cannot be made as asked, in the words of the library that refuses it.
    """
    with _silently(), tempfile.TemporaryDirectory() as folder:
        try:
            shape = check_config(base_config, family, arguments.pat_config())
            skeleton = _attached(arguments, data, base_config)
            get_quantization_config(arguments.model)
            size = head_dim(skeleton.get_base_model())
            del skeleton
            tiny = _attached(arguments, data, _tiny_config(base_config, family, size, shape), shape)
            return _one_step(tiny, arguments.sft, data, folder)
        except PatError:
            raise
        except Exception as error:
            reason = one_line(error)
            if not isinstance(error, ValueError | ImportError):  # which libraries raise for people to read
                reason = f"{type(error).__name__}: {reason} (--debug shows where)"
            raise PatError(f"The run cannot be set up as asked: {reason}") from error


def _attached(arguments: TuneArguments, data: Prepared, config: Any, shape: Shape | None = None) -> PeftModel:
    """Build the model of a configuration and put the run's adapter on it, on the meta device unless there is a shape.

    Args:
        arguments: of the run.
        data: of the run.
        config: of the base model, or of a tiny one.
        shape: of the run, for the tiny model: what is cut there is cut of it, of a width that it has.
    """
    on_meta = shape is None
    pat_config = arguments.pat_config()
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta" if on_meta else "cpu"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=arguments.model.attn_implementation)
        model = cast(PreTrainedModel, model.float())
        if shape is None:
            _check_names(arguments, pat_config.target_modules, model)
        else:
            data.vocabulary.fit(model)
            names = {name for name, _ in model.named_modules()}
            kept = [name for name in pat_config.modules_to_save or () if any(n.endswith(name) for n in names)]
            pat_config = dataclasses.replace(
                pat_config,
                pruning_ratio=None,
                **cast(dict[str, Any], dict.fromkeys(TARGETS)),
                **_tiny_cut(config, shape),
                multiple_of=None,
                operator_rank=1,
                rotation="none",
                calibration=None,
                # Those of single layers may not exist here, and have been looked for in the model of full size.
                target_modules=None,
                target_parameters=None,
                modules_to_save=kept or None,
            )
        return cast(PeftModel, get_peft_model(model, data.vocabulary.note(pat_config, config)))


def _check_names(arguments: TuneArguments, targets: Any, base: PreTrainedModel) -> None:
    """Refuse names that peft would pass over.

    Raises:
        PatError: no module, or no parameter, has such a name.
    """
    model = arguments.model
    modules, parameters = [n for n, _ in base.named_modules()], [n for n, _ in base.named_parameters()]
    for flag, given, found, ends in (
        # peft asks for one of them to be found, and takes text for a regular expression.
        ("lora_target_modules", () if isinstance(targets, str) else targets, modules, True),
        ("lora_modules_to_save", model.lora_modules_to_save, modules, False),
        ("lora_target_parameters", model.lora_target_parameters, parameters, False),
    ):
        for name in given or ():
            if not any(f".{place}".endswith(f".{name}") if ends else f".{name}." in f".{place}." for place in found):
                raise PatError(f"Got {flag}={name}, but the base has nothing of that name; expected a part of it.")


def _tiny_config(base_config: Any, family: Family, head_size: int, shape: Shape) -> Any:
    """Return the configuration of a narrow model of two layers, whose heads and vocabulary are the base's."""
    heads = base_config.num_attention_heads
    width = math.lcm(2 * heads, heads * shape.pruned("heads") // shape.size("heads"), ALIGNMENT)
    tied = bool(base_config.tie_word_embeddings)
    layers = range(min(base_config.num_hidden_layers, NUM_LAYERS))
    sizes = {family.hidden_size_field: width}
    base_config = copy.deepcopy(base_config)
    if rope := getattr(base_config, "rope_parameters", None):
        base_config.rope_parameters = rope_of_any_width(rope)  # phi3 wants as many factors of it as the width has
    return shrink_config(base_config, family, sizes, head_dim=head_size, tied=tied, keep_layers=layers)


def _tiny_cut(tiny_config: Any, shape: Shape) -> dict[str, Any]:
    """Return options that cut of the tiny model what the run itself cuts, as far as it has it."""
    sizes = dict(shape.pruned_sizes)
    # The number of query heads that are left is a legal width.
    sizes[AXES["hidden"].field] = tiny_config.num_attention_heads * shape.pruned("heads") // shape.size("heads")
    sizes[AXES["layers"].field] = 1
    return {axis.option: sizes[axis.field] if shape.cuts(axis.name) else None for axis in AXES.values()}


def _one_step(model: PeftModel, sft: SFTConfig, data: Prepared, folder: str) -> int:
    args = data.trainer_args(sft)
    args.disable_tqdm, args.log_level = True, "error"
    trainer = make_trainer(model, args, data, Path(folder), tokenizer=copy.deepcopy(data.vocabulary.tokenizer))
    num_steps = count_steps(trainer)
    if num_steps < 1:
        raise PatError(
            f"Got max_steps={sft.max_steps} and num_train_epochs={sft.num_train_epochs}; expected some steps."
        )
    trainer.create_optimizer_and_scheduler(num_steps)
    if sft.torch_compile:  # takes minutes
        return num_steps
    # The reporters are made, but not started.
    for callback in [type(callback) for callback in trainer.callback_handler.callbacks]:
        if callback is PrinterCallback or "integrations" in callback.__module__:
            trainer.remove_callback(callback)
    args.max_steps, args.gradient_accumulation_steps = 1, 1
    # What happens every so many steps, or after an epoch, happens after this one.
    for name in ("logging", "eval", "save"):
        if getattr(args, f"{name}_strategy") in ("steps", "epoch"):
            setattr(args, f"{name}_strategy", IntervalStrategy.STEPS)
            setattr(args, f"{name}_steps", 1)
    args.eval_delay = 0
    trainer.train_dataset = Dataset.from_list([_short(data.train[0])] * max(1, args.per_device_train_batch_size))
    if data.evaluation is not None:
        trainer.eval_dataset = Dataset.from_list([_short(data.evaluation[0])])
    trainer.train()
    return num_steps


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Cut a row to a few tokens, and have all of them learnt: the first are often those of a prompt."""
    ids = row["input_ids"][:NUM_TOKENS]
    short = {"input_ids": ids, "labels": ids}
    return short | ({"seq_lengths": [len(ids)]} if "seq_lengths" in row else {})


@contextmanager
def _silently() -> Iterator[None]:
    """Have nobody say anything: what is worth saying will be said when the run itself comes to it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
