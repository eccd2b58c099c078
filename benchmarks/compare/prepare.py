"""What is checked and written before any cell runs, so that wrong input costs seconds and not a night."""

from __future__ import annotations

from collections.abc import Sequence

from compare.baselines import CALIBRATED, check
from compare.budget import target_of
from compare.cells import Row, short_name
from compare.config import CompareConfig
from compare.data import draw_calibration, prepare_data
from compare.inputs import digest_inputs, digest_questions
from compare.methods import METHODS
from pat.errors import PatError
from pat.loading import empty_model, load_config, load_tokenizer


def prepare(config: CompareConfig, rows: Sequence[Row] = ()) -> dict[str, dict[str, str]]:
    """Check models, tasks and baselines, and write the rows of data that every cell reads.

    Args:
        config: of the comparison.
        rows: of the cells that are done.

    Returns:
        By the model's name, what its cells depend on beside the settings; `rows` come from the same.
    """
    earlier: dict[str, dict[str, str]] = {}
    for row in rows:
        earlier.setdefault(row["cell"]["model"], {}).update(row["inputs"])
    inputs = {}
    names = [short_name(model) for model in config.models]
    if len(set(names)) < len(names):
        raise PatError(f"Got the models {', '.join(names)}; expected names that differ in their last part.")
    used = sorted({name for method in config.all_methods if (name := METHODS[method].baseline)})
    questions = None
    if config.tasks is not None:
        questions = digest_questions(config.tasks, config.data_dir, config.limit)
    for model, name in zip(config.models, names, strict=True):
        base_config, _ = load_config(model)
        empty = empty_model(base_config)
        for method in used:
            check(method, empty)
        prunes = any(METHODS[method].prunes for method in config.all_methods)
        widths = [target_of(model, ratio).pruned_hidden_size for ratio in config.ratios] if prunes else []
        if len(set(widths)) < len(widths):
            raise PatError(
                f"Got the ratios {', '.join(map(str, config.ratios))}, which come to the widths {widths} of {name}; "
                "give ratios that come to different ones (see `pat plan`)."
            )
        known = earlier.get(name, {})
        folder = config.output_dir / "data" / name
        tokenizer = load_tokenizer(model)
        files = prepare_data(config, tokenizer, folder, expected=known.get("data"))
        if set(used) & set(CALIBRATED):
            draw_calibration(config, tokenizer, files, config.seeds[0])
        inputs[name] = digest_inputs(config, model, files, questions)
        for what, value in known.items():
            now = inputs[name].get(what, value)  # without a baseline, theirs do not matter
            if now != value:
                raise PatError(
                    f"{config.output_dir}: holds cells of {name} with other {what} ({value}) than now ({now}); choose "
                    "another --output_dir."
                )
    return inputs
