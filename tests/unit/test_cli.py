"""The command line: help, exit statuses, config files, and one call of the right function by each command."""

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pat import __version__, cli
from pat.benchmark import BenchmarkOptions
from pat.errors import PatError, RunFailed
from pat.evaluation.options import EvaluateOptions
from pat.training.arguments import TuneArguments, parse_arguments

BASE = ["--model_name_or_path", "base", "--dataset_name", "data.jsonl", "--output_dir", "out"]


def replace(monkeypatch: pytest.MonkeyPatch, target: str, result: Any = None) -> list[tuple[tuple[Any, ...], Any]]:
    """Replace a function that a command imports by one that notes its arguments."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    module, _, name = target.rpartition(".")

    def note(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(importlib.import_module(module), name, note)
    return calls


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], Any]]:
    replace(monkeypatch, "pat.plan.print_plan")
    return replace(monkeypatch, "pat.plan.make_plan")


# -- help and exit statuses --------------------------------------------------------------------------------------------


def test_without_a_command_the_overview_names_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert capsys.readouterr().out == overview


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pat {__version__}\n"


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: pat {command} ")
    assert "--config" in printed.out
    assert not printed.err


def test_the_help_of_tune_starts_with_what_matters_and_names_each_flag_once(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["tune", "--help"])
    page = capsys.readouterr().out
    head = page.splitlines()[:15]
    assert sum("pat tune --" in line for line in head) == 3  # usage and two examples
    order = ["--dataset_name", "--output_dir", "--pruning_ratio", "--recipe", "--rotation", "--use_dora", "--optim"]
    places = [page.index(f"\n  {flag} ") for flag in order]
    assert places == sorted(places)
    flags = [line.split()[0] for line in page.splitlines() if line.startswith("  --")]
    assert len(flags) == len(set(flags)) > 150
    assert "default: None" not in page


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (PatError("Got this;\n expected  that."), 2, "pat: Got this; expected that.\n"),
        (RunFailed("It broke."), 1, "pat: It broke.\n"),
        (KeyError("x"), 1, "pat: KeyError: 'x' (run again with --debug for the traceback)\n"),
        (KeyboardInterrupt(), 130, "pat: interrupted\n"),
    ],
)
def test_errors_are_one_line_and_a_status(
    error: BaseException,
    status: int,
    line: str,
    planned: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace(monkeypatch, "pat.plan.make_plan", error)
    assert cli.main(["plan", "--model_name_or_path", "m"]) == status
    assert capsys.readouterr().err == line
    with pytest.raises(type(error)):
        cli.main(["plan", "--model_name_or_path", "m", "--debug"])


def test_an_unknown_command_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prune"]) == 2
    error = capsys.readouterr().err
    assert "'prune'" in error and all(name in error for name in cli.COMMANDS)


def test_a_reader_that_has_gone_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `pat plan --help | head -1`: no message, neither now nor when the interpreter closes its output."""
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    with os.fdopen(writing_end, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["plan", "--help"]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


# -- what commands call ------------------------------------------------------------------------------------------------


def test_plan_passes_its_flags_on(planned: Any) -> None:
    flags = ["--pruned-hidden-size", "64", "--multiple_of=16", "--untie_word_embeddings"]
    assert cli.main(["plan", "--model_name_or_path", "m", *flags]) == 0
    options = {"pruning_ratio": None, "pruned_hidden_size": 64, "multiple_of": 16, "untie_word_embeddings": True}
    options["context"] = None
    assert planned == [(("m",), options)]


def test_evaluate_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replace(monkeypatch, "pat.evaluation.command.run_evaluate", "figures")
    shown = replace(monkeypatch, "pat.evaluation.command.print_evaluation")
    assert cli.main(["evaluate", "--model", "m", "--text_file", "t", "--limit", "3", "--output", "o.json"]) == 0
    tasks = ["--tasks", "paper", "--data_dir", "d", "--protocol", "letter", "--batch_size", "4", "--log_samples"]
    assert cli.main(["evaluate", "--model", "m", *tasks, "--output_dir", "out"]) == 0
    text = EvaluateOptions("m", text_file=Path("t"), limit=3, output=Path("o.json"))
    asked = EvaluateOptions("m", tasks=["paper"], data_dir=Path("d"), protocol=["letter"], batch_size=4)
    asked.log_samples, asked.output_dir = True, Path("out")
    assert calls == [((text,), {}), ((asked,), {})]
    assert shown == [(("figures",), {})] * 2


def test_benchmark_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = replace(monkeypatch, "pat.benchmark.run_benchmark", "figures")
    shown = replace(monkeypatch, "pat.benchmark.print_benchmark")
    models = ["--model", "m", "--baseline", "b"]
    assert cli.main(["benchmark", *models]) == 0
    file = tmp_path / "benchmark.yaml"
    file.write_text("contexts: [512, 128]\nrepetitions: 3\n")
    assert cli.main(["benchmark", *models, "--batch_sizes", "1", "8,4", "--threads=2", "--config", str(file)]) == 0
    expected = BenchmarkOptions("m", "b", contexts=(128, 512), batch_sizes=(1, 4, 8), repetitions=3, threads=2)
    assert [arguments[0] for arguments, _ in calls] == [BenchmarkOptions("m", "b"), expected]
    assert shown == [(("figures",), {})] * 2


def test_merge_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parity = SimpleNamespace(describe=lambda: "Parity is fine.")
    result = SimpleNamespace(model_dir=Path("out"), num_parameters=1234, parity=parity)
    calls = replace(monkeypatch, "pat.checkpoint.merge.merge", result)
    assert cli.main(["merge", "--adapter", "a", "--output_dir", "out", "--base_model", "b"]) == 0
    expected = {"base_model": "b", "dtype": None, "text_file": None, "max_shard_size": None}
    assert calls == [(("a", Path("out")), expected | {"fold_dtype": None, "device": "cpu"})]
    assert capsys.readouterr().out == "Wrote out (1,234 parameters); Parity is fine.\n"


def test_tune_runs_what_was_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replace(monkeypatch, "pat.training.tune.run_tune", "result")
    shown = replace(monkeypatch, "pat.training.summary.print_summary")
    assert cli.main(["tune", *BASE, "--pruning_ratio", "0.5"]) == 0
    arguments = calls[0][0][0]
    assert isinstance(arguments, TuneArguments)
    assert arguments.pat.pruning_ratio == 0.5
    assert shown == [(("result",), {})]


# -- config files ------------------------------------------------------------------------------------------------------


def test_a_config_file_gives_flags_that_typed_ones_override(planned: Any, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "model_name_or_path: m\npruning_ratio: 0.3\nmultiple_of: 8\nuntie_word_embeddings: true\njson: null\n"
    )
    assert cli.main(["plan", "--config", str(file), "--multiple_of", "16"]) == 0
    options = {"pruning_ratio": 0.3, "pruned_hidden_size": None, "multiple_of": 16, "untie_word_embeddings": True}
    options["context"] = None
    assert planned == [(("m",), options)]


def test_a_config_file_of_tune_lies_between_recipe_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAT_TEST_VARIABLE", "")
    file = tmp_path / "run.yaml"
    file.write_text(
        "recipe: paper\nlearning_rate: 3e-4\nmilestone: 0.25\nseed: 3\nlora_target_modules: [q_proj, v_proj]\n"
        "lr_scheduler_kwargs: {power: 2.0}\nenv: {PAT_TEST_VARIABLE: 7}\n"
    )
    for flags in (["--config", str(file)], [f"--config={file}"]):
        arguments = parse_arguments([*BASE, *flags, "--seed", "5"])
        assert arguments.run.recipe == "paper" and arguments.pat.rotation == "none"
        assert arguments.sft.learning_rate == 3e-4 and arguments.pat.milestone == 0.25
        assert arguments.sft.seed == 5
        assert arguments.model.lora_target_modules == ["q_proj", "v_proj"]
        assert arguments.sft.lr_scheduler_kwargs == {"power": 2.0}
    assert os.environ["PAT_TEST_VARIABLE"] == "7"


@pytest.mark.parametrize("command", ["plan", "tune"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("pruning_ratio: [", ["line 1", "YAML"]),
        ("just text", ["mapping"]),
        ("pruning_rato: 0.3", ["pruning_rato"]),
        ("pruning_ratio: a lot", ["pruning_ratio", "'a lot'"]),
    ],
)
def test_what_is_wrong_with_a_config_file_is_said(
    command: str, content: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    required = BASE if command == "tune" else BASE[:2]
    assert cli.main([command, *required, "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)


@pytest.mark.parametrize("flags", [["--config"], ["--config", "a", "--config", "b"], ["--config", "nowhere.yaml"]])
def test_a_config_flag_needs_one_file(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model_name_or_path", "m", *flags]) == 2
    assert "--config" in capsys.readouterr().err


# -- pat tune's arguments ----------------------------------------------------------------------------------------------


def test_an_unknown_flag_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(PatError, match=r"unknown flag --prunning_ratio; did you mean --pruning_ratio\?"):
        parse_arguments([*BASE, "--prunning_ratio", "0.3"])


def test_recipes_are_defaults_under_all_flags() -> None:
    assert parse_arguments(BASE).pat.rotation == "auto"
    paper = parse_arguments([*BASE, "--recipe=paper", "--milestone", "0.5"])
    assert paper.sft.learning_rate == 5e-5 and paper.pat.milestone == 0.5
    with pytest.raises(PatError, match="default, paper"):
        parse_arguments([*BASE, "--recipe", "best"])


@pytest.mark.filterwarnings("error")
def test_gradient_checkpointing_can_be_switched_on_without_a_word_about_its_new_name() -> None:
    assert parse_arguments([*BASE, "--gradient_checkpointing"]).sft.activation_checkpointing is True
    assert parse_arguments([*BASE, "--activation_checkpointing"]).sft.gradient_checkpointing is True
    assert parse_arguments([*BASE, "--use_cpu", "--gradient_checkpointing=no"]).sft.activation_checkpointing is False
