"""The ordinary LoRA configuration of a compact model."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from pat.errors import PatError
from pat.families import Family, get_family
from pat.surgery.layers import LayerCut
from pat.tuner.config import PatConfig

logger = logging.getLogger(__name__)

NAMES_OF_EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj"})
"""Names of linear layers that peft takes for those of experts in older checkpoints. In families with experts it then
targets the experts instead of the few layers that have a dense MLP."""


def compact_lora_config(
    base: PreTrainedModel,
    config: PatConfig,
    factors: Mapping[str, tuple[int, float]],
    others: Iterable[str],
    layers: LayerCut,
) -> LoraConfig:
    """Return the ordinary LoRA configuration of a compact model.

    Args:
        base: the small model.
        config: of the PAT adapter it comes from.
        factors: rank and scale of the LoRA on modules, by path; if there are none, all of LoRA starts anew as `config`
            has it.
        others: paths of further modules whose LoRA starts anew.
        layers: those that stay, from whose numbers in the base model those in `config` are.
    """
    if lost := [name for name in config.modules_to_save or () if not layers.renamed_parts([name])]:
        logger.warning("These entries of modules_to_save are lost with their layers: %s.", ", ".join(lost))
    shared: dict[str, Any] = {
        "task_type": config.task_type,
        "r": config.r,
        "lora_dropout": config.lora_dropout,
        "bias": config.bias,
        "modules_to_save": layers.renamed_parts(config.modules_to_save),
        "trainable_token_indices": config.trainable_token_indices,
        "ensure_weight_tying": config.ensure_weight_tying,
        "target_parameters": layers.renamed_parts(config.target_parameters),
        "use_dora": config.use_dora,
    }
    if not factors:
        return LoraConfig(
            **shared,
            lora_alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
            target_modules=_within_reach(base, config.target_modules),
            exclude_modules=config.exclude_modules,
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
        )
    # The patterns give every module its scale, so the root in rsLoRA's is not taken again.
    alpha = config.lora_alpha * (config.r**0.5 if config.use_rslora else 1)
    ranks = {path: rank for path, (rank, _) in factors.items()}
    alphas = {path: scale * rank for path, (rank, scale) in factors.items()}
    linears = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    return LoraConfig(
        **shared,
        lora_alpha=_whole(alpha),  # type: ignore[arg-type]
        target_modules=sorted([*_by_leaf(dict.fromkeys(factors, True), linears), *others]),
        rank_pattern={key: rank for key, rank in _by_leaf(ranks, linears).items() if rank != config.r},
        alpha_pattern={key: _whole(a) for key, a in _by_leaf(alphas, linears).items() if _whole(a) != _whole(alpha)},
    )


def means_other_modules(config: PatConfig, layers: LayerCut, family: Family) -> bool:
    """Tell whether what a configuration says of LoRA's targets means other modules in the small model.

    Layers have other numbers, and peft takes a pattern that fits dense layers among experts for one of experts.
    """
    return layers.cuts or (bool(family.expert_parameters) and isinstance(config.target_modules, str))


def staying(paths: Iterable[str], layers: LayerCut, out_of_reach: Collection[str], *, nothing_else: bool) -> list[str]:
    """Return which modules with LoRA can be targeted again in the small model; say which cannot.

    Those that go with their layers are spoken of where none of their name stays.

    Args:
        paths: of the modules, with the names of the base model.
        layers: those that stay.
        out_of_reach: paths of modules that ordinary LoRA cannot have.
        nothing_else: whether there is nothing to be trained but these.

    Raises:
        PatError: none is left, and there is nothing else to be trained.
    """
    paths = list(paths)
    left = [path for path in paths if layers.renamed(path) is not None]
    kept = [path for path in left if path not in out_of_reach]
    if paths and not kept and nothing_else:
        raise PatError(
            f"Got LoRA on {', '.join(sorted(paths))} alone, which the small model does not have, or cannot train, so "
            "that LoRA has no module left; name modules of all layers in target_modules, or cut other axes."
        )
    if folded := sorted(set(left) - set(kept)):
        logger.warning("LoRA on %d modules such as %s is folded and not trained on.", len(folded), folded[0])
    leaves = {path.rpartition(".")[2] for path in left}
    if lost := [path for path in paths if path.rpartition(".")[2] not in leaves]:
        logger.warning(
            "LoRA is lost with its layers, and is on no module of that name in the others: %s.", ", ".join(lost)
        )
    return kept


def _within_reach(base: PreTrainedModel, targets: Any) -> Any:
    """Leave out of LoRA's targets what peft would take for experts, see `NAMES_OF_EXPERTS`."""
    if not get_family(base.config.model_type).expert_parameters or isinstance(targets, str):
        return targets
    return sorted(name for name in targets if name.rpartition(".")[2] not in NAMES_OF_EXPERTS)


def _by_leaf(values: Mapping[str, Any], linears: list[str]) -> dict[str, Any]:
    """Key values by the last part of the path (`o_proj`) where all modules of that name share one, else by path."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        leaf = path.rpartition(".")[2]
        same = [values.get(other) == value for other in linears if other.rpartition(".")[2] == leaf]
        result[leaf if all(same) else path] = value
    return result


def _whole(value: float) -> float:
    """Return a number as an integer if it is one up to rounding, as it was given then."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
