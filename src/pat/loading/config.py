"""Read a model's configuration, and say in one line which field makes it unusable."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from pat.errors import PatError, one_line
from pat.families import FAMILIES, Family, get_family
from pat.loading.fit import check_weights
from pat.loading.hub import hub_options
from pat.loading.quantized import quantization_of
from pat.loading.sizes import COUNTS, MAX_CONFIG_BYTES, check_sizes, is_count
from pat.loading.stored import stored_file, stored_tensors
from pat.named import check_model
from pat.paths import near

_CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
"""Class names of the causal language models in transformers; older ones have names of their own (GPT2LMHeadModel)."""

_OTHER_SENSES = {"vision_config": "images", "audio_config": "sound"}

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

NO_PADDING = -1
"""The padding token of early Llama checkpoints that have none."""

TRAINABLE_QUANTIZATION = "bitsandbytes"
"""The quantisation that can be trained on here, and dequantised for a merge."""


def load_config(name_or_path: str, *, revision: str | None = None) -> tuple[Any, Family]:
    """Return the configuration of a causal language model and the record of its family.

    Raises:
        PatError: no such model, not a causal language model, a family without a record, a field that transformers
            cannot use, or weights on this machine whose shapes are not those of the configuration.
    """
    name_or_path = check_model(name_or_path)
    _check_folder(name_or_path)
    hub = hub_options(name_or_path, revision)
    check_sizes(name_or_path, _fields(name_or_path, revision, hub))
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False, **hub)
    except Exception as error:  # every kind that transformers' own checks, and its code without any, can raise
        if not os.path.isdir(name_or_path) and isinstance(error, OSError | HFValidationError):
            raise PatError(
                f"Got the model {name_or_path!r}, but there is no such folder{near(name_or_path, folder=True)} and no "
                f"such model on the hub that could be reached: {_reason(error)}"
            ) from error
        raise _unusable(name_or_path, error, _fields(name_or_path, revision, hub)) from error
    check_kind(name_or_path, config)
    family = get_family(config.model_type)
    _check_values(name_or_path, config)
    _check_generation(name_or_path, config.vocab_size, revision)
    try:
        model = empty_model(config)
    except Exception as error:
        raise _unusable(name_or_path, error, _fields(name_or_path, revision, hub)) from error
    model.config = config
    check_weights(name_or_path, model, family, stored_tensors(name_or_path, revision=revision) or {})
    return config, family


def empty_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the unquantised model that a configuration describes on the meta device, where tensors have shapes only."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config  # what is built is the model that the quantised weights stand for
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(plain, dtype=dtype))


def check_quantization(config: PretrainedConfig) -> None:
    """Refuse a checkpoint that is quantised in a way that cannot be trained on and merged here.

    Raises:
        PatError: it is quantised by another library than bitsandbytes.
    """
    quantization = quantization_of(config)
    if quantization is None:
        return
    method = getattr(quantization.get("quant_method"), "value", quantization.get("quant_method"))
    if method != TRAINABLE_QUANTIZATION:
        raise PatError(
            f"Got the model {config.name_or_path!r}, whose weights are quantised by {method}; expected weights of 16 "
            f"or 32 bits, or {TRAINABLE_QUANTIZATION} in 4 or 8 bits: take the checkpoint it was quantised from."
        )


def _check_folder(name_or_path: str) -> None:
    path = Path(name_or_path)
    file = path / "config.json"
    if os.path.isdir(path) and not os.path.isfile(file) and os.path.isfile(path / ADAPTER_CONFIG_NAME):
        raise PatError(
            f"Got the model folder {name_or_path!r}, which holds an adapter and no model; {_model_of_adapter(path)}."
        )
    if os.path.isdir(path) and not os.path.isfile(file):
        inner = path / "model"
        hint = f"pass {inner}" if os.path.isfile(inner / "config.json") else "expected a saved model"
        raise PatError(f"Got the model folder {name_or_path!r}, which has no config.json; {hint}.")
    if os.path.isfile(path / ADAPTER_CONFIG_NAME):
        raise PatError(
            f"Got the model folder {name_or_path!r}, which holds an adapter ({ADAPTER_CONFIG_NAME}), and transformers "
            "would put it on the model; merge it into its base (merge_and_unload), or move the adapter's files away."
        )
    if os.path.isdir(path) and (size := file.stat().st_size) > MAX_CONFIG_BYTES:
        raise PatError(f"{file}: got {size:,} bytes; expected a configuration of at most {MAX_CONFIG_BYTES:,}.")


def _model_of_adapter(adapter: Path) -> str:
    """Say what to pass instead of an adapter: the model of its run, or what is made of it."""
    try:
        is_ours = json.loads((adapter / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type") == "PAT"
    except (OSError, ValueError, AttributeError, RecursionError):
        is_ours = False
    runs = [folder for folder in list(adapter.absolute().parents)[:3] if os.path.isfile(folder / "run.json")]
    models = [folder / "model" for folder in runs if os.path.isfile(folder / "model" / "config.json")]
    if not is_ours and not runs:
        return "merge it into its base (peft's merge_and_unload; `pat convert` if it is of the paper's own code)"
    first = ""
    if models:
        shown = models[0] if adapter.is_absolute() else os.path.relpath(models[0])
        first = f"pass {shown}, the model of its run, or "
    command = f"pat merge --adapter {quote(str(adapter))} --output_dir MODEL"
    return f"{first}make a model of it with `{command}` and pass that"


def check_kind(name: str, config: Any) -> None:
    """Refuse what is no causal language model of text alone, by the name of its class.

    Raises:
        PatError: it is multimodal, or of another kind.
    """
    architectures = config.architectures if isinstance(config.architectures, list) else [config.architectures]
    kind = ", ".join(map(str, filter(None, architectures))) or config.model_type
    senses = [sense for field, sense in _OTHER_SENSES.items() if getattr(config, field, None) is not None]
    if senses:
        inner = getattr(config.get_text_config(), "model_type", "")
        way_out = (
            f"its text model, of type {inner!r}, is supported: save it as a model of its own (docs/multimodal.md)"
            if inner in FAMILIES
            else f"supported are models of text alone, of the types {', '.join(sorted(FAMILIES))}"
        )
        raise PatError(
            f"Got the model {name!r} of type {kind} (text and {' and '.join(senses)}); expected a causal language "
            f"model (…ForCausalLM); {way_out}."
        )
    named = [str(architecture) for architecture in architectures if architecture]
    if named and not any(other in _CAUSAL or other.endswith("ForCausalLM") for other in named):
        raise PatError(f"Got the model {name!r} of type {kind}; expected a causal language model (…ForCausalLM).")


def _check_values(name: str, config: Any) -> None:
    """Check what transformers takes without a word, or reports without naming the field."""

    def refuse(field: str, expected: str) -> PatError:
        value = getattr(config, field)
        return PatError(f"The configuration of the model {name!r} is not usable: {field}={value!r}; {expected}.")

    for field in COUNTS:
        if not is_count(getattr(config, field, None)):
            raise refuse(field, "expected a positive whole number")
    for field, below in (("rms_norm_eps", 1.0), ("attention_dropout", 1.0)):
        if not 0 <= (getattr(config, field, None) or 0) < below:
            raise refuse(field, f"expected a number of at least 0 and less than {below:g}")
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (
        rope,
        *(rope.values() if isinstance(rope, dict) else ()),
    ):  # some families have one for each kind of layer
        theta = part.get("rope_theta") if isinstance(part, dict) else None
        if isinstance(theta, int | float) and not theta > 0:
            raise refuse("rope_parameters", "expected a rope_theta above 0")
    num_heads, num_kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise refuse("num_key_value_heads", f"expected a divisor of num_attention_heads={num_heads}")
    if config.return_dict is False:
        raise refuse("return_dict", "expected true, without which no model of transformers runs")
    if config.dtype is not None and config.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise refuse("dtype", "expected float32, bfloat16 or float16")
    for field in TOKEN_IDS:
        if not _are_tokens(field, getattr(config, field, None), config.vocab_size):
            raise refuse(field, f"expected a token below vocab_size={config.vocab_size}")
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and not any(
        key.startswith(str(quantization.get("quant_method"))) for key in AUTO_QUANTIZATION_CONFIG_MAPPING
    ):
        raise refuse("quantization_config", "expected a quant_method that transformers knows")


def _check_generation(name: str, vocab_size: int, revision: str | None) -> None:
    """Check what a model says of generation, if it does so on this machine: transformers takes any token there."""
    if (found := stored_file(name, GENERATION_CONFIG_NAME, revision)) is None:
        return
    start = f"The {GENERATION_CONFIG_NAME} of the model {name!r} is not usable"
    try:
        fields = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PatError(f"{start}: it cannot be read ({one_line(error)}); correct or remove it.") from error
    if not isinstance(fields, dict):
        raise PatError(f"{start}: got {str(fields)[:100]}; expected a mapping; correct or remove it.")
    for field in TOKEN_IDS:
        if not _are_tokens(field, fields.get(field), vocab_size):
            got = f"{field}={fields[field]!r}"
            raise PatError(f"{start}: {got}; expected a token below vocab_size={vocab_size}; correct or remove it.")


def _are_tokens(field: str, given: Any, vocab_size: int) -> bool:
    """Tell whether a field names a token of the vocabulary, several, or none."""
    return all(
        token is None
        or (field == "pad_token_id" and token == NO_PADDING)
        or (isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size)
        for token in (given if isinstance(given, list) else [given])
    )


def _fields(name: str, revision: str | None, hub: Mapping[str, Any]) -> Any:
    """Return the content of `config.json`, None if it cannot be read."""
    try:
        return PretrainedConfig.get_config_dict(name, revision=revision, **hub)[0]
    except Exception:
        return None


def _unusable(name: str, error: Exception, fields: Any) -> PatError:
    """Return the error for a configuration that transformers cannot use, naming the field if it can be found."""
    detail = _reason(error)
    if isinstance(fields, dict):
        culprit = next((key for key in COUNTS if not is_count(fields.get(key))), None) or next(
            (key for key in fields if key != "model_type" and _can_be_built(_without(fields, key))), None
        )
        words = detail.lower()
        named = [
            key
            for key in fields
            if key in words or key.replace("num_", "number of ").replace("_", " ") in words or key == culprit
        ]
        values = [f"{key}={fields[key]!r}" for key in named if f"value: {fields[key]!r}" not in detail]
        detail = f"{', '.join(values)} ({detail})" if values else detail
    return PatError(f"The configuration of the model {name!r} is not usable: {detail}; correct its config.json.")


def _without(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {other: value for other, value in fields.items() if other != key}


def _can_be_built(fields: Mapping[str, Any]) -> bool:
    """Tell whether transformers can build a model from the fields of a configuration."""
    try:
        empty_model(CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields)))
    except Exception:
        return False
    return True


def _reason(error: BaseException) -> str:
    """Return what an error says last, since checks of dataclasses say first which of them failed."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    strict = type(error).__name__.startswith("StrictDataclass")
    line = (lines[-1].partition(": ")[2] if strict else lines[0]) if lines else ""
    return (
        line.rstrip(".")
        if line and not isinstance(error, KeyError | AssertionError)
        else f"{type(error).__name__}: {line}"
    )
