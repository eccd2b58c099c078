"""The command line: help, exit statuses, and one call of the right function by each command."""

import importlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pat import __version__, cli
from pat.errors import PatError, RunFailed
from pat.options import OptionsParser
from pat.training.arguments import TuneArguments, build_arguments
from pat.tuner.config import PatConfig
from pat.tuner.options import PatOptions

BASE = ["--model_name_or_path", "base", "--dataset_name", "me/data", "--output_dir", "out"]

MAX_SECONDS = 0.5
"""From the start of the interpreter to its end, for what needs no model: a person notices no delay."""


def parse(*argv: str) -> TuneArguments:
    return OptionsParser("pat tune", TuneArguments).parse([*BASE, *argv])


def replace(monkeypatch: pytest.MonkeyPatch, target: str, result: Any = None) -> list[Any]:
    """Replace a function `module:name` by one that notes its argument."""
    calls: list[Any] = []
    module, _, name = target.partition(":")

    def note(argument: Any) -> Any:
        calls.append(argument)
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(importlib.import_module(module), name, note)
    return calls


# -- help and exit statuses --------------------------------------------------------------------------------------------


def test_without_a_command_the_overview_names_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert capsys.readouterr().out == overview


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--version"], 0, f"pat {__version__}"),
        (["--help"], 0, "usage: pat COMMAND"),
        (["merge", "--help"], 0, "--adapter"),
        (["prune"], 2, "Got the command 'prune'; did you mean tune? Expected one of tune, plan,"),
        (["speed"], 2, "Got the command 'speed'; expected one of"),
        (["plan", "--model_name_or_path", "m", "--multiple_of", "many"], 2, "'many'"),
        (["evaluate", "--modle", "m"], 2, "did you mean --model?"),
        (["plan", "--dataset_name", "d"], 2, "did you mean --calibrate?"),
        (["export", "--model_name_or_path", "m"], 2, "did you mean --model?"),
        (["merge", "--model_name_or_path", "m"], 2, "did you mean --base_model?"),
        (["benchmark", "--model", "m"], 2, "--baseline is missing"),
        (["demo", "--max_steps", "few"], 2, "'few'"),
        (["tune", "--model_name_or_path", "m"], 2, "--dataset_name is missing"),
        (["tune"], 2, "); so are --dataset_name and --output_dir (see"),
        (["tune", "--model_name_or_path", "m", "--seed", "3"], 2, "--dataset_name is missing"),
        (["tune", *BASE, "--config", "nowhere.yaml"], 2, "no such file"),
        (["tune", *BASE, "--recipe", "best"], 2, "default, paper"),
        (["tune", *BASE, "--pruning_ratio", "25"], 2, "above 0 and below 1; did you mean 0.25?"),
        (["tune", *BASE, "--learnig_rate", "1e-4"], 2, "unknown flag --learnig_rate; did you mean --learning_rate?"),
        (["tune", *BASE, "--no_gradient_checkpoint"], 2, "did you mean --no_gradient_checkpointing?"),
        (["tune", *BASE, "--lora_rank", "8"], 2, "unknown flag --lora_rank; did you mean --lora_r?"),
        (["tune", *BASE, "--teacher", "./nowhere"], 2, "Got the model './nowhere', but there is no such folder"),
        (["tune", "--model_name_or_path", "./nowhere", *BASE[2:]], 2, "Got the model './nowhere', but there"),
        (["plan", "--model_name_or_path", "m", "--calibrate", "nowhere.csv"], 2, "nowhere.csv: no such file"),
        (["benchmark", "--model", "m", "--baseline", "./nowhere"], 2, "Got the model './nowhere'"),
        (["report", "--run", "nowhere"], 2, "Got run=nowhere, but there is no such folder"),
        (
            ["merge", "--adapter", "nowhere", "--output_dir", "o"],
            2,
            "nowhere: no such folder; expected the folder of a PAT",
        ),
        (
            ["convert", "--adapter", "nowhere", "--output_dir", "o"],
            2,
            "expected the folder of an adapter of the published",
        ),
    ],
)
def test_what_needs_no_model_imports_no_torch_and_is_quick(argv: list[str], status: int, words: str) -> None:
    """Time is taken where nothing else is (a median, and only of `--version`): other tests may run beside this one."""
    code = (
        "import sys\nfrom pat.cli import main\nstatus = main(sys.argv[1:])\nprint('torch' in sys.modules)\n"
        "sys.exit(status)"
    )
    seconds = []
    for _ in range(9 if argv == ["--version"] else 1):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == status and words in done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == "False"
    assert len(seconds) == 1 or statistics.median(seconds) <= MAX_SECONDS


def test_an_unknown_flag_is_named_before_what_is_missing_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Of `pat tune`, too, whose required flags are looked for before all of its flags are known."""
    assert cli.main(["tune", "--model", "M", "--dataset", "d", "--learning_rate", "1e-4"]) == 2
    assert capsys.readouterr().err == (
        "pat: Got the unknown flags --model, --dataset; did you mean --model_name_or_path for --model and "
        "--dataset_name for --dataset? Missing besides: --output_dir (see `pat tune --help`).\n"
    )


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
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(monkeypatch, cli.COMMANDS["plan"].run, error)
    assert cli.main(["plan", "--model_name_or_path", "m"]) == status
    assert capsys.readouterr().err == line
    if isinstance(error, KeyboardInterrupt):
        replace(monkeypatch, cli.COMMANDS["tune"].run, error)
        assert cli.main(["tune", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]) == status
        assert capsys.readouterr().err == "pat: interrupted; the same command goes on from what is finished\n"
        replace(monkeypatch, cli.COMMANDS["tune"].run, KeyboardInterrupt("nothing is kept yet"))
        assert cli.main(["tune", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]) == status
        assert capsys.readouterr().err == "pat: interrupted; nothing is kept yet\n"
    for argv in (["--debug", "plan"], ["plan", "--debug"]):
        with pytest.raises(type(error)):
            cli.main([*argv, "--model_name_or_path", "m"])


def test_debug_with_a_value_is_the_trainers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replace(monkeypatch, cli.COMMANDS["tune"].run, "result")
    replace(monkeypatch, cli.COMMANDS["tune"].show)
    assert cli.main(["tune", *BASE, "--debug", "underflow_overflow", "--debug"]) == 0
    assert [option.value for option in calls[0].sft.debug] == ["underflow_overflow"]


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


REQUIRED = {
    "tune": BASE,
    "plan": BASE[:2],
    "report": ["--run", "run"],
    "merge": ["--adapter", ".", "--output_dir", "out"],
    "convert": ["--adapter", ".", "--output_dir", "out"],
    "evaluate": ["--model", "m", "--text_file", "t"],
    "benchmark": ["--model", "m", "--baseline", "b"],
    "export": ["--model", "m", "--format", "gguf", "--output", "out.gguf"],
    "demo": [],
}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_runs_its_options_and_shows_what_comes_of_it(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text('{"command": "tune"}')
    monkeypatch.chdir(tmp_path)
    command = cli.COMMANDS[name]
    ran, shown = replace(monkeypatch, command.run, "record"), replace(monkeypatch, command.show)
    assert cli.main([name, *REQUIRED[name]]) == 0
    module, _, options = command.options.partition(":")
    assert [type(call) for call in ran] == [getattr(importlib.import_module(module), options)]
    assert shown == ["record"]


# -- pat tune's arguments ----------------------------------------------------------------------------------------------


def test_a_config_file_of_tune_lies_between_recipe_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "recipe: paper\nlearning_rate: 3e-4\nmilestone: 0.25\nseed: 3\nlora_target_modules: [q_proj, v_proj]\n"
        "lr_scheduler_kwargs: {power: 2.0}\nsave_strategy: no\n"
    )
    arguments = parse("--config", str(file), "--seed", "5")
    assert arguments.run.recipe == "paper" and arguments.pat.rotation == "none"
    assert arguments.sft.learning_rate == 3e-4 and arguments.pat.milestone == 0.25
    assert arguments.sft.seed == 5 and arguments.sft.save_strategy == "no"
    assert arguments.model.lora_target_modules == ["q_proj", "v_proj"]
    assert arguments.sft.lr_scheduler_kwargs == {"power": 2.0}


def test_what_the_libraries_refuse_is_one_line() -> None:
    with pytest.raises(PatError, match=r"8 bit and 4 bit .* \(see `pat tune --help`\)\."):
        parse("--load_in_4bit", "--load_in_8bit")


def test_recipes_are_defaults_under_all_flags() -> None:
    default = parse()
    assert default.pat == PatOptions() and default.pat_config() == PatConfig(task_type="CAUSAL_LM")
    assert default.sft.learning_rate == 1e-3 and default.sft.max_length == 512
    paper = parse("--recipe=paper", "--milestone", "0.5")
    assert paper.sft.learning_rate == 5e-5 and paper.pat.milestone == 0.5
    assert (paper.pat.operator_lr_multiplier, paper.model.use_rslora) == (1.0, False)
    assert paper == build_arguments(
        model_name_or_path="base", dataset_name="me/data", output_dir="out", recipe="paper", milestone=0.5
    )


@pytest.mark.filterwarnings("error")
def test_gradient_checkpointing_can_be_switched_on_without_a_word_about_its_new_name() -> None:
    assert parse("--gradient_checkpointing").sft.activation_checkpointing is True
    assert parse("--activation_checkpointing").sft.gradient_checkpointing is True
    assert parse("--use_cpu", "--gradient_checkpointing=no").sft.activation_checkpointing is False
