"""Files and places that cannot be, for every command: status 2, one line that names them, nothing written."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import safetensors_bytes
from safetensors.torch import load_file, save_file
from tiny_models import build, tiny_tokenizer
from tiny_runs import tune_flags

import pat
from pat import cli
from pat.errors import PatError

SECONDS = 10.0
"""No bad input takes longer to be refused."""

ROWS = [{"instruction": f"Say {number}", "output": f"It is {number}."} for number in range(24)]

ARGUMENTS: dict[str, dict[str, str]] = {
    "tune": {"model_name_or_path": "base", "dataset_name": "data.jsonl", "output_dir": "new", "max_steps": "2"},
    "plan": {"model_name_or_path": "base"},
    "merge": {"adapter": "out/adapter", "base_model": "base", "output_dir": "new"},
    "convert": {"adapter": "published", "base_model": "base", "output_dir": "new"},
    "evaluate": {"model": "base", "text_file": "text.txt"},
    "benchmark": {"model": "base", "baseline": "base"},
    "report": {"run": "out"},
    "demo": {"output_dir": "new", "cache_dir": "full"},
}
"""What is fine but for what a case changes."""


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, a finished run and an adapter of the published code."""
    root = tmp_path_factory.mktemp("hostile")
    model = build("llama", tied=True, num_hidden_layers=2)
    model.save_pretrained(root / "base", max_shard_size="60KB")
    tiny_tokenizer(root / "base")
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (root / "text.txt").write_text("a text to measure on " * 60)
    (root / "full").mkdir()
    (root / "full" / "letter.txt").write_text("do not touch")
    pat.tune(**tune_flags(root / "base", root / "data.jsonl", root / "out", rotation="none", milestone=0.5))
    size = model.config.hidden_size
    places = ["model.dimdown0", *(f"model.layers.{layer}.dimdown{branch}" for layer in (0, 1) for branch in (0, 1))]
    parts = {"dimdown_inout.0.weight": (2, size), "dimdown_inout.1.weight": (size, 2)}
    tensors = {f"base_model.model.{at}.{part}": torch.zeros(shape) for at in places for part, shape in parts.items()}
    mask = torch.where(torch.arange(size) < size // 2, 0.5, -0.5)
    tensors["base_model.model.model.dimdown0.dimdown_mask.mask"] = mask.view(1, 1, -1)
    for letter, shape in (("A", (2, size)), ("B", (size, 2))):
        for layer in (0, 1):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{letter}.weight"
            tensors[name] = torch.zeros(shape)
    (root / "published").mkdir()
    save_file(tensors, root / "published" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "use_rslora": False}
    (root / "published" / "adapter_config.json").write_text(json.dumps(config))
    return root


@pytest.fixture
def work(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to spoil and to stand in."""
    shutil.copytree(origin, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("pat.demo.command.prepare_smollm2", lambda *_, **__: pytest.fail("the base was fetched"))
    return tmp_path / "work"


def snapshot(folder: Path) -> dict[str, str]:
    """Return every file and folder below with a digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def refused(command: str, work: Path, capfd: pytest.CaptureFixture[str], words: str = "", **options: Any) -> str:
    """Run a command, assert that it is refused as bad input is to be, and return the line."""
    given = {name: value for name, value in (ARGUMENTS[command] | options).items() if value is not None}
    before, started = snapshot(work), time.monotonic()
    capfd.readouterr()
    status = cli.main([command, *(f"--{name}={value}" for name, value in given.items())])
    seconds, printed = time.monotonic() - started, capfd.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("pat: ")]
    assert status == 2, printed.err
    assert len(lines) == 1 and printed.err.endswith(f"{lines[0]}\n"), printed.err
    line = lines[0]
    assert "Traceback" not in printed.err and "run again with --debug" not in line and len(line) < 2000, printed.err
    assert line.isprintable() and words in line, line
    assert "│" not in printed.out and snapshot(work) == before
    assert seconds < SECONDS, seconds
    return line


# -- places -----------------------------------------------------------------------------------------------------------

NO_FOLDER = ["./nowhere", "data.jsonl", "full", "x" * 300, "./a\nb", "./\x1b[31mred", "./<b>bold</b>", "/dev/null"]
NO_FILE = ["./nowhere", "full", "x" * 300, "./a\nb", "/dev/null", "empty", "binary", "utf16"]
NO_NEW_FOLDER = ["data.jsonl", "full", "/proc/new", "/dev/null/new", "x" * 300, "loop"]
NO_NEW_FILE = ["full", "/proc/new", "/dev/null/new", "x" * 300, "loop/new"]

PLACES: dict[str, dict[str, list[str]]] = {
    "tune": {
        "model_name_or_path": NO_FOLDER,
        "dataset_name": [*NO_FILE, "/etc/passwd"],
        "output_dir": NO_NEW_FOLDER,
        "held_out": NO_FILE,
        "calibration": NO_FILE,
        "chat_template_path": ["./nowhere", "full", "binary"],
        "resume_from_checkpoint": ["./nowhere", "full", "data.jsonl"],
        "teacher": NO_FOLDER[:4],
        "config": NO_FILE,
    },
    "plan": {"model_name_or_path": NO_FOLDER, "calibrate": NO_FILE, "config": NO_FILE},
    "merge": {
        "adapter": NO_FOLDER,
        "base_model": NO_FOLDER,
        "output_dir": NO_NEW_FOLDER,
        "text_file": NO_FILE,
        "config": NO_FILE[:2],
    },
    "convert": {
        "adapter": [*NO_FOLDER, "out/adapter", "base"],
        "base_model": NO_FOLDER,
        "output_dir": NO_NEW_FOLDER,
        "text_file": NO_FILE,
    },
    "evaluate": {
        "model": NO_FOLDER,
        "text_file": NO_FILE,
        "dataset_name": NO_FILE,
        "output": NO_NEW_FILE,
    },
    "benchmark": {"model": NO_FOLDER, "baseline": NO_FOLDER, "output_dir": NO_NEW_FOLDER},
    "report": {"run": NO_FOLDER, "output": [f"{name}.html" for name in NO_NEW_FILE]},
    "demo": {"output_dir": NO_NEW_FOLDER, "dataset_name": NO_FILE, "cache_dir": ["data.jsonl", "/proc/new", "x" * 300]},
}

PLACE_CASES = [
    pytest.param(command, option, value, id=f"{command}-{option}-{value[:20]!r}")
    for command, options in PLACES.items()
    for option, values in options.items()
    for value in values
]


@pytest.mark.parametrize(("command", "option", "value"), PLACE_CASES)
def test_a_place(command: str, option: str, value: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (work / "loop").symlink_to("loop")
    (work / "empty").write_bytes(b"")
    (work / "binary").write_bytes(bytes(range(256)) * 4)
    (work / "utf16").write_bytes("a text in other letters".encode("utf-16"))
    (work / "full.html").mkdir()
    suffix = ".jsonl" if option in ("dataset_name", "held_out", "calibrate") else ""
    if suffix and value in ("empty", "binary", "utf16"):
        (work / value).rename(work / f"{value}{suffix}")
        value += suffix
    refused(command, work, capfd, **{option: value})


@pytest.mark.parametrize("value", ["/proc/new.png", "/dev/null/new.png", f"{'x' * 300}.png", "full.png", "new.txt"])
def test_a_place_for_a_figure(value: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (work / "full.png").mkdir()
    refused("plan", work, capfd, calibrate="data.jsonl", figure=value)


# -- data -------------------------------------------------------------------------------------------------------------


def lines(*rows: Any) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def chat(*messages: Any) -> bytes:
    return lines({"messages": list(messages)})


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

DATA: dict[str, tuple[str, bytes]] = {
    "nothing": ("jsonl", b""),
    "blank lines": ("jsonl", b"\n \n\t\n"),
    "an empty list": ("json", b"[]"),
    "an empty object": ("jsonl", b"{}"),
    "a number": ("json", b"3"),
    "a text": ("json", b'"abc"'),
    "null": ("json", b"null"),
    "NaN": ("json", b"NaN"),
    "a list of numbers": ("json", b"[1, 2]"),
    "a list of lists": ("json", b"[[1], [2]]"),
    "cut off": ("jsonl", b'{"instruction": "a", "outp'),
    "two in a line": ("jsonl", b'{"instruction": "a", "output": "b"} {"instruction": "a", "output": "b"}'),
    "UTF-16": ("jsonl", lines(*ROWS).decode().encode("utf-16")),
    "Latin letters": ("jsonl", '{"instruction": "é", "output": "é"}'.encode("latin-1")),
    "binary": ("jsonl", bytes(range(256))),
    "a pickle": ("jsonl", pickle.dumps(ROWS)),
    "no gzip": ("jsonl.gz", lines(*ROWS)),
    "half a gzip": ("jsonl.gz", gzip.compress(lines(*ROWS))[:40]),
    "no bzip2": ("jsonl.bz2", lines(*ROWS)),
    "no xz": ("jsonl.xz", lines(*ROWS)),
    "no zstandard": ("jsonl.zst", lines(*ROWS)),
    "no parquet": ("parquet", lines(*ROWS)),
    "half a parquet": ("parquet", b"PAR1" + b"\0" * 40 + b"PAR1"),
    "a CSV of a header": ("csv", b"instruction,output\n"),
    "a short CSV row": ("csv", b"instruction,output\na\n"),
    "a long CSV row": ("csv", b"instruction,output\na,b,c\n"),
    "a CSV column twice": ("csv", b"output,output\na,b\n"),
    "an open quote": ("csv", b'instruction,output\n"a,b\n'),
    "a NUL in CSV": ("csv", b"instruction,output\na\0,\n"),
    "CSV of other columns": ("csv", b"a,b\n1,2\n"),
    "TSV with commas": ("tsv", b"instruction,output\na,b\n"),
    "a field twice": ("jsonl", b'{"instruction": "a", "output": "b", "output": "c"}'),
    "too deep": ("jsonl", b'{"instruction": ' + b"[" * 20000 + b"]" * 20000 + b', "output": "b"}'),
    "no response": ("jsonl", lines({"instruction": "a"})),
    "an empty response": ("jsonl", lines({"instruction": "a", "output": ""})),
    "a null response": ("jsonl", lines({"instruction": "a", "output": None})),
    "responses of space": ("jsonl", lines({"instruction": "a", "output": "  "}, {"instruction": "a", "output": "\n"})),
    "a list for a response": ("jsonl", lines({"instruction": "a", "output": ["b"]})),
    "an object for a response": ("jsonl", lines({"instruction": "a", "output": {"b": 1}})),
    "true for an instruction": ("jsonl", lines({"instruction": True, "output": "b"})),
    "NaN for a response": ("jsonl", b'{"instruction": "a", "output": NaN}'),
    "half a letter": ("jsonl", b'{"instruction": "a", "output": "\\ud800"}'),
    "half a letter in a prompt": ("jsonl", b'{"instruction": "\\udfff", "output": "b"}'),
    "a number for an input": ("jsonl", lines({"instruction": "a", "input": 3, "output": "b"})),
    "another row later": ("jsonl", lines(*ROWS, {"frage": "a"})),
    "another kind later": ("jsonl", lines(*ROWS, {"messages": [USER, ANSWER]})),
    "a wrong type later": ("jsonl", lines(*ROWS, {"instruction": "a", "output": ["b"]})),
    "an array later": ("jsonl", lines(*ROWS, [1])),
    "other columns": ("jsonl", lines({"question": "a", "reply": "b"})),
    "two formats": ("jsonl", lines({"instruction": "a", "output": "b", "messages": 3, "prompt": "x"})),
    "no messages": ("jsonl", chat()),
    "messages of text": ("jsonl", lines({"messages": "abc"})),
    "messages of null": ("jsonl", lines({"messages": None})),
    "messages of an object": ("jsonl", lines({"messages": {"role": "user"}})),
    "messages of texts": ("jsonl", chat("a", "b")),
    "messages of lists": ("jsonl", chat([USER], [ANSWER])),
    "a message of null": ("jsonl", chat(USER, None)),
    "no role": ("jsonl", chat({"content": "a"}, ANSWER)),
    "no content": ("jsonl", chat({"role": "user"}, {"role": "assistant"})),
    "an unknown role": ("jsonl", chat({"role": "robot", "content": "a"}, ANSWER)),
    "a number for a role": ("jsonl", chat({"role": 3, "content": "a"}, ANSWER)),
    "a number for a content": ("jsonl", chat(USER, {"role": "assistant", "content": 3})),
    "an image for a content": ("jsonl", chat({"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER)),
    "nobody answers": ("jsonl", chat(USER)),
    "an answer of null": ("jsonl", chat(USER, {"role": "assistant", "content": None})),
    "turns in another order": ("jsonl", chat(ANSWER, USER)),
    "a prompt of numbers": ("jsonl", lines({"prompt": [1, 2], "completion": [3]})),
    "a prompt of text, an answer of messages": ("jsonl", lines({"prompt": "a", "completion": [ANSWER]})),
    "a text of null": ("jsonl", lines({"text": None})),
    "a text of a number": ("jsonl", lines({"text": 3})),
    "an empty text": ("jsonl", lines({"text": ""})),
    "several lists": ("json", json.dumps({"a": ROWS, "b": ROWS}).encode()),
    "one row and ten held out": ("jsonl", lines(ROWS[0])),
    "tools of text": ("jsonl", lines({"messages": [USER, ANSWER], "tools": "abc"})),
    "a spreadsheet": ("xlsx", b"PK\x03\x04"),
    "an archive": ("zip", b"PK\x03\x04"),
    "no suffix": ("", lines(*ROWS)),
}

SHORTER = ("evaluate", "plan", "demo")
"""Commands that read data by the same reader; a part of the table is tried with them."""


def sampled(case: str, command: str) -> bool:
    """Tell whether a case is among the fifth that is tried with a command which shares its reader with another."""
    return hashlib.sha256(f"{case}{command}".encode()).digest()[0] % 5 == 0


@pytest.mark.parametrize(
    ("case", "command"),
    [(case, command) for command in ("tune", *SHORTER) for case in DATA if command == "tune" or sampled(case, command)],
)
def test_data(case: str, command: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    suffix, content = DATA[case]
    path = work / f"bad{'.' if suffix else ''}{suffix}"
    path.write_bytes(content)
    option = "calibrate" if command == "plan" else "dataset_name"
    more = {"held_out": "10"} if command == "tune" else {}
    refused(command, work, capfd, "bad", **{option: f"./{path.name}"}, **more)


# -- models -----------------------------------------------------------------------------------------------------------

Spoil = Callable[[Path], Any]


def put(file: str, **values: Any) -> Spoil:
    """Set fields of a JSON file; those that are `...` are left out."""

    def spoil(work: Path) -> None:
        path = work / file
        fields = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))

    return spoil


def content(file: str, data: bytes) -> Spoil:
    return lambda work: (work / file).write_bytes(data)


def gone(pattern: str) -> Spoil:
    def spoil(work: Path) -> None:
        found = list(work.glob(pattern))
        assert found
        for path in found:
            path.unlink()

    return spoil


def weights(folder: str, change: Callable[[dict[str, torch.Tensor]], Any], file: str | None = None) -> Spoil:
    """Change the tensors of a folder, which are put into one file."""

    def spoil(work: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for path in [*(work / folder).glob("*.safetensors")]:
            tensors |= load_file(path)
            path.unlink()
        for index in (work / folder).glob("*.index.json"):
            index.unlink()
        change(tensors)
        save_file(tensors, work / folder / (file or "model.safetensors"), {"format": "pt"})

    return spoil


def header(folder: str, change: Callable[[dict[str, Any]], Any], file: str = "model.safetensors") -> Spoil:
    """Change what the header of a file of weights says of them."""

    def spoil(work: Path) -> None:
        weights(folder, lambda tensors: None, file)(work)
        path = work / folder / file
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        said = json.loads(data[8 : 8 + size])
        changed = change(said)
        path.write_bytes(safetensors_bytes(said if changed is None else changed, data[8 + size :]))

    return spoil


def first_offsets(*offsets: int) -> Callable[[dict[str, Any]], None]:
    def change(said: dict[str, Any]) -> None:
        said[max(said)]["data_offsets"] = list(offsets)

    return change


CONFIG = "base/config.json"

CONFIGS: dict[str, Spoil] = {
    "empty": content(CONFIG, b""),
    "a list": content(CONFIG, b"[]"),
    "null": content(CONFIG, b"null"),
    "a number": content(CONFIG, b"3"),
    "no JSON": content(CONFIG, b"{"),
    "binary": content(CONFIG, bytes(range(256))),
    "UTF-16": content(CONFIG, "{}".encode("utf-16")),
    "too deep": content(CONFIG, b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "large": content(CONFIG, b'{"a": "' + b"x" * 2**25 + b'"}'),
    "a folder": lambda work: ((work / CONFIG).unlink(), (work / CONFIG).mkdir()),
    "a link to itself": lambda work: ((work / CONFIG).unlink(), (work / CONFIG).symlink_to("config.json")),
    **{
        f"{name}={value!r}"[:50]: put(CONFIG, **{name: value})
        for name, values in {
            "model_type": [..., None, 3, [], {}, "", "unheard", "../llama", "t5"],
            "architectures": [3, "abc", ["T5ForConditionalGeneration"], [3]],
            "hidden_size": [None, 0, -4, 1.5, "48", "x", [], {}, 47, 2**40, float("nan"), True],
            "intermediate_size": [None, 0, -1, 0.5, "x", []],
            "num_hidden_layers": [None, 0, -1, 1, 2.5, "x", []],
            "num_attention_heads": [None, 0, -4, 5, 1.5, "x", []],
            "num_key_value_heads": [0, -2, 3, 1.5, "x"],
            "head_dim": [0, -2, 1.5, "x", 6],
            "vocab_size": [None, 0, -1, 7, 1.5, "x", 2**40],
            "max_position_embeddings": [0, -1, "x", 1.5],
            "rms_norm_eps": [-1, "x", float("nan"), float("inf"), 5, []],
            "hidden_act": [3, "unheard", [], {}],
            "rope_parameters": [3, "x", [], {"rope_type": "unheard"}, {"rope_theta": "x"}, {"rope_theta": -1}],
            "attention_dropout": [-1, 2, "x", float("nan")],
            "tie_word_embeddings": ["x", 3, []],
            "dtype": ["int8", "x", 3, []],
            "bos_token_id": [-7, 10**6, "x", 1.5],
            "eos_token_id": [-7, 10**6, "x", ["x"]],
            "pad_token_id": [-7, 10**6, "x"],
            "quantization_config": [3, "x", [], {}, {"quant_method": "unheard"}, {"quant_method": "gptq"}],
            "attention_bias": ["x"],
            "initializer_range": ["x"],
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration(case: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    CONFIGS[case](work)
    refused("plan", work, capfd)


GENERATION = "base/generation_config.json"

GENERATIONS: dict[str, Spoil] = {
    "no JSON": content(GENERATION, b"{"),
    "a list": content(GENERATION, b"[]"),
    "binary": content(GENERATION, bytes(range(256))),
    **{
        f"{name}={value!r}": put(GENERATION, **{name: value})
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        for value in (-7, 5000, "x", 1.5, [3, 5000])
    },
}


@pytest.mark.parametrize("case", GENERATIONS)
def test_a_configuration_of_generation(case: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    GENERATIONS[case](work)
    refused("plan", work, capfd, "generation_config.json")


INDEX = "base/model.safetensors.index.json"

WEIGHTS: dict[str, Spoil] = {
    "none": gone("base/model*"),
    "a shard missing": gone("base/model-00002*"),
    "an empty shard": lambda work: next((work / "base").glob("model-00002*")).write_bytes(b""),
    "half a shard": lambda work: os.truncate(next((work / "base").glob("model-00002*")), 3000),
    "an index of a list": content(INDEX, b"[]"),
    "an index of nothing": content(INDEX, b""),
    "an index without a map": content(INDEX, b"{}"),
    "an index without metadata": put(INDEX, metadata=...),
    "a map of a list": put(INDEX, weight_map=[]),
    "a map of nothing": put(INDEX, weight_map={}),
    "a map to numbers": put(INDEX, weight_map={"model.norm.weight": 3}),
    "a map to null": put(INDEX, weight_map={"model.norm.weight": None}),
    "a map to lists": put(INDEX, weight_map={"model.norm.weight": ["a"]}),
    "a map to a parent": put(INDEX, weight_map={"model.norm.weight": "../text.txt"}),
    "a map to a device": put(INDEX, weight_map={"model.norm.weight": "/dev/zero"}),
    "a map to nowhere": put(INDEX, weight_map={"model.norm.weight": "nowhere.safetensors"}),
    "a map to a name with a NUL": put(INDEX, weight_map={"model.norm.weight": "a\0b"}),
    "a map to the configuration": put(INDEX, weight_map={"model.norm.weight": "config.json"}),
    "an empty map name": put(INDEX, weight_map={"model.norm.weight": ""}),
    "a layer missing": put(CONFIG, num_hidden_layers=3),
    "a tensor missing": weights("base", lambda tensors: tensors.pop("model.norm.weight")),
    "a tensor of another shape": weights("base", lambda t: t.update({"model.norm.weight": torch.ones(7)})),
    "a scalar": weights("base", lambda t: t.update({"model.norm.weight": torch.tensor(1.0)})),
    "whole numbers": weights("base", lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})),
    "overlapping offsets": header("base", first_offsets(0, 192)),
    "negative offsets": header("base", first_offsets(-192, 0)),
    "offsets beyond": header("base", first_offsets(10**12, 10**12 + 192)),
    "offsets turned round": header("base", first_offsets(192, 0)),
    "three offsets": header("base", first_offsets(0, 1, 2)),
    "a header of a list": header("base", lambda _: b"[]"),
    "a header of null": header("base", lambda _: b"null"),
    "a header of no JSON": header("base", lambda _: b"{" * 9),
    "a deep header": header("base", lambda _: b"[" * 9000),
    "a header without an end": content("base/model.safetensors", (2**62).to_bytes(8, "little")),
    "a header of eight bytes less": content("base/model.safetensors", b"\1\0\0"),
    "a negative shape": header("base", lambda said: said[max(said)].update(shape=[-1, -48])),
    "a huge shape": header("base", lambda said: said[max(said)].update(shape=[2**40, 2**40])),
    "an unheard dtype": header("base", lambda said: said[max(said)].update(dtype="F7")),
    "a pickle": lambda work: ((gone("base/model*")(work), content("base/pytorch_model.bin", pickle.dumps(3))(work))),
    "a pickle under another name": content("base/model.safetensors", pickle.dumps({"a": 1})),
    "no tokenizer": gone("base/tokenizer*"),
    "a tokenizer of a list": content("base/tokenizer.json", b"[]"),
    "a tokenizer of nothing": content("base/tokenizer.json", b"{}"),
    "half a tokenizer": lambda work: os.truncate(work / "base/tokenizer.json", 300),
    "a tokenizer of code": put(
        "base/tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]}, tokenizer_class="T"
    ),
    "a tokenizer of no class": put("base/tokenizer_config.json", tokenizer_class=3),
    "a special token of a number": put("base/tokenizer_config.json", eos_token=3),
}

UNUSABLE_INDEXES = {case for case in WEIGHTS if case.startswith(("an index", "a map", "an empty map"))} - {
    "an index of nothing",
    "a map to nowhere",  # here and below the files are at fault
    "a map to the configuration",
}


@pytest.mark.parametrize(
    ("case", "command"),
    [
        (case, command)
        for command in ("tune", "merge", "convert", "evaluate")
        for case in WEIGHTS
        if command == "evaluate" or sampled(case, command)
        if command != "merge" or "token" not in case  # a merge takes the adapter's tokenizer
    ],
)
def test_weights(case: str, command: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    WEIGHTS[case](work)
    line = refused(command, work, capfd, "base")
    if case in UNUSABLE_INDEXES:
        assert "index.json is not usable: got" in line and "; expected" in line, line


# -- adapters ---------------------------------------------------------------------------------------------------------

PAT, LAST = "out/adapter/adapter_config.json", "adapter_model.safetensors"


def of_adapter(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    return weights("out/adapter", change, LAST)


def numbers(dtype: torch.dtype, leaf: str = "lora_A.weight") -> Spoil:
    return of_adapter(lambda t: t.update({name: t[name].to(dtype) for name in list(t) if name.endswith(leaf)}))


ADAPTERS: dict[str, Spoil] = {
    **{f"LoRA of {dtype}": numbers(dtype) for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)},
    "kept channels as numbers": numbers(torch.float32, ".keep"),
    "empty": content(PAT, b""),
    "a list": content(PAT, b"[]"),
    "null": content(PAT, b"null"),
    "too deep": content(PAT, b"[" * 5000),
    "binary": content(PAT, bytes(range(256))),
    "no weights": gone(f"out/adapter/{LAST}"),
    "empty weights": content(f"out/adapter/{LAST}", b""),
    "a pickle": content(f"out/adapter/{LAST}", pickle.dumps(3)),
    "no tensors": of_adapter(lambda tensors: tensors.clear()),
    "a tensor missing": of_adapter(lambda tensors: tensors.pop(max(tensors))),
    "a tensor too many": of_adapter(lambda tensors: tensors.update({"base_model.model.x": torch.ones(3)})),
    "a tensor of another shape": of_adapter(lambda tensors: tensors.update({max(tensors): torch.ones(3, 3)})),
    "tensors of NaN": of_adapter(
        lambda tensors: [tensor.fill_(torch.nan) for tensor in tensors.values() if tensor.is_floating_point()]
    ),
    "overlapping offsets": header("out/adapter", first_offsets(0, 4), LAST),
    "negative offsets": header("out/adapter", first_offsets(-4, 0), LAST),
    **{
        f"{name}={value!r}"[:50]: put(PAT, **{name: value})
        for name, values in {
            "peft_type": [..., None, 3, [], "LORA", "UNHEARD"],
            "task_type": [3, "UNHEARD", []],
            "base_model_name_or_path": [3, [], {}],
            "r": [None, 0, -1, 7, "x", 1.5, [], 10**9],
            "lora_alpha": ["x", [], None],
            "lora_dropout": ["x", -1, 5, []],
            "target_modules": [3, [3], ["unheard"], [], {}, "("],
            "rank_pattern": [3, {"q_proj": "x"}, {"q_proj": 50}, [], {"(": 4}],
            "alpha_pattern": ["x", {"q_proj": "x"}],
            "bias": ["unheard", 3],
            "axes": ["x", 3, ["unheard"], None, []],
            "pruned_hidden_size": [0, -4, 35, "x", 1000, 1.5, []],
            "pruning_ratio": [0, 2, "x", float("nan"), []],
            "operator_rank": [0, 1000, "x", []],
            "rotation": ["unheard", 3],
            "resolved_rotation": ["unheard", 3, "pca"],
            "mask": ["unheard", []],
            "milestone": ["x", -1, float("inf")],
            "base_vocab_size": ["x"],
            "base_quantization": ["x", {}, {"quant_method": "unheard"}],
            "trainable_token_indices": ["x", [10**9], [-1], {"a": "b"}],
            "modules_to_save": [3, {}],
            "layers_to_transform": ["x", [99]],
            "use_dora": ["x", True],
            "init_lora_weights": ["unheard", 3],
            "auto_mapping": [3],
            "revision": [3, []],
            "unheard": [3],
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter(case: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ADAPTERS[case](work)
    refused("merge", work, capfd)


# -- adapters of the published code -----------------------------------------------------------------------------------

PUBLISHED = "published/adapter_config.json"
FIRST = "base_model.model.model.dimdown0.dimdown_inout"
MASK = "base_model.model.model.dimdown0.dimdown_mask.mask"


def of_published(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    return weights("published", change, LAST)


def one(name: str, tensor: torch.Tensor) -> Spoil:
    return of_published(lambda tensors: tensors.update({name: tensor}))


CONVERTED: dict[str, Spoil] = {
    "empty": content(PUBLISHED, b""),
    "a list": content(PUBLISHED, b"[]"),
    "too deep": content(PUBLISHED, b"[" * 5000),
    "binary": content(PUBLISHED, bytes(range(256))),
    "no weights": gone(f"published/{LAST}"),
    "empty weights": content(f"published/{LAST}", b""),
    "negative offsets": header("published", first_offsets(-4, 0), LAST),
    "no tensors": of_published(lambda tensors: tensors.clear()),
    "no embedding": of_published(lambda tensors: [tensors.pop(f"{FIRST}.{part}.weight") for part in (0, 1)]),
    "half a place": of_published(lambda tensors: tensors.pop(f"{FIRST}.0.weight")),
    "a scalar": one(f"{FIRST}.0.weight", torch.tensor(1.0)),
    "a vector": one(f"{FIRST}.1.weight", torch.ones(48)),
    "scalars": of_published(lambda t: t.update({f"{FIRST}.{part}.weight": torch.tensor(1.0) for part in (0, 1)})),
    "nothing in it": one(f"{FIRST}.1.weight", torch.ones(0, 2)),
    "another shape": one(f"{FIRST}.1.weight", torch.ones(7, 2)),
    "NaN": one(f"{FIRST}.1.weight", torch.full((48, 2), torch.nan)),
    "whole numbers": one(f"{FIRST}.1.weight", torch.ones(48, 2, dtype=torch.int8)),
    "numbers of 8 bits": one(f"{FIRST}.1.weight", torch.ones(48, 2, dtype=torch.float8_e4m3fn)),
    "a mask of NaN": one(MASK, torch.full((1, 1, 48), torch.nan)),
    "a mask of nothing": one(MASK, torch.full((1, 1, 48), -0.5)),
    "a mask of all": one(MASK, torch.full((1, 1, 48), 0.5)),
    "a short mask": one(MASK, torch.full((1, 1, 47), 0.5)),
    "a scalar mask": one(MASK, torch.tensor(0.5)),
    "a place too many": of_published(
        lambda t: t.update(
            {key.replace("layers.1", "layers.9"): t[key].clone() for key in list(t) if "layers.1.d" in key}
        )
    ),
    "an unheard tensor": one("base_model.model.x", torch.ones(2)),
    "LoRA of nowhere": one("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(2, 48)),
    "half of LoRA": of_published(lambda t: t.pop(next(key for key in t if "lora_B" in key))),
    "LoRA of NaN": one(
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.full((2, 48), torch.nan)
    ),
    "no target modules": put(PUBLISHED, target_modules=...),
    **{
        f"{name}={value!r}"[:50]: put(PUBLISHED, **{name: value})
        for name, values in {
            "r": [0, -1, 7, "x", 1.5, [], 10**9],
            "lora_alpha": ["x", [], float("nan")],
            "target_modules": [3, [3], ["unheard"], [], {}, "("],
            "use_rslora": ["x", 3],
            "use_dora": ["x", True],
            "rank_pattern": [3, {"q_proj": "x"}, []],
            "alpha_pattern": ["x", {"q_proj": "x"}],
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("case", CONVERTED)
def test_a_published_adapter(case: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    CONVERTED[case](work)
    refused("convert", work, capfd)


def test_a_size_that_a_published_adapter_does_not_have(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused("convert", work, capfd, pruned_hidden_size=23)


# -- records of a run -------------------------------------------------------------------------------------------------

RECORDS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "a text": b'"abc"',
    "no JSON": b"{",
    "binary": bytes(range(256)),
    "too deep": b"[" * 5000,
    "digits": b"1" * 5000,
    "UTF-16": "{}".encode("utf-16"),
    "of nobody": b"{}",
    "of another command": b'{"command": "merge"}',
    "of a number": b'{"command": 3}',
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record(case: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (work / "out" / "results.json").write_bytes(RECORDS[case])
    refused("report", work, capfd, "results.json")


@pytest.mark.parametrize("case", RECORDS)
def test_a_description_of_a_run(case: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (work / "out" / "run.json").write_bytes(RECORDS[case])
    refused("tune", work, capfd, "run.json", output_dir="out")


DESCRIPTIONS = {
    "configuration": [None, 3, [], "x"],
    "base": [None, 3, [], {}],
    "data": [None, 3, {}],
    "finished": [None, 3, "x", [3], {}],
    "bf16": ["x"],
    "unheard": [1],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in DESCRIPTIONS.items() for value in values]
)
def test_a_field_of_a_description(name: str, value: Any, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    put("out/run.json", **{name: value})(work)
    refused("tune", work, capfd, "out", output_dir="out")


# -- from Python ------------------------------------------------------------------------------------------------------

KEYWORDS: list[dict[str, Any]] = [
    {name: value}
    for name, values in {
        "learning_rate": [float("nan"), "fast", [1], {}, True, -1, ...],
        "max_steps": [0, 1.5, "x", [3], True, 10**30],
        "pruning_ratio": [float("nan"), 2, "x", [0.5], {}, True],
        "output_dir": [3.5, [], {}, "", b"x"],
        "model_name_or_path": [3, [], {}, None, "", b"x", ...],
        "dataset_name": [3, [{"instruction": "a"}], {}, None, ""],
        "axes": [3, ["unheard"], {}, [3]],
        "lora_target_modules": [3, {}, [3]],
        "held_out": [-1, 1.5, [], {}, True, float("nan")],
        "seed": [-1, 1.5, "x"],
        "unheard": [1],
    }.items()
    for value in values
]


@pytest.mark.parametrize("given", KEYWORDS, ids=str)
def test_a_keyword(given: dict[str, Any], work: Path) -> None:
    before = snapshot(work)
    with pytest.raises(PatError) as caught:
        pat.tune(**(ARGUMENTS["tune"] | given))
    assert str(caught.value).isprintable() and caught.value.exit_status == 2
    assert snapshot(work) == before


def test_there_are_enough_of_them() -> None:
    tables = (PLACE_CASES, DATA, CONFIGS, WEIGHTS, ADAPTERS, CONVERTED, RECORDS, KEYWORDS)
    assert sum(map(len, tables)) >= 400
