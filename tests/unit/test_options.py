"""The one parser: flags, `--config` files and keywords from the fields of a dataclass."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from pat.errors import PatError
from pat.options import OptionsParser
from pat.plan.options import PlanOptions


@dataclass(frozen=True)
class Inner:
    name: str = field(metadata={"help": "Name of it."})
    save_strategy: str = field(default="steps", metadata={"choices": ("no", "steps")})
    learning_rate: float = 0.1
    kwargs: dict[str, Any] | str | None = None


@dataclass(frozen=True)
class Other:
    name: str | None = None
    sizes: list[int] = field(default_factory=lambda: [1])
    report_to: str | list[str] | None = "none"
    rank: int | str | None = 7
    flag: bool = False
    on: bool | None = True
    kind: Literal["a", "b"] = "a"
    folder: Path | None = None
    marks: list[str] | None = None


@dataclass(frozen=True)
class Options:
    MAIN_FLAGS: ClassVar = ("learning_rate", "report_to")

    inner: Inner = field(metadata={"section": "first"})
    other: Other = field(metadata={"section": "second"})

    @staticmethod
    def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
        return {"learning_rate": 0.2 if given.get("kind") == "b" else 0.3, "rank": 5}


def parser() -> OptionsParser[Options]:
    return OptionsParser("pat test", Options)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--learning-rate 3e-4", "learning_rate", 3e-4),
        ("--learning_rate=-1", "learning_rate", -1.0),
        ("--sizes 4 8", "sizes", [4, 8]),
        ("--sizes 4,8", "sizes", [4, 8]),
        ("--report_to none", "report_to", "none"),
        ("--report_to a b", "report_to", ["a", "b"]),
        ("--rank 3", "rank", 3),
        ("--rank dense", "rank", "dense"),
        ("--sizes 3.0 4", "sizes", [3, 4]),
        ("--flag", "flag", True),
        ("--flag no", "flag", False),
        ("--on False", "on", False),
        ("--no_on", "on", False),
        ("--kind b", "kind", "b"),
        ("--folder x/y", "folder", Path("x/y")),
        ("--folder=~/x", "folder", Path.home() / "x"),
        ("--kwargs ~/file.json", "kwargs", f"{Path.home()}/file.json"),
        ('--kwargs {"a":1}', "kwargs", {"a": 1}),
        ("--kwargs file.json", "kwargs", "file.json"),
    ],
)
def test_words_are_read_as_the_field_wants_them(words: str, name: str, value: Any) -> None:
    made = parser().parse(["--name", "n", *words.split()])
    assert getattr(made.inner if hasattr(made.inner, name) else made.other, name) == value


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("save_strategy: no", "save_strategy", "no"),
        ("learning-rate: 3e-4", "learning_rate", 3e-4),
        ("sizes: [4, 8]", "sizes", [4, 8]),
        ("sizes: 4", "sizes", [4]),
        ("report_to: off", "report_to", "off"),
        ("rank: 010", "rank", 10),
        ("report_to: null", "report_to", "none"),
        ("rank:", "rank", None),
        ("flag: yes", "flag", True),
        ("flag:", "flag", False),
        ("kwargs: {a: 1, b: no, c: 1e-5, d: -2E3}", "kwargs", {"a": 1, "b": False, "c": 1e-5, "d": -2000.0}),
    ],
)
def test_a_file_says_what_the_command_line_says(tmp_path: Path, line: str, name: str, value: Any) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"name: n\n{line}\n")
    made = parser().parse(["--config", str(file)])
    assert getattr(made.inner if hasattr(made.inner, name) else made.other, name) == value


def test_typed_flags_win_over_the_file_over_the_defaults_between_over_the_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAT_TEST_VARIABLE", "")
    file = tmp_path / "c.yaml"
    file.write_text("name: n\nkind: b\nflag: true\nenv: {PAT_TEST_VARIABLE: 7}\n")
    made = parser().parse([f"--config={file}", "--flag", "false"])
    assert made.inner.learning_rate == 0.2 and made.other.rank == 5
    assert made.other.flag is False and made.other.kind == "b" and made.inner.save_strategy == "steps"
    assert made.inner.name == made.other.name == "n"  # of the same name: both are told
    assert os.environ["PAT_TEST_VARIABLE"] == "7"


def test_keywords_are_values_or_words() -> None:
    made = parser().build(
        {
            "name": Path("n"),
            "folder": Path("~/x"),
            "sizes": (2, 3),
            "rank": 4,
            "learning_rate": 1,
            "report_to": ["a", "b"],
        }
    )
    assert made.inner == Inner("n", learning_rate=1)
    assert made.other == Other("n", sizes=[2, 3], rank=4, report_to=["a", "b"], folder=Path.home() / "x")
    assert parser().build({"name": "n", "sizes": "2,3", "flag": "yes"}).other.sizes == [2, 3]
    whole = parser().build({"name": "n", "rank": 4.0, "learning_rate": 1.0})
    assert type(whole.other.rank) is int and type(whole.inner.learning_rate) is float


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--naem", "n"], "Got the unknown flag --naem; did you mean --name?"),
        (["-naem", "n"], "Got the unknown flag -naem; did you mean --name? (see"),
        (["-name", "n"], "Got the unknown flag -name; did you mean --name? (see"),
        (["--rnak=3"], "Got the unknown flag --rnak; did you mean --rank? Missing besides: --name (see `pat test"),
        (["--zzz", "-1"], "Got the unknown flag --zzz; missing besides: --name (see"),
        (
            ["--naem", "n", "--rnak", "3"],
            "Got the unknown flags --naem, --rnak; did you mean --name for --naem and --rank for --rnak? (see",
        ),
        (["--lr", "1"], "Got the unknown flag --lr; did you mean --learning_rate?"),
        (["--report", "a"], "Got the unknown flag --report; did you mean --report_to?"),
        (["stray"], "Got 'stray' without a flag before it"),
        (["--learning_rate", "fast"], "Got --learning_rate 'fast'; expected a number"),
        (["--sizes", "1", "2.5"], "Got --sizes '1 2.5'; expected a whole number, or several of them"),
        (["--flag", "maybe"], "Got --flag 'maybe'; expected true or false"),
        (["--save_strategy", "never"], "Got --save_strategy 'never'; expected one of no, steps"),
        (["--learning_rate"], "argument --learning_rate: expected one argument"),
        ([], "--name is missing (Name of it)"),
        (["--name", "n", "--rank", "3", "--rank=4"], "Got --rank a second time; give it once"),
        (["--name", "n", "--flag", "--flag", "no"], "Got --flag a second time; give it once"),
        (["--name", "n", "--on", "--no_on"], "Got --no_on a second time; give it once"),
        (["--name", "n", "--sizes", "1", "--sizes", "2"], "Got --sizes a second time; give it once"),
        (["--config", "a", "--config", "b"], "Got --config twice (a and b); give one file."),
        (["--config", "nowhere.yaml"], "Got --config nowhere.yaml, but there is no such file; expected a YAML"),
        ({"naem": 1}, "Got the unknown flag naem; did you mean name?"),
        ({"name": "n", "learning_rate": "fast"}, "Got learning_rate='fast'; expected a number"),
        ({"name": "n", "rank": 2.5, "flag": 3}, "Got flag=3; expected true or false"),
        ({"name": "n", "learning_rate": True}, "Got learning_rate=True; expected a number"),
        ({"name": "n", "kwargs": True}, "Got kwargs=True; expected a mapping in JSON or a text"),
        ({"name": "n", "marks": True}, "Got marks=True; expected a text, or several of them"),
        (["--name", ""], "Got --name ''; expected a text that is not empty"),
        ({"name": " "}, "Got name=' '; expected a text that is not empty"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(given: Any, line: str) -> None:
    with pytest.raises(PatError) as error:
        parser().build(given) if isinstance(given, dict) else parser().parse(given)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: n\nlearning_rate: a lot\n", "c.yaml, line 2: got learning_rate 'a lot'; expected a number"),
        ("naem: n\n", "c.yaml, line 1: got the unknown flag naem; did you mean name?"),
        (
            "naem: n\nflag: true\nrnak: 3\n",
            "c.yaml, lines 1 and 3: got the unknown flags naem, rnak; did you mean name for naem and rank for rnak?",
        ),
        ("name: n\nflag: 1\n\nflag: 0\n", "c.yaml, line 4: got flag a second time (line 2); give it once."),
        ("name: [", "c.yaml, line 1: not valid YAML"),
        ("just text", "c.yaml: got no YAML mapping"),
        ("env: 3", "c.yaml, line 1: got env '3'; expected a mapping"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(PatError) as error:
        parser().parse(["--config", str(file)])
    assert str(error.value).removeprefix(f"{tmp_path}/").startswith(line)


@dataclass
class Refusing:
    name: str | None = None

    def __post_init__(self) -> None:
        raise PatError(f"Got name={self.name!r}; expected another.")


def test_what_options_refuse_themselves_is_said_as_they_say_it() -> None:
    with pytest.raises(PatError) as error:
        OptionsParser("pat test", Refusing).build({"name": "n"})
    assert str(error.value) == "Got name='n'; expected another."


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--pruning_ratio 25", "0.25"),
        ("--pruning_ratio 0.1 25", "0.25"),
        ("--pruning_ratio 12.5%", "0.125"),
        ("--pruning_ratio 0,125", "0.125"),
        ("--pruning_ratio 0,125 0,25", "0.125 0.25"),
        ("--target_latency 50", "0.5"),
        ("--target_latency 0,5", "0.5"),
        ("--context 1,024", "1024"),
        ("--context 1e3", "1000"),
        ("--target_num_parameters 1,2B", "1.2B"),
        ("--target_num_parameters 100,000,000", "100000000"),
        ("--target_num_parameters 1,200M", "1200M"),
        ("--target_num_parameters 1,5", None),
        ("--target_bytes 1,5GB", "1.5GB"),
        ("--target_bytes 1,024MB", "1024MB"),
        ("--pruning_ratio 1,024", None),
        ("--pruning_ratio 1", None),
        ("--pruning_ratio -0.2", None),
        ("--pruning_ratio nan", None),
        ("--context 0,5", None),
        ("--context -5", None),
        ("--gpus 200%", None),
    ],
)
def test_a_percentage_or_a_comma_is_answered_with_the_number_that_was_meant(words: str, meant: str | None) -> None:
    with pytest.raises(PatError) as error:
        OptionsParser("pat plan", PlanOptions).parse(["--model_name_or_path", "m", *words.split()])
    said = str(error.value)
    assert (f"; did you mean {meant}?" in said) if meant else "did you mean" not in said


def test_two_ratios_may_have_a_comma_between_them() -> None:
    made = OptionsParser("pat plan", PlanOptions).parse(["--model_name_or_path", "m", "--pruning_ratio", "0.125,.25"])
    assert made.pruning_ratio == [0.125, 0.25]
