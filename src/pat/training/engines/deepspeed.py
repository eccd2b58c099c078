"""DeepSpeed: which runs of `pat tune` it trains, and from which checkpoints it goes on.

ZeRO-1 and ZeRO-2 leave the model whole in every process and share out the optimizer's state, which DeepSpeed keeps in
parts of its own form. Only DeepSpeed, in as many processes, can go on from these. So it cannot take over the state of
stage one at the milestone, and trains the runs that have nothing to hand over (docs/adr/0022).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pat import ranks
from pat.errors import PatError
from pat.paths import is_inside
from pat.training.run.whole import num_parts, parts_folder
from pat.tuner.zero import NO_ZERO_3

if TYPE_CHECKING:
    from pat.shape import Shape
    from pat.training.arguments import TuneArguments

STAGES = (1, 2)
"""Stages of ZeRO that leave the weights whole, which are read at calibration, at the cut and at the merge."""


def check_deepspeed(arguments: TuneArguments) -> None:
    """Check what needs no model of a run under DeepSpeed; transformers can describe none under ZeRO-3.

    Raises:
        PatError: DeepSpeed cannot train it as asked.
    """
    sft = arguments.sft
    if (plugin := sft.deepspeed_plugin) is None:
        return
    if plugin.zero_stage == 3:
        raise PatError(NO_ZERO_3)
    own = [name for name in ("optimizer", "scheduler") if name in plugin.deepspeed_config]
    precision = "bf16" if sft.bf16 else "fp16"
    _refuse(
        (plugin.zero_stage not in STAGES, f"ZeRO-{plugin.zero_stage}", "set zero_stage: 2"),
        (
            bool(own),
            f"a configuration with {' and '.join(own)}",
            "leave it out there: --optim, --learning_rate and --lr_scheduler_type say it",
        ),
        (sft.bf16 or sft.fp16, f"--{precision}", f"set --{precision} false: it would cast all that is trained"),
        (sft.torch_compile, "--torch_compile", "leave it out"),
        (arguments.distill.distill, "--distill", "leave it out, or use DDP"),
    )


def check_deepspeed_run(arguments: TuneArguments, shape: Shape, *, is_quantised: bool) -> None:
    """Check what a run under DeepSpeed is to do with its model.

    Args:
        arguments: of the run.
        shape: of the small model.
        is_quantised: whether the base is.

    Raises:
        PatError: DeepSpeed cannot do that.
    """
    if arguments.sft.deepspeed_plugin is None:
        return
    milestone = arguments.pat.milestone_share(cuts_hidden=shape.cuts("hidden"))
    _refuse(
        (
            milestone > 0 and not arguments.run.no_compact,
            f"a milestone of {milestone:g}",
            "the optimizer's state cannot be handed over there: set --milestone 0 or --no_compact true, or use FSDP2",
        ),
        (is_quantised, "a quantised base", "load it in 16 bits, or use DDP"),
    )


def check_goes_on(checkpoint: str | None, arguments: TuneArguments) -> None:
    """Check that a run can go on from a checkpoint, where DeepSpeed trains the run or has written the checkpoint.

    Raises:
        PatError: it cannot.
    """
    if checkpoint is None:
        return
    parts, uses = num_parts(Path(checkpoint)), arguments.sft.deepspeed_plugin is not None
    anew = "or start anew with --overwrite true"
    if parts is not None and (not uses or parts != ranks.num_processes()):
        got = f"{ranks.num_processes()} processes" if uses else "another engine"
        raise PatError(
            f"{checkpoint}: DeepSpeed has written it in a part for each of {parts} processes, and got {got}; go on "
            f"under DeepSpeed in as many, {anew}."
        )
    if uses and parts is None:
        raise PatError(
            f"{checkpoint}: was not written by DeepSpeed, which goes on from its own checkpoints alone; go on with "
            f"the engine that the run began with, {anew}."
        )
    if uses and not is_inside(str(parts_folder(Path(checkpoint))), arguments.output_dir):
        raise PatError(
            f"{checkpoint}: lies outside of {arguments.output_dir}, and DeepSpeed opens checkpoints as pickles, which "
            "can run programs; go on in the folder of that run, or with another engine."
        )


def _refuse(*rows: tuple[Any, str, str]) -> None:
    for wrong, what, remedy in rows:
        if wrong:
            raise PatError(f"Got {what} with DeepSpeed; {remedy} (see docs/several-gpus.md).")
