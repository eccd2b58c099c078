"""Check a run before anything is loaded or written."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from trl import SFTConfig

from pat import ranks
from pat.checkpoint.places import RUN_FILE
from pat.data.files import is_saved
from pat.data.vocabulary import trimmed_budget
from pat.errors import PatError
from pat.families import Family
from pat.loading import load_config
from pat.paths import expand
from pat.serving import trouble
from pat.shape import AXES, LARGE_RATIO, Shape
from pat.surgery.residual import ResidualStream
from pat.training.arguments import TuneArguments
from pat.training.distillation.teacher import check_distillation, check_teacher
from pat.training.engines.deepspeed import check_deepspeed, check_deepspeed_run
from pat.training.engines.engine import check_engine, quantises
from pat.training.inputs.calibration_text import read_calibration
from pat.training.inputs.prepare import Prepared
from pat.training.run.folder import check_folder
from pat.training.run.run_file import RunFile, tokens_fingerprint
from pat.tuner.compaction import check_compactable
from pat.tuner.config import PatConfig
from pat.tuner.model import PatModel
from pat.tuner.options import PatOptions
from pat.tuner.prepare import check_config

logger = logging.getLogger(__name__)

OF_A_SOFT_MASK = ("mask", "mask_lr_multiplier", "active_loss_weight")
"""Options that act only while the mask is soft."""

OF_OPERATORS = ("identity_loss_weight", "operator_lr_multiplier")
"""Options that act only while there are operators: at full width, if the hidden size is cut."""

NEEDED = {
    "bnb_4bit_quant_type": "load_in_4bit",
    "use_bnb_nested_quant": "load_in_4bit",
    "bnb_4bit_quant_storage": "load_in_4bit",
    "packing_strategy": "packing",
    "liger_kernel_config": "use_liger_kernel",
    "eval_steps": "eval_strategy",
    "eval_on_start": "eval_strategy",
    "eval_packing": "eval_strategy",
    "eval_delay": "eval_strategy",
    "eval_accumulation_steps": "eval_strategy",
    "eval_do_concat_batches": "eval_strategy",
    "load_best_model_at_end": "eval_strategy",
    "distill_weight": "distill",
    "distill_top_k": "distill",
    "hub_model_id": "push_to_hub",
    "hub_private_repo": "push_to_hub",
    "hub_revision": "push_to_hub",
}
"""Flags that have no effect, here as elsewhere, unless another one is given as well."""

WITHOUT_ARGUMENTS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "lomo", "adalomo"),
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
)
"""Optimizers for which transformers does not look at `optim_args`."""

OF_TARGETS = ("galore_", "apollo_")
"""How the names of those begin that act on some modules otherwise than on the rest."""


@dataclass(frozen=True)
class Checked:
    """Facts of a run that are known once its arguments, its folder and the base's configuration are checked."""

    arguments: TuneArguments
    """Those of the run; of the ratio there is left what a trimmed vocabulary does not save."""
    base_config: Any
    """Configuration of the base as it is stored."""
    family: Family
    shape: Shape
    checkpoint: str | None
    """Checkpoint that the run is told to go on from."""


def check(arguments: TuneArguments) -> Checked:
    """Check what needs neither data nor weights.

    Raises:
        PatError: the output folder is in use, there is no such checkpoint or model, or the width is impossible.
    """
    checkpoint = check_folder(arguments)
    _warn_of_idle_flags(arguments)
    check_deepspeed(arguments)
    pat_config = arguments.pat_config()
    base_config, family = load_config(arguments.run.model_name_or_path, revision=arguments.model.model_revision)
    check_engine(arguments, base_config)
    trimmed_config = base_config
    if (size := arguments.run.vocabulary_size) is not None:
        trimmed_config, rest = trimmed_budget(pat_config, base_config, size)
        arguments = replace(arguments, pat=replace(arguments.pat, pruning_ratio=rest))
        pat_config = arguments.pat_config()
    shape = check_config(trimmed_config, family, pat_config)
    is_quantised = quantises(arguments, base_config)
    check_deepspeed_run(arguments, shape, is_quantised=is_quantised)
    _warn_of_idle_mask(arguments, shape, goes_small=not (arguments.run.no_compact or is_quantised))
    if shape.pruning_ratio > LARGE_RATIO:
        logger.warning(
            "A cut of %.0f %% of the parameters is more than has been shown to work; expect a much worse model.",
            100 * shape.pruning_ratio,
        )
    if (engines := trouble(family.model_type, [name for name in AXES if shape.cuts(name)])) is not None:
        logger.warning("%s", engines)
    check_distillation(arguments, base_config)
    if pat_config.calibration is not None:
        read_calibration(pat_config.calibration)
    return Checked(arguments, base_config, family, shape, checkpoint)


def check_run(arguments: TuneArguments, checked: Checked, data: Prepared) -> RunFile:
    """Return the description of this run, after comparing it with that of the run that it goes on with.

    Raises:
        PatError: that run has another configuration.
    """
    check_teacher(arguments, checked.base_config, data.vocabulary)
    run = RunFile.of(arguments, checked.base_config, data.record.fingerprint, tokens_fingerprint(data))
    if arguments.run.overwrite:
        return run
    if (own := RunFile.read(arguments.output_dir)) is not None:
        own.check(run, arguments.output_dir)
        if own.rows_per_step not in (None, run.rows_per_step):
            if arguments.run.streaming:
                raise PatError(
                    f"Got {run.rows_per_step} rows a step for the run in {arguments.output_dir}, which has had "
                    f"{own.rows_per_step}; expected as many: a stream goes on after the rows of all steps."
                )
            logger.warning(
                "A step takes %s rows from here on, after %s; steps are counted on, so that the run follows "
                "another schedule than it began with.",
                run.rows_per_step,
                own.rows_per_step,
            )
        return replace(own, rows_per_step=run.rows_per_step)
    if checked.checkpoint is None:
        return run
    folders = [arguments.output_dir.resolve(), *Path(checked.checkpoint).resolve().parents]
    for folder in folders:
        if (other := RunFile.read(folder)) is not None:
            other.check(run, folder)
            return replace(run, num_threads=other.num_threads)
    logger.warning("%s: has no %s, so its configuration is not known.", checked.checkpoint, RUN_FILE)
    return run


def compacts(no_compact: bool, config: PatConfig, *, warns: bool = False) -> bool:
    """Tell whether a run goes on with the small model at the milestone, and, if so wanted, why it cannot."""
    if no_compact:
        return False
    try:
        check_compactable(config)
    except PatError as obstacle:
        if warns:
            logger.warning("Training goes on at full width after the milestone. %s", obstacle)
        return False
    return True


def warn_of_warmup(sft: SFTConfig, num_steps: int) -> None:
    """Say so if the learning rate grows for longer than a run has steps."""
    if (num_warm := sft.get_warmup_steps(num_steps)) >= num_steps > 1:
        logger.warning(
            "The learning rate grows over %s steps (--warmup_steps), and the run has %s, so that it never gets to %g; "
            "warm up for fewer.",
            f"{num_warm:,}",
            f"{num_steps:,}",
            sft.learning_rate,
        )


def warn_without_rotation(tuner: PatModel) -> None:
    """Say so if the weights rule out the rotation, which `pat plan`, that does not see them, left open."""
    config, stream = tuner.pat_config(), cast(ResidualStream, tuner.residual_stream)
    cuts_hidden = tuner.mask().num_kept < tuner.mask().size
    open_to_rotation = config.rotation == "auto" and cuts_hidden and not stream.family.has_post_norms
    if open_to_rotation and config.resolved_rotation == "none":
        logger.warning(
            "The basis is not rotated: the final gains of this tied model are too far apart (gain_tolerance=%g), or "
            "trained. Channels are chosen among those that there are.",
            config.gain_tolerance,
        )


def _warn_of_idle_flags(arguments: TuneArguments) -> None:
    given = {f.name: f for part in _parts(arguments) for f in fields(part)}
    values = {name: value for part in _parts(arguments) for name, value in vars(part).items()}
    for name, needed in NEEDED.items():
        if values[name] != given[name].default and values[needed] in (False, "no"):
            logger.warning("%s=%s has no effect without --%s.", name, values[name], needed)
    optim = values["optim"].value
    of_many = [n for n in given if n.startswith("ddp_") or n == "eval_use_gather_object"]
    for names, is_idle, where in (
        (of_many, ranks.num_processes() == 1, "in one process"),
        (
            ["dataset_config"],
            all(map(_has_one_configuration, arguments.run.dataset_names)),
            "on a local file, or what `save_to_disk` has left",
        ),
        (["model_revision"], os.path.isdir(expand(arguments.run.model_name_or_path)), "on a model folder"),
        (["optim_args"], optim in WITHOUT_ARGUMENTS, f"on the optimizer {optim}"),
        (["optim_target_modules"], not optim.startswith(OF_TARGETS), f"on the optimizer {optim}"),
    ):
        for name in names if is_idle else ():
            if values[name] != given[name].default:
                logger.warning("%s=%s has no effect %s.", name, values[name], where)


def _warn_of_idle_mask(arguments: TuneArguments, shape: Shape, *, goes_small: bool) -> None:
    names: tuple[str, ...]
    if arguments.pat.milestone_share(cuts_hidden=shape.cuts("hidden")) == 0:
        operators = OF_OPERATORS if goes_small and shape.cuts("hidden") else ()
        names, where = (*OF_A_SOFT_MASK, *operators), "on a mask that is hard from the start; raise --milestone"
    elif arguments.pat.mask == "frozen":
        names, where = OF_A_SOFT_MASK[1:], "on a frozen mask"
    else:
        return
    for name in names:
        if (value := getattr(arguments.pat, name)) != getattr(PatOptions, name):
            logger.warning("%s=%s has no effect %s.", name, value, where)


def _has_one_configuration(name: str) -> bool:
    path = expand(name)
    return os.path.isfile(path) or (os.path.isdir(path) and is_saved(Path(path)))


def _parts(arguments: TuneArguments) -> tuple[Any, ...]:
    return arguments.model, arguments.sft, arguments.run, arguments.distill
