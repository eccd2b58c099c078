"""Digests of what a comparison's figures come from: rows of other data, models or questions do not belong to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from compare.config import CompareConfig
from compare.data import DataFiles
from compare.methods import METHODS
from pat.evaluation.harness import load_tasks
from pat.evaluation.options import PROTOCOLS
from pat.loading import load_config
from pat.questions import evenly_spaced
from pat.report.records import environment

BASELINES = Path(__file__).parent / "baselines"

SAMPLE_BYTES = 1 << 20
"""Number of bytes that are read at the start, the middle and the end of a large file."""


def digest_inputs(config: CompareConfig, model: str, files: DataFiles, questions: str | None) -> dict[str, str]:
    """Return what the cells of a model depend on beside the settings, as short strings.

    Args:
        config: of the comparison.
        model: folder or hub id.
        files: the prepared rows.
        questions: digest of the tasks' questions; None if there are no tasks.
    """
    inputs = {
        "data": files.digest(),
        "model": _digest_model(model),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "version": environment()["versions"]["pat-llm"],
    }
    if any(METHODS[name].baseline for name in config.all_methods):
        source = sorted(BASELINES.glob("*.py"))  # they have no version of their own
        inputs["baselines"] = _digest(part for path in source for part in (path.name.encode(), path.read_bytes()))
    if questions is not None:
        inputs["questions"] = questions[:16]
    return inputs


def digest_questions(tasks: str | Sequence[str], data_dir: Path | None, limit: int | None) -> str:
    """Return a digest of the questions that `evaluate_tasks` would ask, and of their wording.

    Raises:
        PatError: see `load_tasks`.
    """
    digest = hashlib.sha256()
    for name, task in load_tasks(tasks, PROTOCOLS, data_dir).items():
        for index in evenly_spaced(len(task.eval_docs), limit):
            row = task.eval_docs[index]
            digest.update(json.dumps([name, task.doc_to_text(row), row], sort_keys=True).encode())
    return digest.hexdigest()


def _digest_model(model: str) -> str:
    config, _ = load_config(model)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None))
    names = ("*.safetensors", "*.bin", "tokenizer*.json")
    weights = _digest_files(sorted(path for name in names for path in folder.glob(name)))
    settings = config.to_dict() | {"_name_or_path": None}
    return _digest([repr(sorted(settings.items())).encode(), weights.encode()])


def _digest_files(paths: Iterable[Path]) -> str:
    parts = []
    for path in paths:
        size = path.stat().st_size
        parts.append(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES):
                file.seek(max(0, start))
                parts.append(file.read(SAMPLE_BYTES))
    return _digest(parts)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]
