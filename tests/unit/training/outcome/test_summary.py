"""The end of a run: the command that it names is one that `pat export` takes."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pat.checkpoint.card import Pruning
from pat.evaluation.options import EvaluateOptions
from pat.formats.options import ExportOptions
from pat.options import OptionsParser
from pat.training.outcome.results import ModelFigures
from pat.training.outcome.summary import against_base, how_to_ask, how_to_measure, next_step


def finished(folder: Path, model_type: str, axes: list[str], sizes: dict[str, int] | None) -> Any:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": model_type}))
    return SimpleNamespace(
        output_dir=folder,
        model_dir=folder / "model",
        figures={"dense": ModelFigures(1, 2, gguf_bytes=sizes)},
        record=SimpleNamespace(cut=SimpleNamespace(axes=axes)),
    )


def test_the_export_that_is_named_is_one_that_can_be_asked_for(tmp_path: Path) -> None:
    line = next_step(finished(tmp_path / "my run", "llama", ["mlp"], {"Q8_0": 3}))
    assert line is not None
    program, command, *flags = shlex.split(line.partition(": ")[2].partition(" (first: ")[0])
    assert (program, command) == ("pat", "export")
    given = {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    options = ExportOptions(**given)  # which refuses what it does not know
    assert options.model == str(tmp_path / "my run" / "model") and options.quantize == "Q8_0"


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ({"max_length": 128, "completion_only_loss": "None"}, 128),
        ({"max_length": 512, "packing": True, "packing_strategy": "bfd", "truncation_mode": "keep_end"}, 512),
        ({"max_length": "None", "truncation_mode": "keep_start"}, 10**9),
        ({"max_length": 128, "completion_only_loss": False}, None),
        ({"max_length": 128, "truncation_mode": "keep_end"}, None),
        ({"max_length": 128, "packing": True, "packing_strategy": "wrapped"}, None),
    ],
)
def test_the_held_out_rows_are_measured_as_in_the_run_or_no_command_says_so(
    given: dict[str, Any], length: int | None, tmp_path: Path
) -> None:
    result = finished(tmp_path / "it's mine", "llama", ["mlp"], None)
    result.record.training_arguments = given
    sizes = {"hidden_size": 64, "pruned_hidden_size": 64, "vocab_size": 512, "pruned_vocab_size": 512}
    whole = Pruning(**sizes, num_parameters_base=2, rotation="none", mask="trainable", milestone_step=0)
    result.record.cut = whole
    result.record.data = SimpleNamespace(format="messages", sources=())
    assert how_to_measure(result) == []
    files = [result.output_dir / name for name in ("held_out.jsonl", "held_out_2.jsonl")]
    for file in files:
        file.touch()
    lines = how_to_measure(result)
    if length is None:
        (line,) = lines
        assert all(str(file) in line for file in files) and "--model" not in line
        return
    asked = [shlex.split(line.partition(": ")[2]) for line in lines]
    assert lines[0].startswith("On the held-out rows: ")
    result.record.cut = replace(whole, pruned_vocab_size=256)
    assert how_to_measure(result)[0].startswith("On the held-out rows, in tokens of the model's own: ")
    assert [words[:2] for words in asked] == [["pat", "evaluate"]] * 2
    options = [OptionsParser("pat evaluate", EvaluateOptions).parse(words[2:]) for words in asked]
    assert [one.dataset_name for one in options] == [str(file) for file in files]
    assert {(one.model, one.max_length) for one in options} == {(str(result.model_dir), length)}


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ((), ".gguf"),
        (("gguf",), "(first: pip install 'pat-llm[gguf]')"),
        (("xllamacpp",), "(first: pip install 'pat-llm[gguf]', which checks the file)"),
    ],
)
def test_what_is_to_be_installed_first_is_what_is_missing(
    missing: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gguf", "xllamacpp"):
        spec = None if name in missing else SimpleNamespace(__spec__=object())
        monkeypatch.setitem(sys.modules, name, spec)
    line = next_step(finished(tmp_path, "llama", ["mlp"], {"Q8_0": 3}))
    assert line is not None and line.endswith(said)


@pytest.mark.parametrize(
    ("prompts", "question"),
    [
        ("the chat template of the tokenizer or none, texts as they are", '([{"role": "user", '),
        ("the Alpaca template, written as the chat template", '([{"role": "user", '),
        ("none, texts as they are", '("Hello", '),
        ("the Alpaca template", None),
    ],
)
def test_the_end_says_how_the_model_is_asked(
    prompts: str, question: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = finished(tmp_path / "it's mine", "llama", ["mlp"], None)
    result.record.prompt_format, result.record.device = prompts, "cpu"
    result.record.machine = SimpleNamespace(num_threads=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    said = how_to_ask(result)
    if question is None:
        assert said.endswith("README.md")
        return
    program, flag, code = shlex.split(said)
    compile(code, "hint", "exec")
    assert (program, flag) == ("python", "-c") and f'"{result.model_dir}")' + question in code
    assert "do_sample=False" in code and code.startswith("import torch; torch.set_num_threads(1); ")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert "threads" not in how_to_ask(result)


@pytest.mark.parametrize(
    ("more", "held_out", "general"),
    [
        (0.01, "; the two are not told apart.", "; the two are not told apart."),
        (0.1, "difference).", "0 ± 0.020)."),
        (0.5, "difference).", ": the model has forgotten much of what its base knew."),
    ],
)
def test_the_end_says_which_losses_are_told_apart_and_what_was_forgotten(
    more: float, held_out: str, general: str
) -> None:
    base = ModelFigures(1, 2, held_out_nll=2.0, general_nll=3.0, num_general_tokens=9)
    dense = ModelFigures(
        1,
        2,
        held_out_nll=2 + more,
        held_out_difference_error=0.02,
        general_nll=3 + more,
        general_difference_error=0.02,
    )
    first, second = against_base(base, dense)
    assert first.endswith(held_out) and second.endswith(general)
    assert against_base(ModelFigures(1, 2), dense) == []


@pytest.mark.parametrize(
    ("model_type", "axes", "sizes"), [("phi3", ["hidden"], {"Q8_0": 3}), ("llama", ["mlp"], None), ("glm4_moe", [], {})]
)
def test_no_export_is_named_that_would_fail(model_type: str, axes: list[str], sizes: Any, tmp_path: Path) -> None:
    assert next_step(finished(tmp_path, model_type, axes, sizes)) is None
