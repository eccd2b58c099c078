"""Adapters and optimizer states handed over, by the names of parameters: from engine to engine, from stage to stage.

One process and DDP keep an optimizer's state by the number of the parameter, FSDP2 by its name, in a file of its own.
A checkpoint is made to suit the engine that goes on from it, so that a run may change it, or the number of processes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME, OPTIMIZER_NAME_BIN

from pat import ranks
from pat.checkpoint.compact import save_adapter
from pat.checkpoint.staging import staged_folder
from pat.errors import PatError
from pat.loading import TokenSetup

States = dict[str, dict[str, Any]]

SHARDED_MODEL = f"{FSDP_MODEL_NAME}.bin"


def is_sharded(trainer: Trainer) -> bool:
    """Tell whether a trainer's engine leaves each process a part of the model."""
    return bool(trainer.is_fsdp_enabled)


def write_adapter(
    trainer: Trainer,
    folder: Path,
    tokens: TokenSetup,
    *,
    grown: bool = False,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Write a trainer's adapter, in the first process; every process has to come here.

    Args:
        trainer: of the adapter.
        folder: for it, which it replaces.
        tokens: written beside it.
        grown: embeddings have been added, which are written with the adapter, though they are not trained.
        also: writes what else is to be in the folder.
    """
    model = cast(PeftModel, trainer.model)
    state: Any = None
    if is_sharded(trainer):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=not grown)
        state = get_model_state_dict(model, options=options)

    def write() -> None:
        with staged_folder(folder, replaces=True) as staging:
            save_adapter(model, staging, tokens, state)
            if also is not None:
                also(staging)

    ranks.first_alone(write)


def unsharded(trainer: Trainer, load: Callable[[], PeftModel]) -> PeftModel:
    """Return a trainer's model; of a sharded one the first process loads what has been written of it."""
    loaded: list[PeftModel] = []
    if is_sharded(trainer):
        ranks.first_alone(lambda: loaded.append(load()))
    return loaded[0] if loaded else cast(PeftModel, trainer.model)


def checkpoint_for(checkpoint: Path, trainer: Trainer) -> Path:
    """Return a checkpoint with the files that a trainer's engine goes on from; the trainer has not begun yet.

    One of the trainer's own run is changed, of another one a copy is made in the run's folder.
    """
    has = {name for name in (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SHARDED_MODEL) if (checkpoint / name).is_file()}
    wanted = {OPTIMIZER_NAME_BIN, SHARDED_MODEL} if is_sharded(trainer) else {OPTIMIZER_NAME}
    if wanted <= has and (is_sharded(trainer) or SHARDED_MODEL not in has):
        return checkpoint
    if not is_sharded(trainer) and not has & {OPTIMIZER_NAME_BIN, SHARDED_MODEL}:
        return checkpoint  # without a state of the optimizer, which one process does without
    own = Path(cast(str, trainer.args.output_dir))
    if own.resolve() not in checkpoint.resolve().parents:
        with staged_folder(own / checkpoint.name, replaces=True) as staging:
            shutil.copytree(checkpoint, staging, dirs_exist_ok=True)
        checkpoint = own / checkpoint.name
    _suit(checkpoint, trainer)
    return checkpoint


def _suit(checkpoint: Path, trainer: Trainer) -> None:
    if is_sharded(trainer):
        if not (checkpoint / SHARDED_MODEL).is_file():
            model = cast(PeftModel, trainer.model)
            model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
            options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
            _save(checkpoint / SHARDED_MODEL, get_model_state_dict(model, options=options))
        if not (checkpoint / OPTIMIZER_NAME_BIN).is_file():
            write_states(checkpoint, trainer, *read_states(checkpoint, trainer))
        return
    if not (checkpoint / OPTIMIZER_NAME).is_file() and (checkpoint / OPTIMIZER_NAME_BIN).is_file():
        write_states(checkpoint, trainer, *read_states(checkpoint, trainer))
    (checkpoint / SHARDED_MODEL).unlink(missing_ok=True)  # the trainer would refuse the checkpoint for its sake


def read_states(checkpoint: Path, trainer: Trainer) -> tuple[States, list[dict[str, Any]]]:
    """Return the state of each parameter by its name, and the settings of the groups, from a checkpoint of any engine.

    Args:
        checkpoint: folder of it.
        trainer: that has written it, or one of the same model.

    Raises:
        PatError: there is none.
    """
    if not any((checkpoint / name).is_file() for name in (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN)):
        raise PatError(
            f"{checkpoint}: has no state of the optimizer, which FSDP does not go on without; name another checkpoint, "
            "or go on in one process or with DDP."
        )
    if (checkpoint / OPTIMIZER_NAME).is_file():
        stored = torch.load(checkpoint / OPTIMIZER_NAME, weights_only=True, map_location="cpu")
        names = [name for group in _names(trainer) for name in group]
        return {names[index]: state for index, state in stored["state"].items()}, stored["param_groups"]
    stored = torch.load(checkpoint / OPTIMIZER_NAME_BIN, weights_only=True, map_location="cpu")
    return stored["state"], stored["param_groups"]


def write_states(folder: Path, trainer: Trainer, states: States, groups: list[dict[str, Any]]) -> None:
    """Write states into a checkpoint as a trainer's engine reads them; a parameter that is left out starts anew.

    Args:
        folder: of the checkpoint.
        trainer: that goes on from it, and has not begun yet.
        states: of parameters by name.
        groups: settings of the groups of parameters (the learning rate as the schedule has left it), in their order.
    """
    result: dict[str, Any] = trainer.create_optimizer().state_dict()
    names = _names(trainer)
    for group, settings in zip(result["param_groups"], groups, strict=False):
        group.update({name: value for name, value in settings.items() if name != "params"})
    if not is_sharded(trainer):
        numbered = {name: number for number, name in enumerate(name for group in names for name in group)}
        result["state"] = {numbered[name]: state for name, state in states.items()}
        _save(folder / OPTIMIZER_NAME, result)
        return
    for group, named in zip(result["param_groups"], names, strict=True):
        group["params"] = named
    # Every parameter needs a state there. One of zeros is what an optimizer begins with.
    parameters = dict(cast(torch.nn.Module, trainer.model).named_parameters())
    example = next(iter(states.values()), {})
    if any(
        isinstance(v, Tensor) and v.dim() > 0 and v.shape != parameters[n].shape
        for n, state in states.items()
        for v in state.values()
    ):
        raise PatError(
            "Got an optimizer whose states have other shapes than the parameters, with FSDP; use one without, such as "
            "--optim adamw_torch."
        )
    result["state"] = {
        name: states[name]
        if name in states
        else {key: _zeros(value, parameters[name]) for key, value in example.items()}
        for group in names
        for name in group
    }
    _save(folder / OPTIMIZER_NAME_BIN, result)


def cut_states(states: States, cuts: Mapping[str, tuple[str, Callable[[Tensor], Tensor], torch.Size]]) -> States:
    """Return the states of parameters that go on, cut like they are.

    Args:
        states: of the parameters of before, by name.
        cuts: by the new name of each parameter that goes on: its old name, what cuts a tensor of its old shape, and
            that shape. Optimizers with states of another shape (factored, quantised) start anew.
    """
    result: States = {}
    for new, (old, cut, shape) in cuts.items():
        state = states.get(old, {})
        tensors = [value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]
        if state and all(value.shape == shape for value in tensors):
            result[new] = {
                key: cut(value) if isinstance(value, Tensor) and value.dim() > 0 else value
                for key, value in state.items()
            }
    return result


def _names(trainer: Trainer) -> list[list[str]]:
    """Return the names of the parameters in each group of a trainer's optimizer."""
    names = {parameter: name for name, parameter in cast(torch.nn.Module, trainer.model).named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in trainer.create_optimizer().param_groups]


def _zeros(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return type(value)() if isinstance(value, int | float) else value
    return torch.zeros_like(value) if value.dim() == 0 else torch.zeros(parameter.shape, dtype=value.dtype)


def _save(path: Path, content: Any) -> None:
    part = path.with_name(f"{path.name}.part")
    torch.save(content, part)
    os.replace(part, path)
