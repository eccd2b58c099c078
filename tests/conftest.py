"""Shared fixtures; the environment is set before anything imports torch or a Hugging Face library.

This folder is put on ``sys.path`` here, so ``from tiny_models import build`` works in every test file under
every import mode of pytest. ``--import-mode=importlib`` is the one to configure: it allows equal file names
in two folders without ``__init__.py``.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="pat-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

TESTS_DIR = Path(__file__).resolve().parent
REPO_ROOT = TESTS_DIR.parent
for folder in (REPO_ROOT / "benchmarks", TESTS_DIR):  # scripts beside the package, and the tests' own helpers
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import gc  # noqa: E402
import random  # noqa: E402

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

torch.set_num_threads(1)

# The same examples in every run, no files beside the checkout, and no limit that a busy machine could break.
hypothesis.settings.register_profile("pat", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile(  # for benchmarks/mutation.py, to which any counterexample will do
    "unshrunk", hypothesis.settings.get_profile("pat"), phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate)
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "pat"))


def pytest_collection_finish() -> None:
    """Take what is imported out of garbage collection: a Trainer collects at every start, half a second through it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same global random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-golden", action="store_true", help="write the records that test_golden.py compares with")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder beside the repository with the questions of the tasks and longer texts."""
    path = REPO_ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the data folder ../shared/data is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def tests_data() -> Path:
    """Folder of the data that comes with the tests; its README says what each file is."""
    return TESTS_DIR / "data"


@pytest.fixture(scope="session")
def stories260k_path(tests_data: Path) -> Path:
    """Checkpoint of a trained 260,032-parameter Llama: hidden 64, 5 layers, 8 heads, 4 KV heads, tied."""
    return tests_data / "stories260K"


@pytest.fixture(scope="session")
def lettered_path(stories260k_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint like stories260K that answers questions by letter."""
    from lettered import save_lettered

    return save_lettered(stories260k_path, tmp_path_factory.mktemp("lettered"))


@pytest.fixture
def stories260k(stories260k_path: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A fresh ``(model, tokenizer)`` of stories260K, float32, eval mode: a test may change it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories260k_path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(stories260k_path)


def _local_checkpoint(variable: str, folder: str) -> Path:
    path = Path(os.environ.get(variable) or REPO_ROOT / ".models" / folder)
    if not (path / "config.json").is_file():
        pytest.skip(f"no checkpoint at {path}: set {variable} to a folder that holds one")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Checkpoint folder of SmolLM2-135M-Instruct: ``PAT_TEST_SMOLLM2`` or ``.models/smollm2``."""
    return _local_checkpoint("PAT_TEST_SMOLLM2", "smollm2")


@pytest.fixture(scope="session")
def gemma3_270m() -> Path:
    """Checkpoint folder of Gemma 3 270M: ``PAT_TEST_GEMMA3`` or ``.models/gemma3-270m``."""
    return _local_checkpoint("PAT_TEST_GEMMA3", "gemma3-270m")
