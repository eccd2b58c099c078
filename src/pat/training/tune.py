"""The whole recipe, top to bottom: base model + data -> tuned, smaller, standard checkpoint."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTTrainer, get_quantization_config

from pat.errors import RunFailed
from pat.evaluation.perplexity import Example, batches_from_examples, tokenize_examples
from pat.export.results import environment, write_results
from pat.export.write import check_output_folder, write_dense
from pat.loading import load_base, load_config, load_tokenizer
from pat.training.arguments import TuneArguments, build_arguments
from pat.training.calibration_text import read_calibration
from pat.training.callback import PatCallback
from pat.training.data import TrainingData, check_truncation, load_training_data
from pat.training.guard import FiniteGuard
from pat.training.results import TuneResult, measure
from pat.tuner.model import PatModel, find_tuner
from pat.tuner.prepare import check_config

NUM_VERIFY_ROWS = 16
"""Held-out rows on which the written checkpoint is compared with the model that was trained."""

VERIFY_BATCH_SIZE = 4


def tune(**flags: Any) -> TuneResult:
    """Tune and prune in one call: every keyword is a flag of `pat tune` (TRL's, the adapter's and the method's).

    Example:
        `pat.tune(model_name_or_path="base", dataset_name="data.jsonl", pruning_ratio=0.25, output_dir="out")`

    Raises:
        PatError: an argument, the model or the data cannot be used; nothing has been written.
        RunFailed: training became non-finite, or the written checkpoint is not the trained model.
    """
    return run_tune(build_arguments(**flags))


def run_tune(arguments: TuneArguments) -> TuneResult:
    """Run `pat tune` from parsed arguments; see `tune`."""
    sft, name = arguments.sft, str(arguments.model.model_name_or_path)
    output_dir, checkpoints = arguments.output_dir, arguments.output_dir / "checkpoints"

    # Everything that can be wrong is found before the weights are loaded, and before anything is written.
    if not sft.resume_from_checkpoint:
        check_output_folder(output_dir)
    pat_config = arguments.pat_config()
    base_config, family = load_config(name, revision=arguments.model.model_revision)
    check_config(base_config, family, pat_config)
    if pat_config.calibration is not None:
        read_calibration(pat_config.calibration)
    tokenizer = load_tokenizer(name, revision=arguments.model.model_revision)
    data = _load_data(arguments, tokenizer)
    num_truncated = check_truncation(tokenizer, data.train, sft.max_length)
    held_out = _examples(tokenizer, data, arguments)

    set_seed(sft.seed)
    base, written_dtype = _load_base(arguments)
    pad_token_id = cast(int, tokenizer.pad_token_id)
    figures = {"base": measure(base, held_out, pad_token_id)}
    model = cast(PeftModel, get_peft_model(base, pat_config))
    tuner = cast(PatModel, find_tuner(model))

    trainer = SFTTrainer(
        model=model,
        args=sft,
        train_dataset=data.train,
        eval_dataset=data.held_out if sft.eval_strategy != "no" else None,
        processing_class=tokenizer,
        callbacks=[PatCallback(), FiniteGuard()],
    )
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=_resume_from(arguments))
    except RunFailed as error:
        trainer.save_model(str(checkpoints / "last-finite"))
        raise RunFailed(f"{error} The adapter before that step is in {checkpoints / 'last-finite'}.") from error
    train_seconds = time.perf_counter() - started

    model.save_pretrained(str(output_dir / "adapter"))
    figures["tuned"] = measure(model.get_base_model(), held_out, pad_token_id)
    verify_on = (held_out or _examples(tokenizer, data, arguments, of_training=True))[:NUM_VERIFY_ROWS]
    parity, model_dir = write_dense(
        model,
        output_dir / "model",
        tokenizer=tokenizer,
        batches=list(batches_from_examples(verify_on, batch_size=VERIFY_BATCH_SIZE, pad_token_id=pad_token_id)),
        dtype=written_dtype,
        provenance=_provenance(arguments, tuner, data),
    )
    dense = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").to(model.device)
    figures["dense"] = measure(dense, held_out, pad_token_id)

    write_results(
        output_dir / "results.json",
        {
            "command": "tune",
            **environment(),
            **_provenance(arguments, tuner, data),
            "pat_config": model.peft_config[tuner.adapter].to_dict(),
            "training_arguments": sft.to_sanitized_dict(),
            "data": _describe(data) | {"num_truncated": num_truncated, "num_held_out": len(held_out)},
            "figures": {stage: asdict(figure) for stage, figure in figures.items()},
            "parity": parity.to_dict(),
            "timings": {"train_seconds": train_seconds, "num_steps": trainer.state.global_step},
            "log_history": trainer.state.log_history,
        },
    )
    if not arguments.run.keep_checkpoints:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return TuneResult(output_dir, model_dir, output_dir / "adapter", figures, parity)


def _load_data(arguments: TuneArguments, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    run = arguments.run
    return load_training_data(
        str(run.dataset_name),
        tokenizer=tokenizer,
        split=run.dataset_train_split,
        config_name=run.dataset_config,
        template=run.template,  # type: ignore[arg-type]
        held_out=run.held_out,
        seed=arguments.sft.seed,
    )


def _load_base(arguments: TuneArguments) -> tuple[PreTrainedModel, torch.dtype]:
    """Load the base, quantised if asked for; also return the dtype of its checkpoint, which the small one keeps."""
    options = arguments.model
    quantization = get_quantization_config(options)
    base = load_base(
        str(options.model_name_or_path),
        revision=options.model_revision,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        quantization_config=quantization,
    )
    dtype = base.dtype
    if quantization is not None:
        # Casts what is not quantised to float32, for stable training only.
        base = prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=bool(arguments.sft.gradient_checkpointing)
        )
    return base, dtype


def _examples(
    tokenizer: PreTrainedTokenizerBase, data: TrainingData, arguments: TuneArguments, *, of_training: bool = False
) -> Sequence[Example]:
    """Tokenise the held-out rows (or the first training rows) as the trainer does; rows cut to nothing are dropped."""
    rows = data.train.select(range(min(NUM_VERIFY_ROWS, len(data.train)))) if of_training else data.held_out
    return [] if rows is None else tokenize_examples(tokenizer, rows, arguments.sft.max_length)


def _resume_from(arguments: TuneArguments) -> str | bool | None:
    given = arguments.sft.resume_from_checkpoint
    if isinstance(given, str) and given.lower() in ("true", "false"):
        return given.lower() == "true"
    return cast("str | bool | None", given)


def _describe(data: TrainingData) -> dict[str, Any]:
    facts = ("source", "held_out_source", "format", "template", "fingerprint", "num_rows", "num_dropped")
    return {fact: getattr(data, fact) for fact in facts}


def _provenance(arguments: TuneArguments, tuner: PatModel, data: TrainingData) -> dict[str, Any]:
    mask = tuner.mask()
    return {
        "model_name_or_path": arguments.model.model_name_or_path,
        "dataset": data.source,
        "recipe": arguments.run.recipe,
        "seed": arguments.sft.seed,
        "hidden_size": mask.hidden_size,
        "pruned_hidden_size": mask.pruned_hidden_size,
        "rotation": tuner.pat_config().resolved_rotation,
        "milestone_step": mask.milestone_step,
    }
