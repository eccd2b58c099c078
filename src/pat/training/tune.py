"""The whole recipe, top to bottom: base model + data -> tuned, smaller, standard checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, set_seed
from trl import get_quantization_config

from pat.checkpoint.card import Cut, shown_name
from pat.checkpoint.staging import staged_folder
from pat.checkpoint.verify import Parity
from pat.checkpoint.write import quiet_transformers, save_checkpoint
from pat.loading import TokenSetup, load_base, quantization_of, stored_dtype
from pat.loading.tokenizer import load_plain_tokenizer
from pat.method.schedule import milestone_step
from pat.report.progress import bars_of_datasets
from pat.report.records import collected_warnings, write_record
from pat.training.arguments import TuneArguments, build_arguments
from pat.training.check import announce, check, check_run
from pat.training.prepare import Prepared, prepare
from pat.training.push import open_repository, push
from pat.training.rehearsal import rehearse
from pat.training.report import report_of_run
from pat.training.results import ModelFigures, Size, TuneRecord, TuneResult, measure, warn_of_losses
from pat.training.samples import greedy_answers, paired
from pat.training.stages import Stages, Trained


def tune(**flags: Any) -> TuneResult:
    """Tune and prune in one call: every keyword is a flag of `pat tune` (TRL's, the adapter's and the method's).

    Example:
        `pat.tune(model_name_or_path="base", dataset_name="data.jsonl", pruning_ratio=0.25, output_dir="out")`

    Raises:
        PatError: an argument, the model or the data cannot be used; nothing has been written.
        RunFailed: training became non-finite, or the written checkpoint is not the trained model.
    """
    return run_tune(build_arguments(**flags))


def run_tune(arguments: TuneArguments, callbacks: Sequence[TrainerCallback] = ()) -> TuneResult:
    """Run `pat tune` from parsed arguments, with further callbacks for the trainers of both stages; see `tune`."""
    shown = not arguments.sft.disable_tqdm
    with collected_warnings() as warnings, bars_of_datasets(shown=shown), quiet_transformers(not shown):
        # Everything that can be wrong is found before the weights are loaded, and before anything is written.
        checked = check(arguments)
        data = prepare(arguments, checked.base_config)
        run = check_run(arguments, checked, data)
        num_steps = rehearse(arguments, data, data.vocabulary.config_of(checked.base_config), checked.family)
        repository = open_repository(arguments)

        base = _load(arguments, data)
        announce(arguments, checked, data, base, num_steps)
        # Training may load float32 for speed or stability; what is written keeps the dtype of the base's checkpoint.
        dtype, device = base.dtype, base.device
        stored = stored_dtype(checked.base_config, revision=arguments.model.model_revision) or dtype
        size = Size.of(checked.base_config, stored)
        figures = {"base": measure(base, data, "base", size, progress=shown)}
        answers = greedy_answers(base, data)
        data.vocabulary.fit(base)
        tokens = _tokens(arguments, data, base, data.vocabulary.config_of(checked.base_config))
        stages = Stages(arguments, data, tokens, run, num_steps, base, callbacks)
        del base  # nobody else may hold it, or it stays in memory beside the small model
        trained = stages.run(checked.resume_from)
        inner = cast(PreTrainedModel, trained.model.get_base_model())
        size = (size if trained.compaction is None else Size.of(inner.config, stored)).with_adapter(trained.model)
        figures["tuned"] = measure(inner, data, "tuned", size, progress=shown)

        parity, cut = _write(arguments, data, tokens, trained, figures, stored)
        dense: Any = AutoModelForCausalLM.from_pretrained(arguments.output_dir / "model", dtype=dtype)
        size = Size(cut.num_parameters, cut.num_parameters * stored.itemsize)
        figures["dense"] = measure(dense.to(device), data, "dense", size, progress=shown)
        samples = paired(answers, greedy_answers(dense, data))
        warn_of_losses(figures, dense.config.get_text_config().vocab_size)

    record = _record(
        arguments,
        data,
        trained,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        cut=cut,
        figures=figures,
        parity=parity,
        samples=samples,
        warnings=warnings,
    )
    write_record(arguments.output_dir / "results.json", record)
    trained.run.after("results").write(arguments.output_dir)
    report_of_run(arguments.output_dir)
    if not arguments.run.keep_checkpoints:
        shutil.rmtree(arguments.output_dir / "checkpoints", ignore_errors=True)
    result = TuneResult(arguments.output_dir, record)
    if repository is not None:
        push(arguments, repository, result.model_dir)
    return result


def _record(arguments: TuneArguments, data: Prepared, trained: Trained, **found: Any) -> TuneRecord:
    name, training_arguments = shown_name(arguments.run.model_name_or_path), arguments.sft.to_sanitized_dict()
    return TuneRecord(
        model_name_or_path=name,
        dataset=data.record.source,
        pat_config=trained.pat_config | {"base_model_name_or_path": name},
        training_arguments=training_arguments | {"output_dir": arguments.output_dir.name, "logging_dir": None},
        data=data.record,
        compaction=trained.compaction,
        teacher=trained.teacher,
        timings=trained.timings(),
        log_history=trained.log_history,
        **_facts(arguments, data, trained),
        **found,
    )


def _facts(arguments: TuneArguments, data: Prepared, trained: Trained) -> dict[str, Any]:
    """Return what record and card both say of a training."""
    rate, pat = float(arguments.sft.learning_rate), arguments.pat
    rates, has_soft_steps = {"LoRA": rate}, milestone_step(pat.milestone, trained.num_steps) > 0
    if has_soft_steps and pat.mask == "trainable":
        rates["mask"] = rate * pat.mask_lr_multiplier
    sizes, base = trained.pat_config["resolved_width"], trained.pat_config["base_shape"]
    cuts_hidden = sizes["hidden_size"] < base["hidden_size"]  # else there are no operators
    if cuts_hidden and (has_soft_steps or trained.compaction is None):
        rates["operators"] = rate * pat.operator_lr_multiplier
    formats = {"chat": "the chat template of the tokenizer", "alpaca": "the Alpaca template"}
    return {
        "recipe": arguments.run.recipe,
        "seed": arguments.sft.seed,
        "num_steps": trained.num_steps,
        "num_tokens_seen": round(trained.epoch * data.num_tokens),
        "prompt_format": formats.get(data.record.template or "", "none, texts as they are"),
        "learning_rates": rates,
    }


def _load(arguments: TuneArguments, data: Prepared) -> PreTrainedModel:
    """Load the base onto the trainer's device, quantised if asked for, with embeddings for tokens that were added."""
    options, sft = arguments.model, arguments.sft
    quantization = get_quantization_config(options)
    set_seed(sft.seed)
    base = load_base(
        arguments.run.model_name_or_path,
        revision=options.model_revision,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        quantization_config=quantization,
    )
    if quantization_of(base.config) is None:  # neither by a flag nor in the checkpoint
        base = cast(PreTrainedModel, base.to(sft.device))  # type: ignore[arg-type]
    else:
        checkpointing = bool(sft.gradient_checkpointing)
        base = cast(PreTrainedModel, prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing))
    if data.vocabulary.kept is None:  # else it is measured whole before
        data.vocabulary.fit(base)
    return base


def _tokens(arguments: TuneArguments, data: Prepared, base: PreTrainedModel, base_config: Any) -> TokenSetup:
    """Return what is written beside every model and adapter of the run."""
    name, revision = arguments.run.model_name_or_path, arguments.model.model_revision
    written = data.vocabulary.written or data.vocabulary.tokenizer
    own = load_plain_tokenizer(name, revision=revision)
    return TokenSetup.of(base_config, base.generation_config, written, base_tokenizer=own)


def _write(
    arguments: TuneArguments,
    data: Prepared,
    tokens: TokenSetup,
    trained: Trained,
    figures: dict[str, ModelFigures],
    dtype: torch.dtype,
) -> tuple[Parity, Cut]:
    """Merge, write and verify the dense checkpoint."""
    scored = {stage: found for stage, found in figures.items() if found.held_out_nll is not None}
    errors = {stage: found.held_out_standard_error for stage, found in scored.items()}
    provenance = _facts(arguments, data, trained) | {
        "model_name_or_path": arguments.run.model_name_or_path,
        "dataset": arguments.run.dataset_name,
        "max_length": arguments.sft.max_length,
        "teacher": trained.teacher.describe() if trained.teacher else None,
        "held_out_nll": {stage: found.held_out_nll for stage, found in scored.items()},
        "held_out_standard_error": {stage: error for stage, error in errors.items() if error is not None},
        "num_held_out_tokens": figures["base"].num_held_out_tokens,
    }
    # What a run that was cut off before its results has left; `check` refuses anything else.
    shutil.rmtree(arguments.output_dir / "model", ignore_errors=True)
    with staged_folder(arguments.output_dir / "model") as staging:
        return save_checkpoint(
            trained.model,
            staging,
            tokens=tokens,
            batches=data.verify_on,
            dtype=dtype,
            provenance=provenance,
            compaction=trained.compaction,
            progress=not arguments.sft.disable_tqdm,
        )
