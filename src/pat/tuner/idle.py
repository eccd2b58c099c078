"""Says which options that were given have nothing to act on, or undo what the cut is for, and which base is another."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from pat.loading import base_fingerprint, empty_model
from pat.loading.fingerprint import is_same
from pat.shape import AXES, Shape, asked_sizes
from pat.surgery.axes import prunable
from pat.tuner.config import PatConfig
from pat.tuner.options import PatOptions

logger = logging.getLogger(__name__)

_DEFAULTS = {field.name: field.default for field in fields(PatOptions)}

_OF_THE_STREAM = ("operator_rank", "operator_lr_multiplier", "identity_loss_weight", "calibration_tokens")


def warn_of_idle_options(config: PatConfig, shape: Shape, *, tied: bool) -> None:
    """Say which options that were given do nothing, because their axis is not cut or a size comes before them.

    Args:
        config: the options.
        shape: what is cut.
        tied: whether the base has one matrix for its embedding and its head.
    """
    for is_cut, axis, names in (
        (shape.cuts("hidden"), "hidden size is", _OF_THE_STREAM),
        (shape.cuts("hidden") or shape.cuts("mlp"), "hidden size and the MLPs are", ("multiple_of",)),
        (shape.cuts("mlp") or shape.cuts("heads"), "MLPs and heads are", ("refit", "refit_tokens")),
    ):
        if given := [name for name in names if not is_cut and getattr(config, name) != _DEFAULTS[name]]:
            logger.warning("These options have no effect, since the %s not cut: %s.", axis, ", ".join(given))
    for name in config.axes if config.axes != ["auto"] and not asked_sizes(config) else ():
        if not shape.cuts(name):
            label = AXES[name].label
            logger.warning(
                "axes=%s cuts no %s: of the legal sizes the base's own comes nearest to the budget.", config.axes, label
            )
    named = list(asked_sizes(config))
    if named and config.axes != ["auto"] and set(named) != set(config.axes):
        logger.warning("axes=%s has no effect beside the sizes that were given, which cut %s.", config.axes, named)
    if config.untie_word_embeddings and not tied:
        logger.warning("untie_word_embeddings=True has no effect: this model's head has a matrix of its own already.")


def warn_of_growth(base_config: Any, shape: Shape) -> None:
    """Warn if an untied head adds more parameters to the merged model than are cut.

    Args:
        base_config: configuration of the base, whose head is its embedding.
        shape: what is cut.
    """
    total = prunable(empty_model(base_config)).count(shape.sizes)
    cut, head = round(shape.pruning_ratio * total), base_config.get_text_config().vocab_size * shape.pruned("hidden")
    if head >= cut:
        logger.warning(
            "The merged model will not be smaller than its base: its own head adds %s parameters, and %s are cut (%s). "
            "Cut more, or leave the embedding tied.",
            f"{head:,}",
            f"{cut:,}",
            shape.describe(),
        )


def warn_of_another_base(config: PatConfig, base_config: Any) -> None:
    """Warn if a made adapter is put on a model of the shape of its base whose files are others.

    `pat merge` and `pat evaluate` refuse that. From Python it may be meant, for a base that was cast, say.
    """
    found = base_fingerprint(base_config, base_config.name_or_path, revision=config.revision)
    if is_same(config.base_fingerprint, found) is False:
        logger.warning(
            "The adapter was made for a base with the fingerprint …%s, and %s has …%s, by other weights or another "
            "configuration: what it computes there is not what was trained.",
            str(config.base_fingerprint)[-8:],
            PurePath(base_config.name_or_path).name,
            str(found)[-8:],
        )
