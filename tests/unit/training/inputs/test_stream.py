"""Data that is read while training goes on: the same tokens, no more rows than are needed, and a new beginning."""

from __future__ import annotations

import gzip
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset
from tiny_models import tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from pat.data import streamed
from pat.errors import PatError, RunFailed
from pat.training.arguments import build_arguments
from pat.training.callbacks.calibration_data import calibration_batches
from pat.training.inputs import stream as streams
from pat.training.inputs.prepare import Prepared, prepare
from pat.training.inputs.stream import Stream, shuffled
from pat.training.run.run_file import RunFile
from pat.tuner.config import PatConfig

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content == 'refuse' %}{{ raise_exception('not this') }}{% endif %}{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ROWS: dict[str, list[Any]] = {
    "strings": [{"prompt": f"ask {i} ", "completion": "" if i % 7 == 3 else f"say {i}" * (i % 40)} for i in range(300)],
    "alpaca": [{"instruction": f"ask {i}", "output": f"say {i}", "more": 1} for i in range(20)],
    "text": [{"text": f"text {i} " * (i % 50)} for i in range(60)],
    "chat": [
        {
            "messages": [say("user", f"a {i}"), say("assistant", "b"), say("user", "c"), say("assistant", f"d {i}")],
            "tools": [{"name": "find", "more": {"number": i}}] if i % 2 else None,
        }
        for i in range(130)
    ],
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(base: Path, *files: Path, **flags: Any) -> Prepared:
    given = {"output_dir": str(base.parent / "out"), "use_cpu": True, "bf16": False, "max_length": 48} | flags
    if given.setdefault("streaming", True):
        given = {"max_steps": 5} | given
    names = [str(file) for file in files]
    arguments = build_arguments(model_name_or_path=str(base), dataset_name=names, report_to="none", **given)
    return prepare(arguments, AutoConfig.from_pretrained(base))


def stream_of(data: Prepared) -> Stream:
    assert data.stream is not None
    return data.stream


def texts(base: Path, rows: Any) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


@pytest.mark.parametrize("kind", ROWS)
def test_a_stream_has_the_tokens_and_the_counts_of_all_rows_read_before(kind: str, base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", ROWS[kind])
    before = prepared(base, file, streaming=False, held_out="0")
    data = prepared(base, file, held_out="0", train_sampling_strategy="sequential")
    stream = stream_of(data)
    assert list(islice(stream.examples(), len(before.train))) == before.train.to_list()
    assert list(islice(stream.dataset(), 2 * len(before.train))) == 2 * before.train.to_list()
    record, num_tokens = data.read(2 * len(before.train), 1.0)
    known = {"fingerprint", "is_streamed"}
    assert {name: value for name, value in vars(record).items() if name not in known} == {
        name: value for name, value in vars(before.record).items() if name not in known
    }
    assert num_tokens == 2 * before.num_tokens


def test_the_first_rows_are_held_out_and_the_others_come_in_a_seeded_order(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", [{"text": f"{i} b"} for i in range(50)])
    data = prepared(base, file, held_out="5")
    assert [int(text.split()[0]) for text in texts(base, data.held_out)] == list(range(5))
    assert "50 rows 45 examples" in data.record.describe() and "5 held out, the first" in data.record.describe()
    first, again, second = (texts(base, islice(stream_of(data).examples(), 90)) for _ in range(3))
    assert first == again == second
    passes = [[int(text.split()[0]) for text in part] for part in (first[:45], first[45:])]
    assert [sorted(found) for found in passes] == [list(range(5, 50))] * 2
    assert passes[0] != passes[1] and all(found != sorted(found) for found in passes)
    other = prepared(base, file, held_out="5", seed=1)
    assert texts(base, islice(stream_of(other).examples(), 90)) != first


def test_the_buffer_yields_every_example_once() -> None:
    order = [example["n"] for example in shuffled(({"n": n} for n in range(2500)), random.Random(0))]
    assert sorted(order) == list(range(2500)) and max(order[:100]) < streams.SHUFFLED_ROWS + 100


def test_no_more_rows_are_read_than_the_first_example_takes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "data.jsonl", [{"text": f"{i} b"} for i in range(20_000)])
    places: list[str] = []

    def watched(path: Path) -> Iterator[Any]:
        for placed in iterate(path):
            places.append(placed[0])
            yield placed

    iterate = streamed.iterate_local
    monkeypatch.setattr(streamed, "iterate_local", watched)
    data = prepared(base, file)
    next(stream_of(data).examples())
    assert len(set(places)) <= 200 + streams.SHUFFLED_ROWS + streams.BATCH + 1


def test_folders_are_streamed(base: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "b").mkdir()
    write(parts / "a.jsonl", [{"text": f"{i} b"} for i in range(10)])
    (parts / "b" / "train.csv").write_text("\n".join(["text", *(f"{i} b" for i in range(10, 30))]), encoding="utf-8")
    write(parts / "test.jsonl", [{"text": "99 b"}])
    Dataset.from_list([{"text": f"{i} b"} for i in range(30)]).save_to_disk(tmp_path / "saved")
    for folder in (parts, tmp_path / "saved"):
        data = prepared(base, folder, held_out="2", train_sampling_strategy="sequential")
        found = [int(text.split()[0]) for text in texts(base, islice(stream_of(data).examples(), 56))]
        assert found == 2 * list(range(2, 30))
        assert data.record.fingerprint == prepared(base, folder, held_out="2").record.fingerprint


def test_each_of_several_sources_has_its_share_at_every_moment(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = write(tmp_path / "long.jsonl", [{"instruction": f"ask {i}", "output": f"say {i}"} for i in range(200)])
    short = write(tmp_path / "short.jsonl", [{"text": f"cat {i}"} for i in range(12)])
    data = prepared(base, long, short, dataset_weights=[3, 1], held_out="8", max_length=256)
    assert [source.num_held_out for source in data.record.sources] == [6, 2]
    with caplog.at_level(logging.WARNING):
        kinds = [text.startswith("cat") for text in texts(base, islice(stream_of(data).examples(), 100))]
    assert all(abs(sum(kinds[:end]) - end / 4) <= 1 for end in range(101))
    again = [line for line in caplog.messages if "begins again" in line]
    assert again == [f"{short} is at its end after 12 rows, which gave 10 examples, and begins again."]
    record, _ = data.read(100, 1.0)
    assert [(source.share, source.times, source.num_rows) for source in record.sources][1] == (0.25, None, 12)


@pytest.mark.parametrize("wrong", [{"text": {"a": 1}}, ["text"], {"text": "a", "prompt": "b", "completion": "c"}])
def test_a_wrong_row_ends_the_run_or_is_counted(
    wrong: Any, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Any] = [{"text": f"{i} b"} for i in range(1500)]
    rows[1400] = wrong
    file = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(RunFailed, match=r"line 1401: .* with --on_bad_row skip, .* goes on"):
        list(islice(stream_of(prepared(base, file)).examples(), 1400))
    data = prepared(base, file, on_bad_row="skip")
    found = texts(base, islice(stream_of(data).examples(), 1299))
    assert Counter(int(text.split()[0]) for text in found) == Counter(set(range(200, 1500)) - {1400})
    assert data.read(1299, 1.0)[0].num_skipped == 1
    assert caplog.text.count("line 1401") == 1


def test_what_no_skipping_mends_is_not_promised_to_be_skipped(base: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{random.Random(i).random()} b"} for i in range(4000)]
    data = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    (tmp_path / "torn.jsonl.gz").write_bytes(data[: len(data) * 2 // 3])
    stream = stream_of(prepared(base, tmp_path / "torn.jsonl.gz", held_out="0"))
    with pytest.raises(RunFailed) as error:
        list(islice(stream.examples(), 4000))
    assert "torn.jsonl.gz" in str(error.value) and "on_bad_row" not in str(error.value)


def test_a_source_that_gave_nothing_has_no_counts(base: Path, tmp_path: Path) -> None:
    file, rare = (write(tmp_path / f"{name}.jsonl", ROWS["alpaca"]) for name in ("a", "b"))
    data = prepared(base, file, rare, held_out="0", dataset_weights=[1, 1e-6])
    list(islice(stream_of(data).examples(), 20))
    record, _ = data.read(20, 1.0)
    assert [(source.share, source.num_rows, source.num_examples) for source in record.sources] == [
        (1.0, 20, 20),
        (0.0, 0, 0),
    ]


def test_a_saved_dataset_is_known_wherever_it_lies_and_has_one_split(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Dataset.from_list(ROWS["alpaca"]).save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    known = {
        prepared(base, Path(name), held_out="0").record.fingerprint for name in ("saved", "./saved", tmp_path / "saved")
    }
    assert len(known) == 1
    with pytest.raises(PatError, match=r"got split 'test'; expected one of train"):
        prepared(base, tmp_path / "saved", dataset_train_split="test")
    for part in ("a", "b"):
        (tmp_path / "parts").mkdir(exist_ok=True)
        write(tmp_path / "parts" / f"{part}.jsonl", ROWS["alpaca"])
    known = {prepared(base, Path(name), held_out="0").record.fingerprint for name in ("parts", tmp_path / "parts")}
    assert len(known) == 1


def test_what_the_template_refuses_is_left_out(base: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": [say("user", "refuse" if i == 3 else "a")], "completion": [say("assistant", f"{i}")]}
        for i in range(9)
    ]
    file = write(tmp_path / "data.jsonl", rows)
    data = prepared(base, file, on_bad_row="skip", held_out="2")
    assert len({str(row) for row in islice(stream_of(data).examples(), 12)}) == 6
    assert data.read(6, 1.0)[0].num_skipped == 1


def test_the_calibration_reads_the_rows_of_all_processes_and_moves_nothing(base: Path, tmp_path: Path) -> None:
    dataset = stream_of(prepared(base, write(tmp_path / "data.jsonl", ROWS["text"]), held_out="5")).dataset()
    shard = IterableDatasetShard(dataset, batch_size=2, num_processes=2, process_index=1)

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {"input_ids": [row["input_ids"] for row in rows]}

    loaders = [DataLoader(data, batch_size=2, collate_fn=collate) for data in (dataset, shard)]
    expected = [row["input_ids"] for row in islice(dataset, 8)]
    for loader in loaders:
        batches = islice(calibration_batches(PatConfig(), loader, None), 4)
        assert [ids for batch in batches for ids in batch["input_ids"]] == expected


def test_a_run_may_go_on_past_a_bad_row_but_not_without_the_stream(base: Path, tmp_path: Path) -> None:
    def run(**flags: Any) -> RunFile:
        given = {"output_dir": "out", "use_cpu": True, "bf16": False, "dataset_name": "data.jsonl", "max_steps": 3}
        arguments = build_arguments(model_name_or_path=str(base), **(given | flags))
        return RunFile.of(arguments, AutoConfig.from_pretrained(base), "data")

    run(streaming=True).check(run(streaming=True, on_bad_row="skip"), tmp_path)
    with pytest.raises(PatError, match="streaming: True in the run, False given"):
        run(streaming=True).check(run(), tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_steps": -1}, "streaming without max_steps"),
        ({"packing": True}, "packing=True with streaming"),
        ({"vocabulary_size": 64}, "vocabulary_size=64 with streaming"),
        ({"distill": True, "distill_top_k": 4}, "distill_top_k=4 with streaming"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers=1 with streaming"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy=.*group_by_length.* with streaming"),
        ({"held_out": "0.1"}, "held_out=0.1 with streaming"),
        ({"dataset_train_split": "train[:5]"}, r"dataset_train_split=train\[:5\] with streaming"),
        ({"dataset_train_split": "test"}, "a file is one split"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config with streaming"),
        ({"held_out": "60"}, "has 58 usable rows, and the first 60 are to be held out"),
        ({"held_out": "-1"}, "held_out=-1"),
        ({"names": ["task:piqa"]}, "dataset_name=task:piqa with streaming"),
        ({"names": ["data.jsonl", "more.jsonl"]}, "several datasets without dataset_weights"),
        ({"names": ["none.jsonl"]}, "none.jsonl: no such file"),
    ],
)
def test_what_cannot_be_streamed_is_refused(flags: dict[str, Any], words: str, base: Path, tmp_path: Path) -> None:
    for name in ("data.jsonl", "more.jsonl"):
        write(tmp_path / name, ROWS["text"])
    given = {"held_out": "5", **flags}
    names = [Path(name) if ":" in name else tmp_path / name for name in given.pop("names", ["data.jsonl"])]
    with pytest.raises(PatError, match=words):
        prepared(base, *names, **given)
    assert not (tmp_path / "out").exists()
