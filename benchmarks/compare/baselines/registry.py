"""One way to call every baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from pat.errors import PatError
from pat.families import get_family
from pat.report.progress import quiet_transformers

from .budget import num_parameters
from .calibration import describe
from .channels import cut_channels, keep_largest, keep_random, magnitude_scores
from .llm_pruner import check_prunable, llm_pruner
from .llm_pruner_published import NUM_SPARED_FIRST, NUM_SPARED_LAST, check_published, llm_pruner_published
from .minitron import minitron, num_channels
from .shortgpt import shortgpt
from .slicegpt import check_sliceable, choose_sliced_width, slice_model

METHODS = ("llm_pruner", "llm_pruner_published", "slicegpt", "minitron", "shortgpt", "magnitude", "random")

CALIBRATED = ("llm_pruner", "llm_pruner_published", "slicegpt", "minitron", "shortgpt")
"""Those that look at text; the others need no calibration."""


@dataclass(frozen=True)
class Pruned:
    """A pruned model and what there is to know about it."""

    model: PreTrainedModel
    """The model, of the base's class. SliceGPT's has layers of its own in it, that of "llm_pruner_published"
    layers of two sizes: they cannot be loaded again once saved."""
    num_parameters: int
    """All of them, shortcut matrices included; a tied matrix counts once."""
    description: str
    """One sentence for a table's footnote: what was cut, and on which data."""


def check(method: str, model: PreTrainedModel) -> None:
    """Tell whether a method can treat a model, before anything is computed.

    Args:
        method: which baseline.
        model: of which only the family, the configuration and the names and shapes of the parameters are asked.

    Raises:
        PatError: no such method, or one that cannot treat this family.
    """
    if method not in METHODS:
        raise PatError(f"Got the baseline {method!r}; expected one of {', '.join(METHODS)}.")
    family = get_family(model.config.model_type)
    if method == "llm_pruner":
        check_prunable(model, family)
    if method == "llm_pruner_published":
        check_published(model)
    if method == "slicegpt":
        check_sliceable(family)
    if method == "minitron":
        num_channels(model, num_parameters(model))


def prune(
    method: str,
    model: PreTrainedModel,
    *,
    target_parameters: int,
    pruned_hidden_size: int,
    calibration: Sequence[Tensor],
    seed: int = 0,
) -> Pruned:
    """Prune a base model by one of `METHODS`; the model passed in stays as it is.

    Args:
        method: which baseline.
        model: a dense causal language model without adapters, of a family that PAT supports.
        target_parameters: size of the result in parameters, see `pat_parameters`. "llm_pruner",
            "llm_pruner_published", "slicegpt" and "shortgpt" take the setting that comes nearest, "minitron" the
            nearest from below, as PAT does; "magnitude" and "random" have no choice but PAT's width.
        pruned_hidden_size: PAT's width d', the width of "magnitude" and "random".
        calibration: token sequences `(T,)`, see `calibration_sequences`; empty but for `CALIBRATED`.
        seed: of "random".

    Raises:
        PatError: no such method, or one that cannot treat this family or size.
    """
    check(method, model)
    with quiet_transformers(True):
        return _prune(method, model, target_parameters, pruned_hidden_size, calibration, seed)


def _prune(
    method: str,
    model: PreTrainedModel,
    target_parameters: int,
    pruned_hidden_size: int,
    calibration: Sequence[Tensor],
    seed: int,
) -> Pruned:
    if method == "llm_pruner":
        pruned, shape = llm_pruner(model, calibration, target_parameters=target_parameters)
        base = model.config
        description = (
            f"LLM-Pruner (block-wise, first-order Taylor, every layer alike): {shape.num_attention_heads} of "
            f"{base.num_attention_heads} heads, {shape.num_key_value_heads} of {base.num_key_value_heads} key/value "
            f"heads, {shape.intermediate_size} of {base.intermediate_size} MLP channels; {describe(calibration)}."
        )
        return Pruned(pruned, num_parameters(pruned), description)
    if method == "llm_pruner_published":
        uneven, shape = llm_pruner_published(model, calibration, target_parameters=target_parameters)
        base, num_layers = model.config, model.config.num_hidden_layers
        description = (
            f"LLM-Pruner (block-wise, first-order Taylor, the first {NUM_SPARED_FIRST} and the last {NUM_SPARED_LAST} "
            f"layers whole): in the other {num_layers - NUM_SPARED_FIRST - NUM_SPARED_LAST} "
            f"{shape.num_attention_heads} of {base.num_attention_heads} heads, {shape.num_key_value_heads} of "
            f"{base.num_key_value_heads} key/value heads, {shape.intermediate_size} of {base.intermediate_size} MLP "
            f"channels; {describe(calibration)}."
        )
        return Pruned(uneven, num_parameters(uneven), description)
    if method == "minitron":
        narrow, channels = minitron(model, calibration, target_parameters=target_parameters)
        description = (
            f"Minitron's criterion (mean absolute activation, every layer alike): {channels} of "
            f"{model.config.intermediate_size} MLP channels; {describe(calibration)}."
        )
        return Pruned(narrow, num_parameters(narrow), description)
    if method == "shortgpt":
        short, keep = shortgpt(model, calibration, target_parameters=target_parameters)
        gone = sorted(set(range(model.config.num_hidden_layers)) - set(keep))
        description = (
            f"ShortGPT (block influence): {len(keep)} of {model.config.num_hidden_layers} layers, without "
            f"{', '.join(map(str, gone)) or 'none'}; {describe(calibration)}."
        )
        return Pruned(short, num_parameters(short), description)
    hidden_size = getattr(model.config, get_family(model.config.model_type).hidden_size_field)
    if method == "slicegpt":
        sliced = slice_model(model, calibration, width=choose_sliced_width(model, target_parameters))
        width = sliced.get_input_embeddings().embedding_dim
        untied = ", embedding and head untied" if model.config.tie_word_embeddings else ""
        description = (
            f"SliceGPT: {width} of {hidden_size} directions at every point of the residual stream, "
            f"{2 * model.config.num_hidden_layers} shortcut matrices{untied}; {describe(calibration)}."
        )
        return Pruned(sliced, num_parameters(sliced), description)
    if method == "magnitude":
        chosen, how = keep_largest(magnitude_scores(model), pruned_hidden_size), "of largest magnitude"
    else:
        chosen = keep_random(hidden_size, pruned_hidden_size, seed=seed)
        how = f"drawn at random (seed {seed})"
    dense = cut_channels(model, chosen)
    return Pruned(dense, num_parameters(dense), f"{pruned_hidden_size} of {hidden_size} hidden channels, {how}.")
