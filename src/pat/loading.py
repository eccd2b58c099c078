"""Load the base model and its tokenizer, with one clear line for everything that can be wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pat.errors import PatError
from pat.families import Family, get_family

_CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
"""Class names of the causal language models in transformers; older ones have names of their own (GPT2LMHeadModel)."""


def load_config(name_or_path: str, *, revision: str | None = None) -> tuple[Any, Family]:
    """Return the configuration of a causal language model and the record of its family.

    Raises:
        PatError: no such model, not a causal language model, or a family without a record.
    """
    _check_folder(name_or_path)
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError, HFValidationError) as error:
        if Path(name_or_path).expanduser().is_dir():
            raise PatError(
                f"The configuration of the model {name_or_path!r} is not usable: {_first_line(error)}"
            ) from error
        raise PatError(
            f"Got the model {name_or_path!r}, but there is no such folder and no such model on the hub that could be "
            f"reached: {_first_line(error)}"
        ) from error
    architectures = config.architectures or []
    if architectures and not any(name in _CAUSAL or name.endswith("ForCausalLM") for name in architectures):
        raise PatError(
            f"Got the model {name_or_path!r} of type {', '.join(architectures)}; expected a causal language model "
            "(…ForCausalLM)."
        )
    return config, get_family(config.model_type)


def load_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """Load a base model for tuning.

    Raises:
        PatError: see `load_config`; or the weights cannot be read.
    """
    load_config(name_or_path, revision=revision)
    options: dict[str, Any] = {"revision": revision, "dtype": dtype or "auto"}
    optional = {
        "attn_implementation": attn_implementation,
        "quantization_config": quantization_config,
        "device_map": device_map,
    }
    options |= {name: value for name, value in optional.items() if value is not None}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise PatError(f"Could not load the model {name_or_path!r}: {_first_line(error)}") from error
    model, info = loaded
    # transformers only warns, and goes on with random weights.
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise incomplete_weights(name_or_path, missing)
    return cast(PreTrainedModel, model)


def incomplete_weights(name_or_path: str, missing: Sequence[str]) -> PatError:
    """Return the error for a checkpoint in which parameters are missing or of another shape."""
    return PatError(
        f"The weights of the model {name_or_path!r} are not complete: {len(missing)} are missing or of another shape, "
        f"such as {missing[0]}; copy or download the model again."
    )


def load_tokenizer(name_or_path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model; a missing padding token becomes the end-of-sequence token.

    Raises:
        PatError: there is no tokenizer.
    """
    _check_exists(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError, HFValidationError) as error:
        raise PatError(
            f"Could not load a tokenizer from {name_or_path!r}: {_first_line(error)}; expected it beside the model."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


def stored_dtype(config: Any) -> torch.dtype | None:
    """Return the dtype a configuration says its weights are stored in, if it does."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _check_exists(name_or_path: str) -> None:
    """Tell a missing folder from a hub id: a path that looks like one never goes to the hub."""
    path = Path(name_or_path).expanduser()
    looks_local = path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1
    if (looks_local and not path.is_dir()) or path.is_file():
        raise PatError(
            f"Got the model {name_or_path!r}, but there is no such folder; expected a model folder or a hub id."
        )


def _check_folder(name_or_path: str) -> None:
    _check_exists(name_or_path)
    path = Path(name_or_path).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        inner = path / "model"
        hint = f"pass {inner}" if (inner / "config.json").is_file() else "expected a saved model"
        raise PatError(f"Got the model folder {name_or_path!r}, which has no config.json; {hint}.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
