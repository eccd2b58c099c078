"""Bad input: exit status 2, one line on stderr that says what was given, expected and to be done, nothing written."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build, tiny_tokenizer
from tiny_training import attach, tuner_of
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
)

from pat import cli
from pat.families import FAMILIES

ROWS = [{"instruction": f"Say {number}", "output": f"It is {number}."} for number in range(12)]

TRAINING = ("--max_steps", "3", "--per_device_train_batch_size", "2", "--lora_r", "2", "--disable_tqdm", "true")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, adapters and data, good and bad."""
    root = tmp_path_factory.mktemp("bad-input")

    def save(name: str, model: PreTrainedModel) -> None:
        model.save_pretrained(root / name)
        tiny_tokenizer(root / name)

    save("base", build("llama", tied=True))
    save("wider", build("llama", tied=True, hidden_size=64))
    save("gemma2", build("gemma2", tied=True))
    gpt2 = {"vocab_size": 128, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    save("gpt2", GPT2LMHeadModel(GPT2Config(**gpt2)))
    bert = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    save("bert", BertForSequenceClassification(BertConfig(**bert, intermediate_size=16)))
    T5Config(vocab_size=128, architectures=["T5ForConditionalGeneration"]).save_pretrained(root / "t5")
    broken = build("llama", tied=True)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    save("broken", broken)
    (root / "no-config").mkdir()
    (root / "no-config" / "model.safetensors").write_bytes(b"weights")
    (root / "run" / "model").mkdir(parents=True)
    (root / "run" / "model" / "config.json").write_text("{}")
    (root / "no-tokenizer").mkdir()
    for file in ("config.json", "model.safetensors"):
        (root / "no-tokenizer" / file).write_bytes((root / "base" / file).read_bytes())

    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    adapter = attach(base, rotation="none")
    adapter.save_pretrained(root / "soft")
    tuner_of(adapter).set_step(1, 1)
    adapter.save_pretrained(root / "adapter")

    def write(name: str, content: str) -> None:
        (root / name).write_text(content)

    lines = [json.dumps(row) for row in ROWS]
    write("data.jsonl", "\n".join(lines))
    write("empty.jsonl", "")
    write("malformed.jsonl", "\n".join([*lines[:2], '{"instruction": ', *lines[2:]]))
    write("columns.jsonl", '{"frage": "a", "antwort": "b"}\n')
    write("long.jsonl", json.dumps({"prompt": "word " * 30, "completion": "yes"}) + "\n")
    write("no-responses.jsonl", '{"prompt": "a", "completion": ""}\n')
    write("data.txt", "plain text")
    write("config.yaml", "pruning_ratio: [")
    (root / "full").mkdir()
    write("full/letter.txt", "do not touch")
    return root


@pytest.fixture(autouse=True)
def in_places(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names in this file are those of the fixture."""
    monkeypatch.chdir(places)


def snapshot(folder: Path) -> dict[str, str]:
    """Return every file and folder below with a digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def flags(**options: Any) -> list[str]:
    """Return options as flags; those that are None are left out."""
    return [item for name, value in options.items() if value is not None for item in (f"--{name}", str(value))]


def tune(**options: Any) -> list[str]:
    """Return a command line of `pat tune` that is fine but for the given options."""
    good = {"model_name_or_path": "base", "dataset_name": "data.jsonl", "output_dir": "out"}
    return ["tune", *flags(**(good | options)), *TRAINING]


def assert_refused(argv: list[str], words: list[str], places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Run a command and assert that it is refused as bad input is to be refused."""
    before = snapshot(places)
    capfd.readouterr()
    status = cli.main(argv)
    printed = capfd.readouterr()
    assert status == 2, printed.err
    assert_one_line(printed.err, words)
    assert printed.out == ""
    assert snapshot(places) == before


def assert_one_line(error: str, words: list[str]) -> None:
    assert error.startswith("pat: ") and error.endswith("\n") and error.count("\n") == 1, error
    for word in words:
        assert word in error, f"{word!r} is not in {error!r}"
    assert "Traceback" not in error
    assert "--debug" not in error, f"an error that nobody foresaw: {error}"


MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no such folder": ({"model_name_or_path": "./nowhere"}, ["'./nowhere'", "no such folder", "expected"]),
    "no such hub id": ({"model_name_or_path": "nobody/nothing"}, ["'nobody/nothing'", "hub"]),
    "a file": ({"model_name_or_path": "data.jsonl"}, ["'data.jsonl'", "expected a model folder"]),
    "no config": ({"model_name_or_path": "no-config"}, ["'no-config'", "no config.json", "expected a saved model"]),
    "a classifier": ({"model_name_or_path": "bert"}, ["BertForSequenceClassification", "ForCausalLM"]),
    "an encoder-decoder": ({"model_name_or_path": "t5"}, ["T5ForConditionalGeneration", "ForCausalLM"]),
    "unsupported family": ({"model_name_or_path": "gpt2"}, ["'gpt2'", "not supported", *FAMILIES, "LayerNorm"]),
}

WIDTHS: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{
        f"ratio {ratio}": ({"pruning_ratio": ratio}, [f"pruning_ratio={float(ratio)}", "above 0 and below 1"])
        for ratio in ("0", "1", "-0.1", "1.5", "nan")
    },
    "ratio abc": ({"pruning_ratio": "abc"}, ["pruning_ratio", "'abc'", "a number"]),
    "illegal": (
        {"pruned_hidden_size": 35},
        ["pruned_hidden_size=35", "multiple of num_attention_heads=4", "nearest legal: 32 and 36"],
    ),
    "not aligned": (
        {"pruned_hidden_size": 36, "multiple_of": 16},
        ["pruned_hidden_size=36", "multiple_of=16", "nearest legal: 32"],
    ),
    "not smaller": ({"pruned_hidden_size": 48}, ["pruned_hidden_size=48", "smaller than", "48", "nearest legal: 44"]),
    "zero": ({"pruned_hidden_size": 0}, ["pruned_hidden_size=0", "at least 1"]),
    "ratio and width": (
        {"pruned_hidden_size": 36, "pruning_ratio": 0.25},
        ["pruning_ratio=0.25", "pruned_hidden_size=36", "one of the two"],
    ),
    "alignment beyond the model": ({"multiple_of": 64}, ["multiple_of=64", "hidden_size=48", "lower multiple_of"]),
}

DATA: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing": ({"dataset_name": "nowhere.jsonl"}, ["nowhere.jsonl", "no such file", "expected"]),
    "no such hub id": ({"dataset_name": "nobody/nothing"}, ["nobody/nothing", "no such file", "hub", ".jsonl"]),
    "of no known kind": ({"dataset_name": "./data.txt"}, ["data.txt", "'.txt'", ".jsonl"]),
    "empty": ({"dataset_name": "empty.jsonl"}, ["empty.jsonl", "no rows", "expected"]),
    "malformed": ({"dataset_name": "malformed.jsonl"}, ["malformed.jsonl, line 3", "not valid JSON", "expected"]),
    "wrong columns": (
        {"dataset_name": "columns.jsonl"},
        ["columns.jsonl", "antwort, frage", "instruction", "completion", "messages", "text"],
    ),
    "no responses": ({"dataset_name": "no-responses.jsonl"}, ["all 1 responses are empty", "expected"]),
    "all truncated": (
        {"dataset_name": "long.jsonl", "max_length": 32},
        ["truncated away", "max_length 32", "151", "--max_length"],
    ),
    "held-out file missing": ({"held_out": "nowhere.jsonl"}, ["nowhere.jsonl", "no such file"]),
    "held-out too many": ({"held_out": 12}, ["held_out=12", "12 usable rows"]),
    "held-out file without responses": ({"held_out": "no-responses.jsonl"}, ["all 1 responses are empty"]),
}

OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "output folder not empty": ({"output_dir": "full"}, ["full", "not empty", "choose another"]),
    "output is a file": ({"output_dir": "data.jsonl"}, ["data.jsonl", "not a folder"]),
    "unknown flag": ({"prunning_ratio": 0.3}, ["--prunning_ratio", "--pruning_ratio"]),
    "no value": ({"learning_rate": "fast"}, ["learning_rate", "'fast'"]),
    "unknown recipe": ({"recipe": "best"}, ["'best'", "default, paper"]),
    "config missing": ({"config": "nowhere.yaml"}, ["nowhere.yaml", "no such file", "YAML"]),
    "config malformed": ({"config": "config.yaml"}, ["config.yaml, line 1", "YAML"]),
    "unknown mask": ({"mask": "random"}, ["mask='random'", "'trainable', 'frozen'"]),
    "unknown rotation": ({"rotation": "random"}, ["rotation='random'", "'auto', 'pca', 'none'"]),
    "rotation of a post-norm family": (
        {"model_name_or_path": "gemma2", "rotation": "pca"},
        ["rotation='pca'", "gemma2", "'auto' or 'none'"],
    ),
    "milestone": ({"milestone": 1.5}, ["milestone=1.5", "at least 0 and at most 1"]),
    "operator rank too large": ({"operator_rank": 49}, ["operator_rank=49", "1 to 48", "'dense'"]),
    "operator rank of nothing": ({"operator_rank": 0}, ["operator_rank=0", "at least 1"]),
    "operator rank a word": ({"operator_rank": "full"}, ["operator_rank='full'", "'dense'"]),
    "negative weight": ({"identity_loss_weight": -1}, ["identity_loss_weight=-1", "at least 0"]),
    "calibration missing": ({"calibration": "nowhere.txt"}, ["calibration", "nowhere.txt", "no such file"]),
    "calibration empty": ({"calibration": "empty.jsonl"}, ["calibration", "empty.jsonl", "empty"]),
    "unknown template": ({"template": "vicuna"}, ["'vicuna'", "alpaca"]),
    "an optimizer of another package": ({"optim": "schedule_free_adamw"}, ["schedulefree", "install"]),
    "a schedule without its arguments": ({"lr_scheduler_type": "cosine_with_min_lr"}, ["min_lr"]),
    "a step that cannot be": ({"adam_beta1": 2.0}, ["adam_beta1=2.0", "at least 0 and below 1"]),
    "negative learning rate": ({"learning_rate": -1}, ["learning_rate=-1", "at least 0"]),
    "a module that is not there": ({"lora_modules_to_save": "nothing"}, ["lora_modules_to_save=nothing"]),
    "targets that are not there": ({"lora_target_modules": "nothing"}, ["lora_target_modules=nothing"]),
    "a flag that does nothing here": ({"use_peft": "false"}, ["use_peft=False", "adapter in any case"]),
    "an engine for several processes": ({"fsdp": "full_shard"}, ["fsdp", "distributed training"]),
    "lora on the head": ({"lora_target_modules": "lm_head"}, ["lm_head", "target_modules"]),
    "nothing to load the text with": ({"model_name_or_path": "no-tokenizer"}, ["tokenizer", "'no-tokenizer'"]),
}


def cases(*tables: dict[str, tuple[dict[str, Any], list[str]]]) -> Iterator[Any]:
    for table in tables:
        for name, (options, words) in table.items():
            yield pytest.param(options, words, id=name)


@pytest.mark.parametrize(("options", "words"), cases(MODELS, WIDTHS, DATA, OPTIONS))
def test_tune_refuses_before_it_loads_weights(
    options: dict[str, Any],
    words: list[str],
    places: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any, **__: Any) -> None:  # but for the tiny one of the rehearsal, which is made of a configuration
        pytest.fail("the weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    assert_refused(tune(**options), words, places, capfd)


@pytest.mark.parametrize("missing", ["model_name_or_path", "dataset_name"])
def test_tune_names_a_missing_flag(missing: str, places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(tune(**{missing: None}), [f"--{missing}", "missing", "pat tune --help"], places, capfd)


@pytest.mark.parametrize(("options", "words"), cases(MODELS, WIDTHS))
def test_plan_refuses(
    options: dict[str, Any], words: list[str], places: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["plan", *flags(**({"model_name_or_path": "base"} | options))], words, places, capfd)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_model": "wider"}, ["does not fit", "hidden_size=64", "hidden_size=48", "base"]),
        ({"base_model": "gemma2"}, ["does not fit", "model_type=gemma2", "model_type=llama"]),
        ({"base_model": "./nowhere"}, ["'./nowhere'", "no such folder"]),
        ({"adapter": "nowhere"}, ["nowhere", "no such folder", "expected"]),
        ({"adapter": "base"}, ["base", "adapter_config.json"]),
        ({"adapter": "soft"}, ["never been trained", "PatCallback", "milestone"]),
        ({"output_dir": "full"}, ["full", "not empty"]),
        ({"dtype": "int8"}, ["'int8'", "bfloat16"]),
        ({"fold_dtype": "bfloat16"}, ["'bfloat16'", "float64 or float32"]),
        ({"max_shard_size": "huge"}, ["'huge'", "5GB"]),
        ({"device": "quantum"}, ["'quantum'", "cpu"]),
        ({"text_file": "nowhere.txt"}, ["nowhere.txt", "no such file"]),
        ({"config": "config.yaml"}, ["config.yaml, line 1", "YAML"]),
    ],
    ids=lambda value: "-".join(f"{k}-{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_merge_refuses(
    options: dict[str, Any], words: list[str], places: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["merge", *flags(**({"adapter": "adapter", "output_dir": "out"} | options))], words, places, capfd)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text_file": None}, ["--text_file", "--dataset_name"]),
        ({"model": "./nowhere"}, ["'./nowhere'", "no such folder"]),
        ({"model": "gpt2"}, ["'gpt2'", "not supported"]),
        ({"model": "run"}, ["'run'", "no config.json", "pass run/model"]),
        ({"text_file": "empty.jsonl"}, ["empty.jsonl", "empty"]),
        ({"dataset_name": "columns.jsonl"}, ["columns.jsonl", "antwort, frage"]),
        ({"max_length": "many"}, ["max_length", "'many'"]),
        ({"limt": 3}, ["--limt"]),
    ],
    ids=str,
)
def test_evaluate_refuses(
    options: dict[str, Any], words: list[str], places: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["evaluate", *flags(**({"model": "base", "text_file": "data.txt"} | options))], words, places, capfd)


def test_the_installed_command_behaves_the_same(places: Path) -> None:
    before = snapshot(places)
    argv = [sys.executable, "-m", "pat", *tune(model_name_or_path="gpt2")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert_one_line(done.stderr, MODELS["unsupported family"][1])
    assert done.stdout == ""
    assert snapshot(places) == before


def test_a_milestone_before_the_first_step_without_an_order_of_channels_is_refused(
    places: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Known only when the trainer has counted its steps; still nothing is written."""
    before = snapshot(places)
    assert cli.main(tune(rotation="none", milestone=0)) == 2
    last = [line for line in capfd.readouterr().err.splitlines() if line][-1]
    assert_one_line(f"{last}\n", ["milestone at step 0", "calibrate"])
    assert snapshot(places) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": "1e30", "rotation": "none"}, ["at step 1", "--learning_rate"]),
        ({"model_name_or_path": "broken", "axes": "hidden", "rotation": "none"}, ["at step 0", "base model"]),
        ({"model_name_or_path": "broken"}, ["calibration", "weights"]),
    ],
    ids=["learning rate", "infinite weight", "infinite weight seen by the calibration"],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_finite_weights(
    options: dict[str, Any], words: list[str], tmp_path: Path, places: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, out = snapshot(places), tmp_path / "out"
    assert cli.main(tune(output_dir=out, gain_tolerance=0.6, milestone=0.5, **options)) == 1
    error = capfd.readouterr().err
    last = [line for line in error.splitlines() if line][-1]
    kept = out / "checkpoints" / "last-finite"
    assert_one_line(f"{last}\n", ["non-finite", "expected finite", *words, str(kept)])
    assert "Traceback" not in error
    weights = load_file(kept / "adapter_model.safetensors")
    assert weights and all(tensor.isfinite().all() for tensor in weights.values())
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "run.json"]
    assert snapshot(places) == before
