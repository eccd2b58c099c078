"""Explains in one line why an adapter cannot be put on a base: its files, its configuration or the base is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from pat.checkpoint.card import shown_name
from pat.checkpoint.compact import compaction_of
from pat.errors import PatError, one_line
from pat.loading import base_fingerprint
from pat.loading.fingerprint import is_same
from pat.ranges import check_range
from pat.tuner import PatConfig
from pat.tuner.config import check_patterns


def check_readable(adapter: Path) -> None:
    """Refuse an adapter whose file of weights is cut off, or none at all.

    Raises:
        PatError: it is.
    """
    file = adapter / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(file, "pt"):  # compares the size of the file with what its header says
            pass
    except (OSError, SafetensorError) as error:
        raise PatError(f"{file}: not readable ({one_line(error)}); copy the adapter again.") from error


def check_values(config: LoraConfig) -> None:
    """Refuse values that peft takes, and fails on where it uses them, with a message that does not name them.

    Raises:
        PatError: there is one.
    """
    check_range("lora_dropout", config.lora_dropout, "[0, 1)", whole=False)
    if config.megatron_config is not None:
        raise PatError(f"Got megatron_config={config.megatron_config}; expected null, as PAT has no such layers.")
    if config.target_modules is not None and not config.target_modules and not config.target_parameters:
        raise PatError("Got an empty target_modules; expected the modules that LoRA is on.")
    check_patterns(config)


@contextmanager
def fitting(
    name: str,
    adapter: str | os.PathLike[str],
    config: LoraConfig | None = None,
    base_config: PretrainedConfig | None = None,
    revision: str | None = None,
) -> Iterator[None]:
    """Turn peft's and torch's many ways to say that adapter and base do not match into one line.

    With both configurations it is known whether the base is the one that the adapter was made for, so that the line
    does not send anyone to look for another.

    Args:
        name: of the base.
        adapter: folder of the adapter.
        config: its configuration, as it was read.
        base_config: that of the base.
        revision: of the base.

    Raises:
        PatError: they do not match.
    """
    try:
        yield
    except (PatError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: peft looks at the values of a configuration when it uses them
        found = re.findall(r"size mismatch for (\S+):", str(error))
        detail = f"{len(found)} tensors have other shapes, such as {found[0]}" if found else one_line(error).rstrip(".")
        is_its_own = None
        if config is not None and base_config is not None:
            is_its_own = _is_its_own(adapter, config, base_config, name, revision)
        raise PatError(_explained(error, detail, name, Path(adapter), config, is_its_own, bool(found))) from error


def _explained(
    error: Exception,
    detail: str,
    name: str,
    adapter: Path,
    config: LoraConfig | None,
    is_its_own: bool | None,
    are_shapes: bool,
) -> str:
    """Return the line: of the base alone if that is another one, or may be, and shapes differ."""
    base = shown_name(name)
    if isinstance(error, OSError | SafetensorError):
        return f"{adapter}: could not be read ({detail}); copy the adapter again."
    if is_its_own:
        detail += "".join(
            f"; {option}={value!r} is not what its sizes were chosen by" for option, value in _changed(config).items()
        )
        place = f"{adapter}: its {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME} do not belong together"
        if not are_shapes:
            place = f"{adapter / CONFIG_NAME}: has a value that cannot be used"
        return f"{place} ({detail}). The base model {base} is the one it was made for; copy the adapter again."
    if is_its_own is None and not are_shapes:
        return (
            f"{adapter / CONFIG_NAME}: cannot be used with the base model {base} ({detail}); expected the file as it "
            "was saved, and the base it was trained on (--base_model)."
        )
    unsure = ", and its files as they were saved" if is_its_own is None else ""
    return (
        f"The adapter {adapter} does not fit the base model {base}: {detail}. Expected the base it was trained on; "
        f"pass it with --base_model{unsure}."
    )


def _is_its_own(
    adapter: str | os.PathLike[str], config: LoraConfig, base_config: PretrainedConfig, name: str, revision: str | None
) -> bool | None:
    """Tell whether a base is the one that an adapter was made for; None if that is not known."""
    if isinstance(config, PatConfig):
        made_for = config.base_fingerprint
    else:
        compaction = compaction_of(adapter)
        made_for = None if compaction is None else compaction.fingerprint
    return is_same(made_for, base_fingerprint(base_config, name, revision=revision))


def _changed(config: LoraConfig | None) -> dict[str, object]:
    """Return the options of a PAT adapter that are others than those its sizes were chosen by."""
    if not isinstance(config, PatConfig) or config.resolved_from is None:
        return {}
    chosen_by = config.resolved_from
    return {option: value for option, value in config.asked().items() if chosen_by.get(option) != value}
