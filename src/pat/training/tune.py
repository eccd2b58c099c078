"""The whole recipe, top to bottom: base model + data -> tuned, smaller, standard checkpoint."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from pat import ranks
from pat.checkpoint.card import Cut, shown_name
from pat.checkpoint.places import CHECKPOINTS, MODEL, REPORT, RESULTS
from pat.checkpoint.staging import discard, staged_folder
from pat.checkpoint.verify import Parity
from pat.checkpoint.write import examine, save_checkpoint
from pat.data.end_token import taught_to_stop, warn_of_end_token
from pat.errors import PatError, one_line
from pat.loading import TokenSetup, empty_model, load_config, stored_dtype
from pat.loading.tokenizer import load_plain_tokenizer
from pat.report.progress import bars_of_datasets, hidden, phase, quiet_transformers
from pat.report.records import collected_warnings, to_json
from pat.training.arguments import TuneArguments, build_arguments
from pat.training.base import load, load_again
from pat.training.callbacks.save import saving
from pat.training.callbacks.slow import SlowSteps
from pat.training.engines.deepspeed import check_goes_on
from pat.training.inputs.prepare import Prepared, prepare
from pat.training.outcome.held_out import write_held_out
from pat.training.outcome.measure import measure, warn_of_forgetting, warn_of_losses
from pat.training.outcome.provenance import provenance, recorded_facts
from pat.training.outcome.push import open_repository, push
from pat.training.outcome.report import report_of_run
from pat.training.outcome.results import ModelFigures, Size, TuneRecord, TuneResult
from pat.training.outcome.samples import greedy_answers, paired
from pat.training.preflight.announce import announce
from pat.training.preflight.check import check, check_run, warn_of_warmup
from pat.training.preflight.few_rows import warn_of_few_rows
from pat.training.preflight.rehearsal import rehearse
from pat.training.preflight.threads import choose_threads, remember_threads, restored_threads
from pat.training.run.base_scores import BaseScores
from pat.training.run.folder import Start, clear, find_finished, find_start, run_folder, sweep
from pat.training.run.kept import telling_what_is_kept
from pat.training.run.run_file import RunFile
from pat.training.run.trained import Trained
from pat.training.stages import Stages
from pat.training.trainer import log_often
from pat.whole_files import write_whole

logger = logging.getLogger(__name__)


def tune(**flags: Any) -> TuneResult:
    """Tune and prune in one call: every keyword is a flag of `pat tune` (TRL's, the adapter's and the method's).

    Example:
        `pat.tune(model_name_or_path="base", dataset_name="data.jsonl", pruning_ratio=0.25, output_dir="out")`

    Raises:
        PatError: an argument, the model or the data cannot be used; nothing has been written.
        RunFailed: training became non-finite, or the written checkpoint is not the trained model.
    """
    return run_tune(build_arguments(**flags), chooses_threads=False)


def run_tune(
    arguments: TuneArguments, callbacks: Sequence[TrainerCallback] = (), *, chooses_threads: bool = True
) -> TuneResult:
    """Run `pat tune` from parsed arguments, see `tune`.

    Args:
        arguments: of the run.
        callbacks: further ones for the trainers of both stages.
        chooses_threads: whether a CPU's number of threads is chosen here. A script's own process has chosen it.
    """
    shown = not arguments.sft.disable_tqdm
    with (
        _together(arguments),
        collected_warnings() as warnings,
        restored_threads(),
        hidden(not shown),
        bars_of_datasets(shown=shown),
        quiet_transformers(),
    ):
        # Everything that can be wrong is found before the weights are loaded, and before anything is written.
        checked, asked = ranks.first_then_others(lambda: check(arguments)), arguments
        arguments = checked.arguments
        data = ranks.first_then_others(lambda: prepare(arguments, checked.base_config))
        run = ranks.first_then_others(lambda: check_run(asked, checked, data))
        if (record := ranks.first(lambda: find_finished(arguments, checked.checkpoint))) is not None:
            return ranks.first(partial(_end_again, arguments, run, record))
        threads = choose_threads(arguments.sft, checked, run.num_threads) if chooses_threads else None
        run = remember_threads(run, arguments.sft)
        with phase("Trying the options in a step of a tiny model"):
            num_steps = rehearse(arguments, data, data.vocabulary.config_of(checked.base_config), checked.family)
        log_often(arguments.sft, num_steps, arguments.given)
        warn_of_warmup(arguments.sft, num_steps)
        repository = ranks.first(lambda: open_repository(arguments))
        start = ranks.first(lambda: _begin(arguments, checked.checkpoint, num_steps))

        base = load(arguments, data)
        kept = None
        if not arguments.run.overwrite:
            kept = ranks.first(partial(BaseScores.read, arguments.output_dir / CHECKPOINTS, run, base))
        ranks.first_alone(lambda: clear(arguments, start))
        # Training may load float32 for speed or stability; what is written keeps the dtype of the base's checkpoint.
        dtype, device = base.dtype, base.device
        stored = stored_dtype(checked.base_config, revision=arguments.model.model_revision) or dtype
        model = arguments.model
        size = Size.of_base(str(model.model_name_or_path), checked.base_config, stored, revision=model.model_revision)
        step_seconds = announce(
            arguments, checked, data, base, num_steps, run, start=start, measures_base=kept is None, threads=threads
        )
        warn_of_few_rows(data, checked.shape.pruning_ratio, num_steps, run.rows_per_step)
        scores = kept or ranks.first(partial(BaseScores.of, base, data, size))
        data.vocabulary.fit(base)
        for end in data.ends:
            warn_of_end_token(data.vocabulary, base, end, arguments.model.lora_modules_to_save or ())
        scores = kept or ranks.first(partial(scores.with_answers, base, data))
        tokens = _tokens(arguments, data, base, data.vocabulary.config_of(checked.base_config))
        stages = Stages(
            arguments,
            data,
            tokens,
            start.phases(run),
            num_steps,
            base,
            partial(load_again, arguments, data),
            scores,
            (*callbacks, *saving(arguments), SlowSteps(step_seconds, arguments.run.same_command)),
        )
        del base  # nobody else may hold it, or it stays in memory beside the small model
        trained = stages.run(start)

        def finish() -> TuneResult:
            record = _finish(
                arguments,
                data,
                tokens,
                trained,
                scores,
                is_trained=start.is_trained,
                size=size,
                stored=stored,
                warnings=warnings,
                device=str(device),
                dtype=str(dtype).removeprefix("torch."),
            )
            return _end(arguments, trained.run.after("model"), TuneResult(arguments.output_dir, record), repository)

        return ranks.first(finish)


@contextmanager
def _together(arguments: TuneArguments) -> Iterator[None]:
    """Hold the run's folder, in the first process; the others know whether that worked, and are silent."""
    _ = arguments.sft.device  # connects the processes
    ranks.meet()
    with ExitStack() as stack:
        stack.enter_context(telling_what_is_kept(arguments))
        stack.enter_context(ranks.only_first_speaks())
        ranks.first_alone(lambda: stack.enter_context(run_folder(arguments.output_dir)))
        yield


def _begin(arguments: TuneArguments, checkpoint: str | None, num_steps: int) -> Start:
    start = find_start(arguments, checkpoint, num_steps)
    check_goes_on(None if start.is_trained else start.checkpoint, arguments)
    return start


def _finish(
    arguments: TuneArguments,
    data: Prepared,
    tokens: TokenSetup,
    trained: Trained,
    scores: BaseScores,
    *,
    is_trained: bool,
    size: Size,
    stored: torch.dtype,
    **found: Any,
) -> TuneRecord:
    """Merge, write, verify and measure what has been trained, and write the record of the run."""
    folder, figures, rows = arguments.output_dir, {"base": scores.figures}, scores.losses()
    if trained.data.is_streamed and not arguments.sft.disable_tqdm:
        print(trained.data.describe_read(), file=sys.stderr)
    inner = cast(PreTrainedModel, trained.model.get_base_model())
    size = (size if trained.compaction is None else Size.of(inner.config, stored)).with_adapter(trained.model)
    figures["tuned"] = measure(inner, data, "tuned", size, rows)
    with phase("Writing the model, and comparing it with the tuned one"):
        examined = _examine(arguments, data, trained, stored) if is_trained else None
        parity, cut = examined or _write(arguments, data, tokens, trained, figures, stored)
    trained.run.after("model").write(folder)
    dense: Any = AutoModelForCausalLM.from_pretrained(folder / MODEL, dtype=inner.dtype)
    size = Size(cut.num_parameters, cut.num_parameters * stored.itemsize)
    figures["dense"] = measure(dense.to(inner.device), data, "dense", size, rows)
    samples = paired(scores.answers or [], greedy_answers(dense, data), data)
    warn_of_losses(figures, dense.config.get_text_config().vocab_size)
    warn_of_forgetting(figures)
    record = _record(arguments, data, trained, cut=cut, figures=figures, parity=parity, samples=samples, **found)
    write_held_out(folder, data.held_out_rows)
    write_whole(folder / RESULTS, to_json(record))
    return record


def _end_again(arguments: TuneArguments, run: RunFile, record: TuneRecord) -> TuneResult:
    repository = None if "pushed" in run.finished else open_repository(arguments)
    return _end(arguments, run, TuneResult(arguments.output_dir, record, was_finished=True), repository)


def _end(arguments: TuneArguments, run: RunFile, result: TuneResult, repository: str | None) -> TuneResult:
    """Do what is left when the figures are written; of a run that is finished nothing is."""
    folder = arguments.output_dir
    if "results" not in run.finished:
        run = run.after("results")
        run.write(folder)
    if not (folder / REPORT).exists():
        report_of_run(folder)
    if not arguments.run.keep_checkpoints:
        discard(folder / CHECKPOINTS)
    sweep(folder)
    if repository is not None:
        push(arguments, repository, result.model_dir)
        run.after("pushed").write(folder)
    return result


def _record(arguments: TuneArguments, data: Prepared, trained: Trained, **found: Any) -> TuneRecord:
    name, training_arguments = shown_name(arguments.run.model_name_or_path), arguments.sft.to_sanitized_dict()
    return TuneRecord(
        model_name_or_path=name,
        dataset=trained.data.source,
        pat_config=trained.pat_config | {"base_model_name_or_path": name},
        training_arguments=training_arguments | {"output_dir": arguments.output_dir.name, "logging_dir": None},
        data=trained.data,
        general_text=None if data.general is None else data.general.name,
        compaction=trained.compaction,
        teacher=trained.teacher,
        timings=trained.timings(),
        log_history=trained.log_history,
        **recorded_facts(arguments, data, trained),
        **found,
    )


def _tokens(arguments: TuneArguments, data: Prepared, base: PreTrainedModel, base_config: Any) -> TokenSetup:
    """Return what is written beside every model and adapter of the run."""
    name, revision = arguments.run.model_name_or_path, arguments.model.model_revision
    written = data.vocabulary.written or data.vocabulary.tokenizer
    own = load_plain_tokenizer(name, revision=revision)
    tokens = TokenSetup.of(base_config, base.generation_config, written, base_tokenizer=own)
    return taught_to_stop(tokens, data.ends)


def _examine(
    arguments: TuneArguments, data: Prepared, trained: Trained, dtype: torch.dtype
) -> tuple[Parity, Cut] | None:
    """Return the figures of a dense checkpoint that is there already; None if there is none that is the tuned model."""
    folder = arguments.output_dir / MODEL
    if not folder.is_dir():
        return None
    try:
        dense = empty_model(load_config(str(folder))[0], dtype)
        return examine(trained.model, folder, dense, data.verify_on, compaction=trained.compaction)
    except (PatError, SafetensorError, OSError, ValueError, RuntimeError) as error:  # of whoever opens its files
        logger.warning("%s is written anew: %s", folder, one_line(error))
        return None


def _write(
    arguments: TuneArguments,
    data: Prepared,
    tokens: TokenSetup,
    trained: Trained,
    figures: dict[str, ModelFigures],
    dtype: torch.dtype,
) -> tuple[Parity, Cut]:
    """Merge, write and verify the dense checkpoint."""
    # One that is there already is not that of the adapter, see `_examine`.
    with staged_folder(arguments.output_dir / MODEL, replaces=True) as staging:
        return save_checkpoint(
            trained.model,
            staging,
            tokens=tokens,
            batches=data.verify_on,
            dtype=dtype,
            provenance=provenance(arguments, data, trained, figures),
            compaction=trained.compaction,
            progress=not arguments.sft.disable_tqdm,
        )
