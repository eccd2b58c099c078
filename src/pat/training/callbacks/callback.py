"""The callback that turns any transformers or TRL trainer into a pruning-aware one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from peft.utils.other import TrainableTokensWrapper
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pat.errors import PatError
from pat.method.schedule import milestone_step
from pat.training.callbacks.calibration_data import calibration_batches
from pat.training.callbacks.regularise import Regularisers, loss_scale_of
from pat.training.engines.accelerated import HALVES, check_float32, check_zero, leave_sharded_dtypes
from pat.tuner.model import PatModel, find_tuner

logger = logging.getLogger(__name__)

LOGGED = {
    "hidden": "pat/active_channels",
    "mlp": "pat/active_mlp_channels",
    "heads": "pat/active_key_value_heads",
    "layers": "pat/active_layers",
}
"""Names under which the numbers of active entries are logged, by axis."""


class PatCallback(TrainerCallback):
    """Drive the mask, the gates and the regularisers of a PAT adapter from a trainer's optimizer steps.

    At train begin it calibrates rotation and order of the channels if nobody has (from `PatConfig.calibration`, else
    from a sample of the training examples); at every step it sets the schedule (paper, eq. 6-8), and refits the
    writers when their gates become hard; and it has the gradients of both regularisers (eq. 9 and 11) added to those of
    the task, once in a step, as `Regularisers` describes: they are clipped with them and averaged over processes with
    them, and are not in the logged loss. It never stops a run and never compacts.

    Regulariser values are written to `state.log_history` beside the trainer's logs, and added to the logs themselves,
    so that every callback after this one shows them: the console's (the trainer adds it last) and whatever follows in
    `callbacks`. The reporters that the trainer makes of `report_to` come first and do not see them; to have them there
    set `report_to="none"` and pass `callbacks=[PatCallback(), TensorBoardCallback()]`.
    """

    def __init__(self) -> None:
        self._adapter: str | None = None
        self._milestone_step = 0
        self._regularisers = Regularisers()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put right what trainers do to adapters without knowing of the mask: halved precision, copies half made.

        Raises:
            PatError: the outcome of a calibration has been cast to half precision, or the trainer is about to wrap the
                model in `nn.DataParallel`.
        """
        tuner = find_tuner(kwargs["model"])
        if tuner is None:
            return
        if args.n_gpu > 1 and not _is_quantised(tuner):  # then the trainer wraps it
            raise PatError(
                f"Got {args.n_gpu} GPUs in one process, over which the trainer would replicate the model "
                "(nn.DataParallel) without the mask's state; set CUDA_VISIBLE_DEVICES=0, or start one process for each "
                "GPU (accelerate launch, torchrun)."
            )
        _restore_float32(tuner)
        _complete_copies(tuner)
        complete_head(kwargs["model"])
        check_zero()
        leave_sharded_dtypes()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the adapter, fix the milestone, calibrate if needed, and set the mask to the first step.

        Raises:
            PatError: the model carries no PAT adapter, or an engine has cast it to half precision.
        """
        tuner = self._tuner(kwargs["model"])
        self._adapter = tuner.adapter
        check_float32(tuner)
        config = tuner.pat_config(self._adapter)
        milestone = config.soft_share
        self._milestone_step = milestone_step(milestone, state.max_steps)
        if milestone > 0 and self._milestone_step == 0:
            open_gates = [
                gate for gate in tuner.all_gates(self._adapter) if not gate.hardened and gate.num_kept < gate.size
            ]
            if not tuner.needs_calibration(self._adapter) and not all(gate.has_prior for gate in open_gates):
                raise PatError(
                    f"Got a milestone of {milestone:g} of {state.max_steps} optimizer steps, which rounds to step 0, "
                    "where nothing is known by which to choose channels; train for "
                    f"{math.floor(0.5 / milestone) + 1} steps or more (more data or epochs, smaller batches)."
                )
            logger.warning(
                "A milestone of %g of %d optimizer steps rounds to step 0: the mask is hard from the start, its "
                "channels chosen by the calibration alone. Train longer or raise the milestone (--milestone) to train "
                "the mask.",
                milestone,
                state.max_steps,
            )
        kind = _learns_from(args, kwargs.get("train_dataloader"))
        if kind is not None and not tuner.mask(self._adapter).hardened:
            logger.warning(
                "Training from %s starts with a soft mask: until step %d it takes channels away, and the policy is no "
                "longer the model whose answers are judged. Prune by supervised fine-tuning first, merge, and train "
                "the small model from %s.",
                kind,
                self._milestone_step,
                kind,
            )
        if tuner.needs_calibration(self._adapter):
            with _autocast(args, tuner):
                calibrate = _runnable(kwargs["model"], tuner, "calibrate")
                order = calibrate(self._calibration(tuner, kwargs), self._adapter)
            if order is not None:
                logger.info(
                    "Calibrated rotation (%s): the kept channels hold %.1f %% of the stream's energy, %d are pinned.",
                    config.resolved_rotation,
                    100 * order.energy_kept,
                    int(order.pinned.sum()),
                )
                figures = {"pat/calibration_tokens": order.num_tokens, "pat/energy_kept": order.energy_kept}
                state.log_history.append(figures | {"step": state.global_step})
        self._move(args, tuner, state, kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the mask for the step that begins; a best checkpoint is only picked among those that can be merged."""
        tuner = self._tuner(kwargs["model"])
        self._move(args, tuner, state, kwargs)
        config = tuner.pat_config(self._adapter)
        self._regularisers.arm(
            kwargs["model"],
            {"active": tuner.all_gates(self._adapter), "identity": tuner.operators(self._adapter).values()},
            {"active": config.active_loss_weight, "identity": config.identity_loss_weight},
            loss_scale=loss_scale_of(kwargs.get("optimizer")),
        )
        if not tuner.mask(self._adapter).hardened:
            state.best_metric = state.best_model_checkpoint = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the regularisers' gradients were among those of the step.

        Raises:
            RunFailed: they were not.
        """
        self._regularisers.check()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the mask on, so that what is evaluated or saved now is the model of the next step."""
        self._move(args, self._tuner(kwargs["model"]), state, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model's parameters without hooks."""
        self._regularisers.release()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the regularisers apart from the task's loss."""
        logs = kwargs.get("logs")
        if self._adapter is None or logs is None or "loss" not in logs:
            return
        tuner = self._tuner(kwargs["model"])
        by_axis = tuner.gates_by_axis(self._adapter)
        cut = {axis: gates for axis, gates in by_axis.items() if gates[0].num_kept < gates[0].size}
        # The mean over the layers.
        active = {LOGGED[axis]: round(sum(gate.num_active for gate in cut[axis]) / len(cut[axis])) for axis in cut}
        values = {f"pat/{kind}_loss": value for kind, value in self._regularisers.values().items()} | active
        logs.update(values)
        state.log_history.append(values | {"step": state.global_step})

    def _move(self, args: TrainingArguments, tuner: PatModel, state: TrainerState, kwargs: dict[str, Any]) -> None:
        """Move mask and gates to the trainer's step; if that makes gates hard, refit the writers behind them."""
        tuner.set_step(state.global_step, self._milestone_step, self._adapter)
        if any(gate.awaits_refit for gate in tuner.gates(self._adapter).values()):
            with _autocast(args, tuner):
                refit = _runnable(kwargs["model"], tuner, "refit")
                num_tokens = refit(self._calibration(tuner, kwargs), self._adapter)
            state.log_history.append({"pat/refit_tokens": num_tokens, "step": state.global_step})

    def _calibration(self, tuner: PatModel, kwargs: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Yield batches to calibrate on; nothing is looked at before the first is asked for."""
        config = tuner.pat_config(self._adapter)
        yield from calibration_batches(config, kwargs.get("train_dataloader"), kwargs.get("processing_class"))

    def _tuner(self, model: torch.nn.Module) -> PatModel:
        tuner = find_tuner(model)
        if tuner is None:
            raise PatError(
                f"Got a {type(model).__name__} without a PAT adapter; wrap it by get_peft_model(base, PatConfig(...)) "
                "before giving it to the trainer, or leave PatCallback out."
            )
        return tuner


def _runnable(model: torch.nn.Module, tuner: PatModel, method: str) -> Callable[..., Any]:
    """Return a method of the tuner that runs the model. A sharded one only runs from its outermost module (FSDP2)."""
    if not isinstance(model, FSDPModule):
        return cast(Callable[..., Any], getattr(tuner, method))
    register_fsdp_forward_method(model, method)
    return cast(Callable[..., Any], getattr(model, method))


def _autocast(args: TrainingArguments, tuner: PatModel) -> torch.autocast:
    """Return the autocast that the trainer runs the model under, for what is measured outside of its steps."""
    device = next(tuner.model.parameters()).device.type
    return torch.autocast(device, torch.float16 if args.fp16 else torch.bfloat16, enabled=args.fp16 or args.bf16)


def _restore_float32(tuner: PatModel) -> None:
    """Undo the cast to bfloat16 that TRL gives adapters of quantised models.

    Raises:
        PatError: the outcome of a calibration was cast as well, which cannot be undone.
    """
    for gate in tuner.all_gates():
        gate.restore_float32()
    for module in [*tuner.all_gates(), *tuner.operators().values()]:
        for parameter in module.parameters():
            if parameter.dtype in HALVES:
                parameter.data = parameter.data.float()
    if _is_quantised(tuner):
        # LoRA's factors, too: peft keeps them in float32, and cast, the live model would not be the one that is saved.
        for parameter in tuner.model.parameters():
            if parameter.requires_grad and parameter.dtype in HALVES:
                parameter.data = parameter.data.float()


def _is_quantised(tuner: PatModel) -> bool:
    return any(getattr(tuner.model, name, False) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"))


def complete_head(model: Any) -> None:
    """Give a head that peft has wrapped, so that it trains single tokens, the bias that TRL asks it for: none."""
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.register_parameter("bias", None)


def _complete_copies(tuner: PatModel) -> None:
    """Give the mask's state to copies of the active adapter that were made of its parameters alone.

    TRL's DPOTrainer makes its reference "ref" so. Order, basis and kept channels are buffers: without them the
    reference of a tuned adapter would be another model than the policy starts from.
    """
    source = tuner.adapter
    for name in tuner.peft_config:
        gates = tuner.all_gates(name)
        untouched = all(gate.milestone_step is None and not gate.calibrated for gate in gates)
        if name == source or not untouched or tuner.pat_config(name) != tuner.pat_config(source):
            continue
        parameters = dict(tuner.model.named_parameters())
        pairs = ((path.replace(f".{source}.", f".{name}."), value) for path, value in parameters.items())
        if all(path not in parameters or torch.equal(parameters[path], value) for path, value in pairs):
            for gate, of_source in zip(gates, tuner.all_gates(source), strict=True):
                gate.load_state_dict(of_source.state_dict())


def _learns_from(args: TrainingArguments, dataloader: Any) -> str | None:
    """Tell by the columns of its data whether a trainer learns from preferences or rewards; None if from neither."""
    if any(name.startswith("teacher") for name in vars(args)):
        return None  # distillation trains on prompts alone as well
    columns = set(getattr(getattr(dataloader, "dataset", None), "column_names", None) or ())
    has_prompts = any(name.startswith("prompt") for name in columns)
    answers = ("completion", "chosen", "input_ids", *(() if has_prompts else ("text", "messages")))
    has_answers = any(name.startswith(answers) for name in columns)
    if any(name.startswith("rejected") for name in columns) or ("label" in columns and has_answers):
        return "preferences"
    return "rewards" if has_prompts and not has_answers else None
