"""Memory for training the small model that a cut leaves, which carries ordinary LoRA."""

from __future__ import annotations

from peft import LoraConfig

from pat.method.operator import default_rank
from pat.shape import Shape
from pat.surgery.costs import Skeleton
from pat.tuner.config import PatConfig
from pat.tuner.memory import TrainingMemory, training_memory


def memory_after_cut(
    small: Skeleton, config: PatConfig, shape: Shape, *, batch_size: int, length: int
) -> TrainingMemory:
    """Return the memory of training from the cut on, in bytes.

    Args:
        small: the small model; carries LoRA afterwards.
        config: of the adapter on the base, with its targets filled in (as `training_memory` leaves it).
        shape: of the cut. Where it takes channels off the residual stream, operators add rank to LoRA on the writers.
        batch_size: number of rows in a forward pass.
        length: number of tokens in a row.
    """
    ranks = {}
    if shape.cuts("hidden"):
        writers = [branch.writer for branch in small.stream.branches]
        modules = {writer.path.rpartition(".")[2] for writer in writers if writer.weight != writer.path}  # no experts
        ranks = dict.fromkeys(modules, config.r + default_rank(shape.size("hidden")))
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        target_modules=config.target_modules,
        target_parameters=config.target_parameters,
        rank_pattern=ranks,
    )
    return training_memory(small, lora, batch_size=batch_size, length=length)
