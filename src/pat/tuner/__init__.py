"""PAT as a PEFT method: configuration, layers and tuner. Importing this package registers the method with peft."""

from pat.tuner.config import PatConfig
from pat.tuner.model import PatModel, find_tuner
from pat.tuner.register import register

register()

__all__ = ["PatConfig", "PatModel", "find_tuner"]
