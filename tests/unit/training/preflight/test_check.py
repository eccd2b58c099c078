"""What is said of flags and widths before anything is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tiny_models import build, tiny_tokenizer
from transformers.training_args import OptimizerNames

from pat.errors import PatError
from pat.loading import load_config
from pat.training.arguments import build_arguments
from pat.training.preflight.check import NEEDED, WITHOUT_ARGUMENTS, check, check_run, warn_of_warmup
from pat.training.run.run_file import RunFile


def checked(folder: Path, **flags: Any) -> None:
    build("llama", tied=True).config.save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text(json.dumps({"text": "a"}))
    given = {"model_name_or_path": folder / "base", "dataset_name": folder / "rows.jsonl"}
    check(build_arguments(**given, output_dir=folder / "out", **flags))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"eval_steps": 5}, "eval_steps=5 has no effect without --eval_strategy."),
        ({"eval_steps": 5, "eval_strategy": "steps"}, None),
        (
            {"load_best_model_at_end": True, "save_strategy": "no"},
            "load_best_model_at_end=True has no effect without --eval_strategy.",
        ),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type=fp4 has no effect without --load_in_4bit."),
        ({"hub_model_id": "me/small"}, "hub_model_id=me/small has no effect without --push_to_hub."),
        ({"hub_model_id": "me/small", "push_to_hub": True}, None),
        ({"distill_weight": 0.7}, "distill_weight=0.7 has no effect without --distill."),
        ({"distill_top_k": 4}, "distill_top_k=4 has no effect without --distill."),
        ({"distill_top_k": 4, "teacher": "other"}, None),
        (
            {"mask": "frozen", "pruned_intermediate_size": 40},
            "mask=frozen has no effect on a mask that is hard from the start; raise --milestone.",
        ),
        ({"mask": "frozen", "pruned_intermediate_size": 40, "milestone": 0.3}, None),
        ({"mask": "frozen", "axes": "hidden"}, None),
        (
            {"identity_loss_weight": 0.5, "axes": "hidden", "milestone": 0},
            "identity_loss_weight=0.5 has no effect on a mask that is hard from the start; raise --milestone.",
        ),
        ({"identity_loss_weight": 0.5, "axes": "hidden", "milestone": 0, "no_compact": True}, None),
        ({"identity_loss_weight": 0.5, "axes": "hidden"}, None),
        (
            {"mask": "frozen", "axes": "hidden", "mask_lr_multiplier": 3},
            "mask_lr_multiplier=3 has no effect on a frozen mask.",
        ),
        ({"optim_args": "a=1"}, "optim_args=a=1 has no effect on the optimizer adamw_torch"),
        ({"optim_args": "momentum=0.9", "optim": "sgd"}, None),
        ({"optim_target_modules": "q", "optim": "sgd"}, "optim_target_modules=q has no effect on the optimizer sgd."),
        ({"optim_target_modules": "q", "optim": "galore_adamw"}, None),
        ({"model_revision": "v1"}, "model_revision=v1 has no effect on a model folder."),
        ({"ddp_timeout": 60}, "ddp_timeout=60 has no effect in one process."),
        (
            {"dataset_config": "main"},
            "dataset_config=main has no effect on a local file, or what",
        ),
        ({"pruned_hidden_size": 20}, "more than has been shown to work"),
        ({}, None),
    ],
)
def test_what_does_nothing_or_too_much_is_said(
    flags: dict[str, Any], words: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checked(tmp_path, **flags)
    assert [words in line if words else line for line in caplog.messages] == ([True] if words else [])


@pytest.mark.parametrize(
    ("warmup_steps", "num_steps", "words"), [(50, 4, "over 50 steps"), (0.5, 4, None), (1, 1, None)]
)
def test_a_warmup_longer_than_the_run_is_said(
    warmup_steps: float, num_steps: int, words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = build_arguments(model_name_or_path="base", dataset_name="d", output_dir="o", warmup_steps=warmup_steps)
    warn_of_warmup(arguments.sft, num_steps)
    assert [words in line if words else line for line in caplog.messages] == ([True] if words else [])


def test_what_needs_another_flag_is_known() -> None:
    arguments = build_arguments(model_name_or_path="base", dataset_name="d", output_dir="o")
    names = {**vars(arguments.model), **vars(arguments.sft), **vars(arguments.run), **vars(arguments.distill)}
    assert {*NEEDED, *NEEDED.values()} <= set(names)
    assert set(WITHOUT_ARGUMENTS) <= {name.value for name in OptimizerNames}


def test_going_on_with_other_rows_per_step_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build("llama", tied=True).save_pretrained(tmp_path / "base")
    config, _ = load_config(str(tmp_path / "base"))
    record, none = SimpleNamespace(fingerprint="d"), Dataset.from_dict({"input_ids": [], "labels": []})
    prepared: Any = SimpleNamespace(
        vocabulary=SimpleNamespace(tokenizer=tiny_tokenizer()),
        record=record,
        train=none,
        held_out=(),
        held_out_of_base=None,
    )
    before, after = (
        build_arguments(
            model_name_or_path=tmp_path / "base",
            dataset_name="rows.jsonl",
            output_dir=tmp_path / "out",
            per_device_train_batch_size=size,
        )
        for size in (2, 6)
    )
    (tmp_path / "out").mkdir()
    RunFile.of(before, config, "d").with_threads(3).write(tmp_path / "out")
    on: Any = SimpleNamespace(base_config=config, checkpoint=None)
    assert check_run(before, on, prepared).rows_per_step == 2 and not caplog.messages
    going_on = check_run(after, on, prepared)
    assert going_on.rows_per_step == 6 and going_on.num_threads == 3
    [message] = caplog.messages
    assert "A step takes 6 rows from here on, after 2" in message
    after.run.streaming = True
    RunFile.of(after, config, "d").write(tmp_path / "out")
    before.run.streaming = True
    with pytest.raises(PatError, match=r"Got 2 rows a step for the run in .*, which has had 6"):
        check_run(before, on, prepared)
