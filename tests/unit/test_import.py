"""`import pat`: registers the method, knows its names, and leaves what only training needs for later."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pat

CHECKS = """
import sys
import pat
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert pat.PatConfig in PEFT_TYPE_TO_CONFIG_MAPPING.values()
late = {"trl", "datasets", "pat.training.tune"} & set(sys.modules)
assert not late, late
from pat import *
assert callable(tune) and callable(PatCallback) and PatError and PatConfig
"""


def test_what_trains_is_imported_when_it_is_asked_for() -> None:
    subprocess.run([sys.executable, "-c", CHECKS], check=True)


def test_other_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="'pat' has no attribute 'tuned'"):
        pat.tuned  # noqa: B018
    with pytest.raises(ImportError):
        exec("from pat import tuned")
