"""Load the weights of a base model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pat.errors import PatError
from pat.loading.config import load_config
from pat.loading.fit import too_few_layers
from pat.loading.hub import weights_options
from pat.loading.quantized import keep_plain_layout
from pat.loading.stored import dtype_of, stored_tensors
from pat.paths import expand

logger = logging.getLogger(__name__)

MULTIPLE = 64
"""A grown embedding gets a multiple of so many rows, as in TRL's `clone_chat_template`."""


def load_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """Load a base model for tuning, by default in the dtype that its weights are stored in.

    A quantised one keeps a layout that can be trained on, see `keep_plain_layout`.

    Raises:
        PatError: see `load_config`; or the weights cannot be read, or are not those of the configuration.
    """
    name_or_path = expand(name_or_path)
    config, family = load_config(name_or_path, revision=revision)
    if dtype in (None, "auto"):
        dtype = stored_dtype(config, revision=revision) or "auto"
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, "trust_remote_code": False}
    optional = {
        "attn_implementation": attn_implementation,
        "quantization_config": quantization_config,
        "device_map": device_map,
    }
    options |= {name: value for name, value in optional.items() if value is not None}
    options |= weights_options(name_or_path, revision)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **options,
        )
    except Exception as error:  # of any kind: files, packages that are missing, and transformers' own code
        detail = str(error).strip().split("\n")[0] or type(error).__name__
        raise PatError(f"Could not load the model {name_or_path!r}: {detail}") from error
    model, info = loaded
    # transformers only warns, and goes on with random weights.
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing == [f"{family.head}.weight"]:
        raise PatError(
            f"The weights of the model {name_or_path!r} have no {missing[0]}, and its configuration says "
            "tie_word_embeddings=false; set that to true if the embedding is the head as well, or copy the model again."
        )
    if missing:
        raise incomplete_weights(name_or_path, missing)
    unused = sorted(map(str, info["unexpected_keys"]))
    layers = [name for name in unused if name.startswith(f"{family.layers}.")]
    if layers:
        raise too_few_layers(name_or_path, layers, config)
    if unused:
        logger.warning("%d tensors of the model %s are not used, such as %s.", len(unused), name_or_path, unused[0])
    keep_plain_layout(model)
    return cast(PreTrainedModel, model)


def resolve_device(name: str) -> torch.device:
    """Return the device that the models run on.

    Raises:
        PatError: this machine has no such device.
    """
    known = ["cpu"]
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()) is not None:
        kind = accelerator.type
        known = [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count())), *known]
    if name not in ("auto", *known):
        raise PatError(f"Got device={name!r}; expected auto, or what this machine has: {', '.join(known)}.")
    return torch.device(known[0] if name == "auto" else name)


def grown_rows(num_rows: int, largest: int) -> int:
    """Return how many rows an embedding needs for tokens up to the largest: its own, or a multiple of `MULTIPLE`."""
    return num_rows if largest < num_rows else -(-(largest + 1) // MULTIPLE) * MULTIPLE


def grow_embedding(model: PreTrainedModel, num_rows: int) -> None:
    """Give a model's embedding and head as many rows, with the same values in every process."""
    embedding: Any = model.get_input_embeddings()
    if embedding.weight.shape[0] < num_rows:
        with seeded(0, model):  # a run that is resumed has to find the same values
            model.resize_token_embeddings(num_rows)


@contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Draw from a seed, and leave the global random state as it was: the CPU's and that of the model's own GPUs."""
    with torch.random.fork_rng(devices={p.device for p in model.parameters() if p.is_cuda}):
        torch.manual_seed(seed)
        yield


def incomplete_weights(name_or_path: str, missing: Sequence[str]) -> PatError:
    """Return the error for a checkpoint in which parameters are missing or of another shape."""
    return PatError(
        f"The weights of the model {name_or_path!r} are not complete: {len(missing)} are missing or of another shape, "
        f"such as {missing[0]}; copy or download the model again, with its config.json."
    )


def stored_dtype(config: Any, *, revision: str | None = None) -> torch.dtype | None:
    """Return the dtype that most weights of a model are stored in.

    That is what its files say, if they are on this machine, and otherwise what its configuration says, if it does.
    """
    tensors = stored_tensors(config.name_or_path, revision=revision) if config.name_or_path else None
    found = None if tensors is None else dtype_of(tensors)
    said = getattr(config, "dtype", None)
    return found or (said if isinstance(said, torch.dtype) else None)
