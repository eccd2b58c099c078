"""The whole recipe, top to bottom: base model + data -> tuned, smaller, standard checkpoint."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import get_quantization_config

from pat.checkpoint.card import shown_name
from pat.checkpoint.staging import check_output_folder, staged_folder
from pat.checkpoint.verification_text import verification_batches
from pat.checkpoint.write import save_checkpoint
from pat.errors import PatError
from pat.loading import TokenSetup, check_special_ids, load_base, load_config, padded, quantization_of, stored_dtype
from pat.loading.tokenizer import load_plain_tokenizer
from pat.nll import Example, batches_from_examples, tokenize_examples
from pat.report.results import environment, write_results
from pat.training.arguments import TuneArguments, build_arguments
from pat.training.calibration_text import read_calibration
from pat.training.checkpoints import last_checkpoint
from pat.training.data import TrainingData, check_truncation, load_training_data
from pat.training.results import Size, TuneResult, measure
from pat.training.stages import Stages
from pat.tuner.prepare import check_config

logger = logging.getLogger(__name__)

NUM_VERIFY_ROWS = 16
"""Held-out rows on which the written checkpoint is compared with the model that was trained."""

MIN_VERIFY_TOKENS = 256
"""With fewer in those rows, the text that comes with the package is compared on as well."""

VERIFY_BATCH_SIZE = 4

RATIO_SLACK = 0.01
"""Said before training if the width that can be loaded lies further from the ratio asked for."""


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
    resume_from = _resume_from(arguments)
    pat_config = arguments.pat_config()
    base_config, family = load_config(name, revision=arguments.model.model_revision)
    width = check_config(base_config, family, pat_config)
    if pat_config.pruning_ratio is not None and abs(width.pruning_ratio - pat_config.pruning_ratio) > RATIO_SLACK:
        logger.warning("%.1f %% of the hidden size will be cut: %s.", 100 * width.pruning_ratio, width.reason)
    if pat_config.calibration is not None:
        read_calibration(pat_config.calibration)
    plain_tokenizer = _load_tokenizer(arguments, base_config)
    tokenizer = padded(plain_tokenizer, base_config)
    data = _load_data(arguments, tokenizer)
    num_truncated = check_truncation(tokenizer, data.train, sft.max_length)
    held_out = _examples(tokenizer, data, arguments)

    if num_truncated:
        logger.warning(
            "%d of %d rows have no response left within --max_length %s and are not trained on; raise it to use them.",
            num_truncated,
            len(data.train),
            sft.max_length,
        )
    if data.held_out is not None and len(held_out) < len(data.held_out):
        logger.warning("Held-out figures stand on %d of %d rows, likewise.", len(held_out), len(data.held_out))

    set_seed(sft.seed)
    verify_on = (held_out or _examples(tokenizer, data, arguments, of_training=True))[:NUM_VERIFY_ROWS]
    pad_token_id = cast(int, tokenizer.pad_token_id)
    batches = list(batches_from_examples(verify_on, batch_size=VERIFY_BATCH_SIZE, pad_token_id=pad_token_id))
    if sum(len(example["input_ids"]) for example in verify_on) < MIN_VERIFY_TOKENS:  # short rows, or too long ones
        max_positions = getattr(base_config, "max_position_embeddings", None)
        batches += verification_batches(tokenizer, max_positions=max_positions)
    base = _load_base(arguments)
    tokens = TokenSetup.of(
        base_config,
        base.generation_config,
        plain_tokenizer,
        base_tokenizer=load_plain_tokenizer(name, revision=arguments.model.model_revision),
    )
    stages = Stages(arguments, data, tokenizer, tokens, batches, base=base)
    del base
    assert stages.base is not None
    # Training may load float32 for speed or stability; what is written keeps the dtype of the base's checkpoint.
    dtype = stages.base.dtype
    stored = stored_dtype(base_config) or dtype
    base_size = Size.of(base_config, stored)
    figures = {"base": measure(stages.base, held_out, pad_token_id, stage="base", size=base_size)}

    trained = stages.run(resume_from)
    model = trained.model
    inner_size = (
        base_size
        if trained.compaction is None
        else Size.of(cast(PreTrainedModel, model.get_base_model()).config, stored)
    )
    figures["tuned"] = measure(
        model.get_base_model(), held_out, pad_token_id, stage="tuned", size=inner_size.with_adapter(model)
    )
    nlls = {stage: figure.held_out_nll for stage, figure in figures.items() if figure.held_out_nll is not None}
    provenance = _provenance(arguments, data) | {"num_steps": trained.num_steps, "held_out_nll": nlls}
    with staged_folder(output_dir / "model") as staging:
        parity, cut = save_checkpoint(
            model,
            staging,
            tokens=tokens,
            batches=batches,
            dtype=stored,
            provenance=provenance,
            compaction=trained.compaction,
            progress=not sft.disable_tqdm,
        )
    dense = AutoModelForCausalLM.from_pretrained(output_dir / "model", dtype=dtype).to(model.device)
    dense_size = Size(cut.num_parameters, cut.num_parameters * stored.itemsize)
    figures["dense"] = measure(dense, held_out, pad_token_id, stage="dense", size=dense_size)

    write_results(
        output_dir / "results.json",
        {
            "command": "tune",
            **environment(),
            **provenance,
            "model_name_or_path": shown_name(name),
            "dataset": shown_name(data.source),
            "cut": asdict(cut),
            "pat_config": trained.pat_config | {"base_model_name_or_path": shown_name(name)},
            "training_arguments": sft.to_sanitized_dict() | {"output_dir": output_dir.name, "logging_dir": None},
            "data": _describe(data) | {"num_truncated": num_truncated, "num_held_out": len(held_out)},
            "figures": {stage: asdict(figure) for stage, figure in figures.items()},
            "parity": parity.to_dict(),
            "compaction": None if trained.compaction is None else asdict(trained.compaction),
            "timings": {
                "train_seconds": sum(v for part, v in trained.seconds.items() if part != "preparation"),
                **{f"{part}_seconds": seconds for part, seconds in trained.seconds.items()},
            },
            "log_history": trained.log_history,
        },
    )
    if not arguments.run.keep_checkpoints:
        shutil.rmtree(checkpoints, ignore_errors=True)
    adapter_dir = output_dir / "adapter" if trained.compaction is None else output_dir / "compact" / "adapter"
    return TuneResult(output_dir, output_dir / "model", adapter_dir, figures, parity)


def _load_tokenizer(arguments: TuneArguments, base_config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer with TRL's overrides applied, since data is looked at before the trainer applies them."""
    sft = arguments.sft
    tokenizer = load_plain_tokenizer(str(arguments.model.model_name_or_path), revision=arguments.model.model_revision)
    if sft.pad_token is not None:
        if sft.pad_token not in tokenizer.get_vocab():
            raise PatError(f"Got --pad_token {sft.pad_token!r}, which the tokenizer does not know; give one it has.")
        tokenizer.pad_token = sft.pad_token
    if sft.eos_token is not None:
        if sft.eos_token not in tokenizer.get_vocab():
            raise PatError(f"Got --eos_token {sft.eos_token!r}, which the tokenizer does not know; give one it has.")
        tokenizer.eos_token = sft.eos_token
    template = Path(str(sft.chat_template_path)) if sft.chat_template_path is not None else None
    if template is not None and template.suffix in (".jinja", ".j2"):
        if not template.is_file():
            raise PatError(f"Got --chat_template_path {template}, but there is no such file; give a Jinja file.")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    check_special_ids(tokenizer, base_config.vocab_size)
    return tokenizer


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


def _load_base(arguments: TuneArguments) -> PreTrainedModel:
    """Load the base onto the trainer's device, quantised if asked for."""
    options = arguments.model
    quantization = get_quantization_config(options)
    base = load_base(
        str(options.model_name_or_path),
        revision=options.model_revision,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        quantization_config=quantization,
    )
    if quantization_of(base.config) is None:  # neither by a flag nor in the checkpoint
        return cast(PreTrainedModel, base.to(arguments.sft.device))  # type: ignore[arg-type]
    return cast(
        PreTrainedModel,
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=bool(arguments.sft.gradient_checkpointing)),
    )


def _examples(
    tokenizer: PreTrainedTokenizerBase, data: TrainingData, arguments: TuneArguments, *, of_training: bool = False
) -> Sequence[Example]:
    """Tokenise the held-out rows (or the first training rows) as the trainer does; rows cut to nothing are dropped."""
    rows = data.train.select(range(min(NUM_VERIFY_ROWS, len(data.train)))) if of_training else data.held_out
    return [] if rows is None else tokenize_examples(tokenizer, rows, arguments.sft.max_length)


def _resume_from(arguments: TuneArguments) -> str | None:
    """Return the checkpoint to resume from, after checking that what this run will write is free to be written.

    Raises:
        PatError: there is no such checkpoint, the output folder is in use, or it holds a finished model.
    """
    given: Any = arguments.sft.resume_from_checkpoint  # TRL's parser leaves "true" a string
    if isinstance(given, str) and given.lower() in ("true", "false"):
        given = given.lower() == "true"
    if not given:
        if last_checkpoint(arguments.output_dir / "checkpoints") is not None:
            raise PatError(
                f"{arguments.output_dir}: holds the checkpoints of a run; go on with it by "
                "--resume_from_checkpoint true, or choose another output folder."
            )
        _remove_if_empty(arguments.output_dir / "checkpoints")  # of a run cut off before its first checkpoint
        check_output_folder(arguments.output_dir)
        return None
    check_output_folder(arguments.output_dir / "model")
    checkpoints = arguments.output_dir / "checkpoints"
    found = last_checkpoint(checkpoints) if given is True else given
    if not isinstance(found, str) or not Path(found).is_dir():
        raise PatError(
            f"Got resume_from_checkpoint={given}, but there is no checkpoint "
            f"{'in ' + str(checkpoints) if given is True else 'at that path'}; leave the flag out to start anew."
        )
    return found


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _describe(data: TrainingData) -> dict[str, Any]:
    paths = {"source": data.source, "held_out_source": data.held_out_source}
    facts = ("format", "template", "fingerprint", "num_rows", "num_dropped")
    shown = {key: path and shown_name(path) for key, path in paths.items()}
    return shown | {fact: getattr(data, fact) for fact in facts}


def _provenance(arguments: TuneArguments, data: TrainingData) -> dict[str, Any]:
    return {
        "model_name_or_path": arguments.model.model_name_or_path,
        "dataset": data.source,
        "recipe": arguments.run.recipe,
        "seed": arguments.sft.seed,
    }
