"""Registration of the method with peft, without extending peft's own enumeration.

peft looks methods up in four dictionaries by a string-valued key, so a string enumeration of our own is enough: it
equals `"PAT"` in a loaded `adapter_config.json`, hashes alike, and unpickles by importing this module (an extended
`PeftType` would not unpickle without it). See docs/adr/0002.
"""

from __future__ import annotations

import enum

from peft import mapping


class PatType(enum.StrEnum):
    """The one method name this package adds to peft."""

    PAT = "PAT"


PREFIX = "lora_"
"""peft tells adapter parameters from base parameters by the prefix of LoRA's layers, which PAT shares."""


def register() -> None:
    """Make `peft_type: PAT` known to peft; calling it again changes nothing."""
    from pat.tuner.config import PatConfig
    from pat.tuner.model import PatModel

    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PatType.PAT] = PatConfig  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PatType.PAT] = PatModel  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PatType.PAT] = PREFIX  # type: ignore[index]
