"""The rows of a comparison, the same for every method: to train on, to choose learning rates by, to report."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compare.baselines import calibration_sequences
from compare.config import CompareConfig
from compare.tokens import tokenize_examples
from pat.data.conversion import TemplateChoice
from pat.data.load import load_training_data
from pat.errors import PatError

logger = logging.getLogger(__name__)

SEED = 827
"""Seed of the split, so that all seeds of a comparison are judged by the same rows; not the seed (0) of the rows by
which PAT's default recipe was chosen, of which chance alone leaves some among them."""

PARTS = ("train", "validation", "held_out")

RECORD = "source.json"

SETTINGS = ("template", "rows", "held_out", "validation", "max_length")
"""Settings of the comparison that decide what is in the files."""


@dataclass(frozen=True)
class DataFiles:
    """Where a model's rows lie, as JSON lines with a prompt and a completion."""

    train: Path
    validation: Path
    held_out: Path

    def digest(self) -> str:
        """Return a digest of all rows."""
        digest = hashlib.sha256()
        for path in (self.train, self.validation, self.held_out):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]


def data_files(folder: Path) -> DataFiles:
    """Return the files in a folder, which may not be there yet."""
    return DataFiles(*(folder / f"{part}.jsonl" for part in PARTS))


def prepare_data(
    config: CompareConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, *, expected: str | None = None
) -> DataFiles:
    """Split the data once and write the parts, unless those of the same file and settings are there.

    Args:
        config: of the comparison.
        tokenizer: of the model.
        folder: where the parts go.
        expected: digest of the rows that earlier cells have seen; None if there are none.

    Raises:
        PatError: the data cannot be read, have too few rows, or none whose response fits into `max_length`; or they
            are not those expected, and then the ones that are there stay.
    """
    files = data_files(folder)
    source = Path(config.data).expanduser()
    settings = {name: getattr(config, name) for name in SETTINGS} | {
        "data": config.data,
        "changed": source.stat().st_mtime_ns if source.is_file() else None,
        "model": tokenizer.name_or_path,
        "seed": SEED,
    }
    record = folder / RECORD
    if source.is_file() and _read_record(record) == settings and expected in (None, files.digest()):
        return files
    train, validation, held_out = _split(config, tokenizer)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    written = data_files(partial)
    _write(written.train, train)
    _write(written.validation, validation)
    _write(written.held_out, held_out)
    if expected not in (None, written.digest()):
        shutil.rmtree(partial)
        raise PatError(
            f"{config.data}: gives other rows than those of the cells that are done in {config.output_dir}; choose "
            "another --output_dir."
        )
    (partial / RECORD).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return files


def _split(config: CompareConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset, Dataset]:
    """Return rows to train on, to choose learning rates by, and to report."""
    apart = config.held_out + config.validation
    template = cast(TemplateChoice, config.template)  # checked there
    data = load_training_data(config.data, tokenizer=tokenizer, template=template, held_out=apart, seed=SEED)
    assert data.held_out is not None
    if "prompt" not in data.train.column_names:
        raise PatError(f"{config.data}: got texts without responses; a comparison is judged by its responses' NLL.")
    train = data.train.shuffle(seed=SEED)
    train = train.select(range(min(config.rows or len(train), len(train))))
    # They come in the order of the file, which may be sorted by source: both parts are to have some of each.
    rows = data.held_out.shuffle(seed=SEED)
    validation, held_out = rows.select(range(config.validation)), rows.select(range(config.validation, len(rows)))
    parts = {"to train on": train, "for validation": validation, "to report on": held_out}
    kept = {part: len(tokenize_examples(tokenizer, rows, config.max_length)) for part, rows in parts.items()}
    cut = {part: len(rows) - kept[part] for part, rows in parts.items()}
    if not all(kept.values()):
        raise PatError(
            f"Got max_length {config.max_length}, which leaves no response of the rows "
            f"{min(kept, key=kept.__getitem__)}; raise it."
        )
    if any(cut.values()):
        counts = ", ".join(f"{count:,} of {len(parts[part]):,} {part}" for part, count in cut.items())
        logger.warning(
            "Some rows have no response left within --max_length %d and do not count (%s); raise it to use them.",
            config.max_length,
            counts,
        )
    return train, validation, held_out


def draw_calibration(
    config: CompareConfig, tokenizer: PreTrainedTokenizerBase, files: DataFiles, seed: int
) -> list[Tensor]:
    """Return the text that baselines prune by: token sequences of `max_length`, from the rows to train on.

    Raises:
        PatError: there are too few rows.
    """
    rows = load_training_data(files.train, tokenizer=tokenizer, held_out=0).train
    return calibration_sequences(
        tokenizer, rows, num_sequences=config.calibration_rows, length=config.max_length, seed=seed
    )


def _read_record(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or damaged: made again
        return None


def _write(path: Path, rows: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("prompt", "completion")}
