"""Values that no option can have: status 2 and one line that names the option, before anything is looked for on disk.

The tables run in this process through the command itself. No model is needed: the one that is named is not there.
"""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pat import cli
from pat.config_file import read_config
from pat.errors import PatError
from pat.option import Option
from pat.options import OptionsParser
from pat.ranges import Range
from pat.training.arguments import TuneArguments

GIVEN: dict[str, dict[str, str]] = {
    "tune": {"model_name_or_path": "me/nowhere", "dataset_name": "me/nowhere", "output_dir": "out"},
    "plan": {"model_name_or_path": "me/nowhere"},
    "merge": {"adapter": ".", "output_dir": "out"},
    "convert": {"adapter": ".", "output_dir": "out"},
    "evaluate": {"model": "me/nowhere", "text_file": "./nowhere.txt"},
    "benchmark": {"model": "me/nowhere", "baseline": "me/nowhere"},
    "demo": {"output_dir": "out"},
}

BAD: dict[str, dict[str, str]] = {
    "tune": {
        "per_device_train_batch_size": "0 -1 1.5 x 99999999999999999999",
        "per_device_eval_batch_size": "0 -1 nan",
        "gradient_accumulation_steps": "-1 0 0.5 nan inf x",
        "num_train_epochs": "0 -1 nan inf -inf x 1e300",
        "max_steps": "0 -2 1.5 nan 1e3 9223372036854775808",
        "learning_rate": "-1 nan inf fast -1e-9",
        "warmup_steps": "-1 nan inf -0.1",
        "weight_decay": "-1 nan inf",
        "adam_beta1": "2 1 -0.1 nan",
        "adam_beta2": "1.5 1 -1 inf",
        "adam_epsilon": "-1e-8 nan inf",
        "max_grad_norm": "-1 nan inf",
        "label_smoothing_factor": "-0.1 1 nan",
        "neftune_noise_alpha": "-1 nan",
        "lr_scheduler_kwargs": "x [1]",
        "activation_checkpointing_kwargs": "x",
        "torch_empty_cache_steps": "0 -1",
        "logging_steps": "0 -1 nan",
        "eval_steps": "0 -5 nan inf",
        "eval_delay": "-1 nan",
        "eval_accumulation_steps": "0 -1",
        "save_steps": "0 -1 nan inf",
        "save_total_limit": "0 -3",
        "seed": "-1 4294967296 1.5 nan x",
        "data_seed": "-1 4294967296",
        "dataloader_num_workers": "-1 100000",
        "dataloader_prefetch_factor": "0 -1",
        "router_aux_loss_coef": "-1 nan",
        "dataset_num_proc": "0 -1 100000",
        "max_length": "0 -5 3000000000 nan",
        "pad_to_multiple_of": "0 -8",
        "lora_r": "0 -1 1.5 1000000000000",
        "lora_alpha": "0 -1",
        "lora_dropout": "-1 2 1 nan inf",
        "pruning_ratio": "0 1 -0.1 1.5 nan inf abc",
        "pruned_hidden_size": "0 -4 1.5",
        "pruned_intermediate_size": "0 -4",
        "pruned_num_key_value_heads": "0 -1",
        "pruned_num_hidden_layers": "0 -1",
        "target_num_parameters": "0 -1 1e6 0K -2M 200MB 1.2345K 200T 99999999999B",
        "target_bytes": "0 -1 infGB nanMB 1e400MB 200M small 1.2XB 9E3 ٣MB",
        "target_latency": "0 1 2 nan -0.5",
        "multiple_of": "0 -8 1.5",
        "operator_rank": "0 -1",
        "milestone": "-0.1 1.1 nan inf",
        "active_loss_weight": "-1 nan inf",
        "identity_loss_weight": "-1 nan inf",
        "mask_lr_multiplier": "-1 nan inf",
        "operator_lr_multiplier": "-1 nan inf",
        "refit_tokens": "0 -1",
        "calibration_tokens": "0 -1",
        "gain_tolerance": "-0.1 nan inf",
        "vocabulary_size": "0 -64",
        "distill_weight": "0 -1 1.1 nan",
        "distill_top_k": "0 -1",
        "packing": "maybe 2",
        "recipe": "best",
        "save_strategy": "sometimes",
    },
    "plan": {"pruning_ratio": "0 1 nan -1", "context": "0 -1 1.5", "vocabulary_size": "0 -1", "json": "maybe"}
    | {"target_num_parameters": "0 0.5 200MB many"},
    "merge": {"dtype": "int8 float8 x", "fold_dtype": "bfloat16 x"},
    "convert": {"pruned_hidden_size": "0 -1 24.5 nan inf x 99999999999999999999", "dtype": "int8", "fold_dtype": "x"},
    "evaluate": {"max_length": "0 -1 many", "limit": "0 -1 nan", "batch_size": "0 -1 1.5", "protocol": "guess"},
    "benchmark": {
        "contexts": "0 -1 1,0 x 1.5",
        "batch_sizes": "0 -1 8,-1",
        "new_tokens": "-1 x",
        "repetitions": "0 -1",
        "warmup": "-1",
        "max_seconds": "0 -1 nan inf",
        "threads": "0 -1 100000",
        "dtype": "int8",
    },
    "demo": {"pruning_ratio": "5 0 1 nan -0.5", "max_steps": "0 -1 1.5"},
}

CASES = [
    pytest.param(command, name, value, id=f"{command}-{name}-{value}")
    for command, options in BAD.items()
    for name, values in options.items()
    for value in values.split()
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def refusal(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command, assert that it is refused as bad input, and return the line."""
    status = cli.main(argv)
    printed = capfd.readouterr()
    error = printed.err
    assert status == 2, error
    assert error.startswith("pat: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert "run again with --debug" not in error and "Traceback" not in error and len(error) < 1000, error
    assert printed.out == "" and list(Path().iterdir()) == []
    return error


def argv_of(command: str, **options: str) -> list[str]:
    return [command, *(f"--{name}={value}" for name, value in (GIVEN[command] | options).items())]


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 150


@pytest.mark.parametrize(("command", "name", "value"), CASES)
def test_a_value_that_cannot_be(command: str, name: str, value: str, capfd: pytest.CaptureFixture[str]) -> None:
    error = refusal(argv_of(command, **{name: value}), capfd)
    assert "Got " in error and name in error and "expected" in error, error
    assert "nowhere" not in error, error


def test_every_number_has_a_range() -> None:
    """A new option, or a new version of a library that brings one, makes somebody decide."""
    for name, command in cli.COMMANDS.items():
        parser: OptionsParser[Any] = OptionsParser(f"pat {name}", cli._load(command.options))
        for option in parser.options.values():
            if {int, float} & set(option.kinds) and option.name not in parser._refused:
                assert option.range is not None, f"{name} --{option.name}"
                assert (
                    option.default is None
                    or isinstance(option.default, str | list)
                    or (option.default in Range.of(option.range))
                ), option


# -- files of flags --------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

FILES: dict[str, tuple[bytes, str]] = {
    "anchors that explode": (LAUGHS.encode(), "anchors stand for more than"),
    "an anchor in itself": (b"learning_rate: &a [*a]", "anchors stand for more than"),
    "too many values": (b"a: [" + b"1," * 20000 + b"1]", "more than 4,000 values"),
    "too deep": (b"a: " + b"[" * 2000, "levels of nesting"),
    "too deep a mapping": (b"a: " + b"{b: " * 2000, "levels of nesting"),
    "a giant": (b"# " + b"x" * 10**7, "bytes, more than flags can need"),
    "not UTF-8": (b"learning_rate: \xff\xfe", "not UTF-8"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "UTF-16": ("learning_rate: 1".encode("utf-16"), "not UTF-8"),
    "a NUL": (b"learning_rate: \x00", "not valid YAML"),
    "a name twice": (b"learning_rate: 1\nlearning-rate: 2", "learning_rate a second time (line 1)"),
    "an inner name twice": (b"lr_scheduler_kwargs: {a: 1, a: 2}", "got a a second time"),
    "a list for a number": (b"learning_rate: [1, 2]", "learning_rate"),
    "a mapping for a number": (b"learning_rate: {a: 1}", "learning_rate"),
    "a mapping for a text": (b"template: {a: 1}", "template"),
    "a list for a text": (b"template: [chat, alpaca]", "template"),
    "lists in a list": (b"lora_target_modules: [[a], [b]]", "lora_target_modules"),
    "a list for a path": (b"output_dir: [a, b]", "output_dir"),
    "a number for a mapping": (b"env: 3", "env"),
    "a list for a name": (b"[a, b]: 3", "for a name"),
    "a mapping for a name": (b"{a: b}: 3", "for a name"),
    "code": (b"env: !!python/object/apply:os.system ['touch hacked']", "env"),
    "code in a mapping": (b"lr_scheduler_kwargs: {a: !!python/name:os.system x}", "not valid YAML"),
    "a list": (b"- learning_rate: 1", "no YAML mapping"),
    "a text": (b"learning_rate", "no YAML mapping"),
    "nothing": (b"", "no YAML mapping"),
    "two documents": (b"a: 1\n---\nb: 2", "not valid YAML"),
    "an unknown anchor": (b"learning_rate: *nothing", "not valid YAML"),
    "a tab": (b"a:\n\t- 1", "not valid YAML"),
    "a date of no calendar": (b"lr_scheduler_kwargs: {a: 2024-13-45}", "not valid YAML"),
    "no range": (b"adam_beta1: 2", "adam_beta1"),
    "NaN": (b"learning_rate: .nan", "learning_rate"),
    "a variable of no environment": (b'env: {"A=B": "1"}', "env"),
    "a variable with a NUL": (b'env: {PAT_TEST_X: "a\\0b"}', "env"),
    "a text with a NUL": (b'template: "a\\0b"', "template"),
    "half a letter": (b'template: "\\uD800"', "template"),
    "a long value": (b"learning_rate: " + b"x" * 10**5, "learning_rate"),
    "a long name": (b"x" * 900 + b": 1", "unknown flag"),
    "a token in a list": (b"hub_token: [hf_secret, hf_other]", "hub_token"),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_a_file_of_flags_that_cannot_be(
    content: bytes, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    started = time.perf_counter()
    given_options = {name: value for name, value in GIVEN["tune"].items() if name.encode() not in content}
    flags = [f"--{name}={value}" for name, value in given_options.items()]
    error = refusal(["tune", *flags, f"--config={tmp_path / 'run.yaml'}"], capfd)
    assert words in error and "hf_secret" not in error, error
    assert time.perf_counter() - started < 10


def test_an_anchor_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("env: &e {A: 1}\nlr_scheduler_kwargs: *e\nx: &x 3\ny: *x\n")
    assert [value for _, value, _ in read_config(tmp_path / "run.yaml")] == [{"A": 1}, {"A": 1}, "3", "3"]


@pytest.mark.parametrize("name", ["/dev/null/out", "/proc/out", "x" * 300, "a/" * 3000 + "b"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((command, "output_dir") for command in ("tune", "merge", "benchmark", "demo", "evaluate")),
        ("evaluate", "output"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_first(
    command: str, option: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {option: name} | ({"tasks": "arc_easy"} if option == "output_dir" and command == "evaluate" else {})
    error = refusal(argv_of(command, **options), capfd)
    assert "cannot be" in error and "nowhere" not in error, error


# -- whatever there may be -------------------------------------------------------------------------------------------

PARSER: OptionsParser[TuneArguments] = OptionsParser("pat tune", TuneArguments)

WORDS = st.one_of(
    st.sampled_from(["nan", "inf", "-inf", "-1", "0", "1e400", "1" * 400, "", "none", "null", "{}", "[]", "true", "٣"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


@settings(max_examples=300)
@given(name=st.sampled_from(sorted(PARSER.options)), word=WORDS)
def test_any_word_is_read_or_refused(name: str, word: str) -> None:
    option: Option = PARSER.options[name]
    try:
        value = option.read(word)
        option.check(value)
    except (ValueError, PatError) as error:
        assert str(error)
        return
    if option.range is not None and isinstance(value, int | float):
        assert value in Range.of(option.range)
