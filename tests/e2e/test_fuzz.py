"""Whatever may stand in a file or on a command line: it is read, or refused in one line, and nothing else."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from fuzzing import TEXTS, VALUES, as_json, attempt, changed, fuzz, safetensors_bytes, spoiled, write
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import build, tiny_tokenizer
from tiny_runs import tune_flags

import pat
from pat import cli
from pat.checkpoint.adapter import base_config_for, base_of, load_adapted, load_hollow, read_adapter_config
from pat.checkpoint.adapter_tokens import adapter_tokens
from pat.config_file import read_config
from pat.data.load import load_training_data
from pat.formats.published import read_published
from pat.loading import base_fingerprint, load_base, load_config, load_tokenizer
from pat.options import OptionsParser
from pat.readers import READERS
from pat.training.outcome.options import ReportOptions
from pat.training.outcome.report import run_report
from pat.training.outcome.results import TuneRecord
from pat.training.run.run_file import RunFile
from pat.tuner import PatConfig
from pat.tuner.options import PatOptions


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a finished run."""
    folder = tmp_path_factory.mktemp("fuzz")
    build("llama", tied=True, num_hidden_layers=1).save_pretrained(folder / "base", max_shard_size="60KB")
    tiny_tokenizer(folder / "base")
    rows = [{"instruction": f"Say {number}", "output": f"It is {number}."} for number in range(24)]
    write(folder / "data.jsonl", b"\n".join(map(as_json, rows)))
    pat.tune(**tune_flags(folder / "base", folder / "data.jsonl", folder / "out", rotation="none", milestone=0.5))
    return folder


# -- options ----------------------------------------------------------------------------------------------------------

PARSERS = {name: OptionsParser(f"pat {name}", cli._load(command.options)) for name, command in cli.COMMANDS.items()}

WORDS = TEXTS | st.integers().map(str) | st.floats().map(str)


def required(command: str) -> dict[str, str]:
    from dataclasses import MISSING

    options = PARSERS[command].options.items()
    # Where a model is looked for at once there is a folder, or no other value would be read.
    return {name: "." if option.names else "./nowhere" for name, option in options if option.default is MISSING}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(sorted(PARSERS)))
    given = required(command)
    for _ in range(draw(st.integers(1, 4))):
        given[draw(st.sampled_from(sorted(PARSERS[command].options)))] = draw(WORDS)
    return [command, *(f"--{name}={value}" for name, value in given.items())]


@st.composite
def keywords(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    command = draw(st.sampled_from(sorted(PARSERS)))
    given: dict[str, Any] = dict(required(command))
    for _ in range(draw(st.integers(1, 4))):
        given[draw(st.sampled_from(sorted(PARSERS[command].options)))] = draw(VALUES | st.just(Path("x")))
    return command, given


def parser_of(command: str) -> OptionsParser[Any]:
    return OptionsParser(f"pat {command}", cli._load(cli.COMMANDS[command].options))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_command_lines() -> None:
    fuzz(command_lines(), lambda argv: attempt(lambda: parser_of(argv[0]).parse(argv[1:]), argv), 100)
    assert list(Path().iterdir()) == []


def test_keywords() -> None:
    fuzz(keywords(), lambda given: attempt(lambda: parser_of(given[0]).build(given[1]), given), 100)
    assert list(Path().iterdir()) == []


def test_configurations_of_an_adapter() -> None:
    names = sorted(field.name for field in fields(PatOptions))
    given = st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3)
    fuzz(given, lambda values: attempt(lambda: PatConfig(task_type="CAUSAL_LM", **values), values), 100)


@st.composite
def yaml_files(draw: st.DrawFn) -> bytes:
    names = st.sampled_from(sorted(PARSERS["tune"].options)) | TEXTS
    values = draw(st.dictionaries(names, VALUES, max_size=5))
    try:
        text = yaml.dump(values, default_flow_style=draw(st.booleans()), allow_unicode=draw(st.booleans()))
        content = text.encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        content = as_json(values)
    return spoiled(content, random.Random(draw(st.integers()))) if draw(st.booleans()) else content


def test_files_of_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"

    def check(content: bytes) -> None:
        write(path, content)
        given = {"model_name_or_path": ".", "dataset_name": ".", "output_dir": "out"}
        flags = [f"--{name}={value}" for name, value in given.items()]
        attempt(lambda: read_config(path), content)
        attempt(lambda: parser_of("tune").parse([*flags, f"--config={path}"]), content)

    fuzz(yaml_files(), check, 60)


# -- data -------------------------------------------------------------------------------------------------------------

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool", "", "User"]) | VALUES,
            "content": TEXTS | VALUES,
            "from": st.sampled_from(["human", "gpt"]) | VALUES,
            "value": TEXTS | VALUES,
            "tool_calls": VALUES,
        },
    ),
    max_size=4,
)

ROWS = st.one_of(
    *(
        st.fixed_dictionaries(required_fields, optional=optional)
        for required_fields, optional in (
            ({"instruction": TEXTS | VALUES, "output": TEXTS | VALUES}, {"input": VALUES, "system": VALUES}),
            ({"prompt": TEXTS | VALUES | MESSAGES, "completion": TEXTS | VALUES | MESSAGES}, {"tools": VALUES}),
            ({"messages": MESSAGES | VALUES}, {"tools": VALUES, "chat_template_kwargs": VALUES}),
            ({"conversations": MESSAGES | VALUES}, {"system": VALUES}),
            ({"text": TEXTS | VALUES}, {"extra": VALUES}),
        )
    ),
    st.dictionaries(TEXTS, VALUES, max_size=4),
    VALUES,
)

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def as_csv(rows: list[Any], delimiter: str) -> bytes:
    table = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(str(name) for row in table for name in row))
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    try:
        writer.writerow(names)
        writer.writerows([[str(row.get(name)) for name in names] for row in table])
    except (csv.Error, ValueError):
        return b"a,b\n1\n"
    return out.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list[Any]) -> bytes:
    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)]), out)
    except Exception:  # what Arrow has no type for
        return as_json(rows)
    return out.getvalue()


@st.composite
def data_files(draw: st.DrawFn) -> tuple[str, bytes]:
    kind = draw(st.sampled_from([".json", ".jsonl", ".jsonl", ".csv", ".tsv", ".parquet"]))
    if draw(st.booleans()):  # rows of one kind, most of them well formed
        row = draw(ROWS)
        rows = [row, *(draw(changed(row)) for _ in range(draw(st.integers(0, 3))))]
    else:
        rows = draw(st.lists(ROWS, max_size=4))
    if kind == ".parquet":
        content = as_parquet(rows)
    elif kind in (".csv", ".tsv"):
        content = as_csv(rows, "\t" if kind == ".tsv" else ",")
    elif kind == ".jsonl":
        content = b"\n".join(map(as_json, rows))
    else:
        content = as_json(rows if draw(st.booleans()) else {draw(TEXTS): rows})
    chance = random.Random(draw(st.integers()))
    content = spoiled(content, chance) if draw(st.integers(0, 3)) == 0 else content
    pack = draw(st.sampled_from(["", "", "", *PACKERS]))
    content = PACKERS[pack](content)
    return kind + pack, spoiled(content, chance) if pack and draw(st.booleans()) else content


CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def test_data(tmp_path: Path) -> None:
    assert {".json", ".jsonl", ".csv", ".tsv", ".parquet"} <= set(READERS)
    plain, chatty = tiny_tokenizer(), tiny_tokenizer()
    chatty.chat_template = CHAT

    def check(file: tuple[str, bytes]) -> None:
        path = write(tmp_path / f"data{file[0]}", file[1])
        for tokenizer in (plain, chatty):
            attempt(lambda: load_training_data(str(path), tokenizer=tokenizer, held_out=None, seed=0), file)  # noqa: B023

    fuzz(data_files(), check, 60)


# -- models -----------------------------------------------------------------------------------------------------------


def remade(origin: Path, tmp_path: Path, name: str, file: str) -> tuple[Path, Any]:
    folder = tmp_path / name
    shutil.copytree(origin / name, folder)
    return folder, json.loads((folder / file).read_text())


def some_bytes(value: Any, seed: int) -> bytes:
    content = as_json(value)
    return spoiled(content, random.Random(seed)) if seed % 8 == 0 else content


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_bases(file: str, origin: Path, tmp_path: Path) -> None:
    base, valid = remade(origin, tmp_path, "base", file)
    if file == "config.json":
        valid |= {"quantization_config": None, "auto_map": {}, "rope_scaling": None, "layer_types": None}

    def check(drawn: tuple[Any, int]) -> None:
        content = some_bytes(*drawn)
        write(base / file, content)
        attempt(lambda: load_config(str(base)), content)
        attempt(lambda: load_base(str(base)), content)

    fuzz(st.tuples(changed(valid), st.integers(0, 10**6)), check, 40)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_tokenizers(file: str, origin: Path, tmp_path: Path) -> None:
    base, valid = remade(origin, tmp_path, "base", file)
    config, _ = load_config(str(base))

    def check(drawn: tuple[Any, int]) -> None:
        content = some_bytes(*drawn)
        write(base / file, content)
        if file == "generation_config.json":
            attempt(lambda: load_base(str(base)), content)
            return
        attempt(lambda: load_tokenizer(str(base), config=config).encode("a b"), content)

    fuzz(st.tuples(changed(valid), st.integers(0, 10**6)), check, 40)


HEADERS = {
    "__metadata__": {"format": "pt"},
    "model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "model.embed_tokens.weight": {"dtype": "BF16", "shape": [2, 8], "data_offsets": [16, 48]},
    "other": {"dtype": "I8", "shape": [], "data_offsets": [48, 49]},
}


def test_headers_of_weights(origin: Path, tmp_path: Path) -> None:
    base, _ = remade(origin, tmp_path, "base", "config.json")
    for file in base.glob("model*"):
        file.unlink()
    config, _ = load_config(str(base))

    def check(drawn: tuple[Any, int]) -> None:
        seed = drawn[1]
        size = {1: 0, 2: 2**63, 3: 2**64 - 1, 4: 8}.get(seed % 20)
        content = safetensors_bytes(drawn[0], b"\0" * (seed % 80), size)
        content = spoiled(content, random.Random(seed)) if seed % 8 == 0 else content
        write(base / "model.safetensors", content)
        attempt(lambda: base_fingerprint(config, str(base)), content)
        attempt(lambda: load_base(str(base)), content)

    fuzz(st.tuples(changed(HEADERS), st.integers(0, 10**6)), check, 60)


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_configurations_of_adapters(origin: Path, tmp_path: Path) -> None:
    adapter, valid = remade(origin, tmp_path, "out/adapter", "adapter_config.json")
    valid["base_model_name_or_path"] = str(origin / "base")

    def check(drawn: tuple[Any, int]) -> None:
        content = some_bytes(*drawn)
        write(adapter / "adapter_config.json", content)

        def use() -> None:
            config = read_adapter_config(adapter)
            name, revision = base_of(adapter, config, None)
            base_config, _ = base_config_for(adapter, config, name, revision=revision)
            adapter_tokens(adapter, name, base_config, revision=revision)
            if load_hollow(adapter, name, config, revision=revision) is None:
                load_adapted(adapter)

        attempt(use, content)

    fuzz(st.tuples(changed(valid), st.integers(0, 10**6)), check, 40)


KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn]


def test_published_adapters(tmp_path: Path) -> None:
    adapter = tmp_path / "published"
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "b",
    }
    names = ["model.dimdown0", "model.layers.0.dimdown0", "model.layers.0.dimdown1", "model.layers.x.dimdown7"]
    parts = {"dimdown_inout.0.weight": (2, 4), "dimdown_inout.1.weight": (4, 2), "dimdown_scale.weight": (1, 4)}
    parts |= {"dimdown_mask.mask": (1, 1, 4), "other": (3,), "lora_A.weight": (2, 4)}
    odd = st.sampled_from([(), (0,), (4,), (1, 4), (4, 4), (2, 2, 2), (0, 4)])

    @st.composite
    def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
        found = {}
        for name in names[:3] if draw(st.booleans()) else draw(st.lists(st.sampled_from(names), unique=True)):
            for part, shape in parts.items():
                if part == "other" and draw(st.integers(0, 9)):
                    continue
                shape = draw(odd) if draw(st.integers(0, 9)) == 0 else shape
                kind = draw(st.sampled_from(KINDS)) if draw(st.integers(0, 9)) == 0 else torch.float32
                fill = draw(st.sampled_from([0.5, 0.5, 0.5, -0.5, 0.0, float("nan"), float("inf")]))
                found[f"base_model.model.{name}.{part}"] = torch.full(shape, fill if kind.is_floating_point else 1).to(
                    kind
                )
        return found

    def check(drawn: tuple[dict[str, torch.Tensor], Any, int | None]) -> None:
        shutil.rmtree(adapter, ignore_errors=True)
        write(adapter / "adapter_config.json", as_json(drawn[1]))
        save_file(drawn[0], adapter / "adapter_model.safetensors")

        def use() -> None:
            published = read_published(adapter)
            keep = published.keep(drawn[2])
            for place in published.places.values():
                place.matrix(keep)

        attempt(use, drawn)

    fuzz(st.tuples(tensors(), changed(config), st.none() | st.integers(-1, 6)), check, 60)


# -- records of a run -------------------------------------------------------------------------------------------------


def test_records(origin: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    valid, described = (json.loads((origin / "out" / file).read_text()) for file in ("results.json", "run.json"))

    def check(drawn: tuple[Any, Any]) -> None:
        write(run / "results.json", as_json(drawn[0]))
        write(run / "run.json", as_json(drawn[1]))

        def report() -> None:
            run_report(ReportOptions(run=run))
            page = (run / "report.html").read_text(encoding="utf-8")
            assert "<script>alert" not in page

        def read() -> None:
            found, given = RunFile.read(run), RunFile(**described)
            if found is not None:
                found.check(given, run)

        attempt(report, drawn)
        attempt(read, drawn)
        attempt(lambda: TuneRecord.read(run / "results.json"), drawn)

    fuzz(st.tuples(changed(valid), changed(described)), check, 40)
