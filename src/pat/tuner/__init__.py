"""PAT as a PEFT method: configuration, layers and tuner. Importing this package registers the method with peft."""

from peft import mapping

from pat.tuner.config import PatConfig, PatType
from pat.tuner.model import PatModel, find_tuner
from pat.tuner.weights import PREFIX

# Without extending peft's own enumeration, see `PatType`.
mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PatType.PAT] = PatConfig  # type: ignore[index]
mapping.PEFT_TYPE_TO_TUNER_MAPPING[PatType.PAT] = PatModel  # type: ignore[index]
mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PatType.PAT] = PREFIX  # type: ignore[index]

__all__ = ["PatConfig", "PatModel", "PatType", "find_tuner"]
