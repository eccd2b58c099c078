"""Flags, ready-made comparisons, and the command line."""

from dataclasses import fields

import pytest
import yaml
from compare.config import CONFIGS, CompareConfig, config_path, make_config
from compare.flags import add_flags, with_config_path
from compare.runner import default_threads
from pat.command_parser import CommandParser

from pat.cli import main


def parser() -> CommandParser:
    result = CommandParser("compare", parser)
    add_flags(result)
    return result


def test_every_setting_has_a_flag() -> None:
    flags = {action.dest for action in parser()._actions} - {"help"}
    assert flags == {field.name for field in fields(CompareConfig)}


@pytest.mark.parametrize("name", CONFIGS)
def test_ready_made_comparisons_are_sound(name: str) -> None:
    path = config_path(name)
    assert path is not None
    config = make_config(yaml.safe_load(path.read_text()))
    assert "pat" in config.methods and "lora" in config.methods
    # As flags they come to the same.
    assert make_config(vars(parser().parse(with_config_path(["--config", name])))) == config


def test_only_the_value_of_config_is_taken_for_a_ready_made_comparison() -> None:
    typed = with_config_path(["--tasks", "paper", "--config=tiny", "--rank", "4"])
    assert typed[1] == "paper" and typed[2].endswith("tiny.yaml") and typed[2].startswith("--config=")


def test_typed_flags_win() -> None:
    options = vars(parser().parse(with_config_path(["--config", "tiny", "--seeds", "3,4", "--methods", "lora", "pat"])))
    config = make_config(options)
    assert config.seeds == (3, 4) and config.methods == ("lora", "pat")


def test_without_tasks() -> None:
    assert make_config(vars(parser().parse(with_config_path(["--config", "tiny", "--tasks", "none"])))).tasks is None


def test_wrong_input_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--methods", "lora"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--models is missing" in error and "tiny" in error


@pytest.mark.parametrize("typed", [["--config", "tinny"], ["--config=tinny"]])
def test_a_name_that_is_not_ready_made_is_answered_with_those_that_are(
    typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *typed]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Got --config tinny" in error and "tiny, smollm2, gpu, paper" in error


def test_threads_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert default_threads(2) == 4 and default_threads(16) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads(2) == 3
