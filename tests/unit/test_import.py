"""`import pat`: registers the method whatever the order of imports, and imports nothing heavy by itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pat

REGISTERED = """
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
import pat
assert PEFT_TYPE_TO_CONFIG_MAPPING["PAT"] is pat.PatConfig
assert PEFT_TYPE_TO_TUNER_MAPPING["PAT"].__name__ == "PatModel"
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "pat.registration"]
assert not {"trl", "datasets", "pat.training.tune"} & set(sys.modules)
"""

LOOKED_FOR_ONLY = """
from importlib.util import find_spec
assert find_spec("peft") is not None and "peft" not in sys.modules and "torch" not in sys.modules
"""

NOTHING_MORE_THAN_PEFT = """
import pat
assert "peft" not in sys.modules and "torch" not in sys.modules
import peft
own = set(sys.modules)
import subprocess
alone = subprocess.run([sys.executable, "-c", "import sys, peft; print(*sys.modules)"], capture_output=True, text=True)
more = {name for name in own - set(alone.stdout.split()) if name.partition(".")[0] not in ("pat", "subprocess")}
assert not {name.partition(".")[0] for name in more} & {"trl", "datasets", "accelerate", "lm_eval", "rich"}, more
"""


ORDERS = (
    "import peft\nimport pat",
    "import pat.tuner.config",
    "import pat\nfor name in [n for n in sys.modules if n.startswith('pat')]: del sys.modules[name]\nimport pat",
    r"import pickle; pickle.loads(b'\x80\x04cpat.tuner.config\nPatType\n\x8c\x03PAT\x85R.')",
)

IN_A_FORK_EACH = """
import os, sys, transformers.modeling_utils  # what takes most of the time, once
assert "peft" not in sys.modules and "pat" not in sys.modules
for code in sys.argv[1:]:
    if not os.fork():
        try:
            exec(code)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0, code
"""


def test_the_method_is_registered_when_only_a_look_was_taken_at_peft() -> None:
    subprocess.run([sys.executable, "-c", f"import sys\nimport pat{LOOKED_FOR_ONLY}\n{REGISTERED}"], check=True)


def test_the_method_is_registered_in_every_order_of_imports() -> None:
    codes = [f"import sys\n{code}\n{REGISTERED}" for code in ORDERS]
    subprocess.run([sys.executable, "-c", IN_A_FORK_EACH, *codes], check=True)


def test_importing_it_imports_no_more_than_peft_does() -> None:
    subprocess.run([sys.executable, "-c", f"import sys\n{NOTHING_MORE_THAN_PEFT}"], check=True)


def test_public_names_come_with_a_star_and_others_are_errors() -> None:
    names: dict[str, object] = {}
    exec("from pat import *", names)
    assert set(pat.__all__) <= set(names)
    with pytest.raises(AttributeError, match="'pat' has no attribute 'tuned'"):
        pat.tuned  # noqa: B018
    with pytest.raises(ImportError):
        exec("from pat import tuned")
