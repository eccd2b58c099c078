"""Data files, folders and hub datasets: what rows become, and what is refused in one line."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pytest
from datasets import Dataset, DatasetDict, DatasetInfo
from transformers import AutoTokenizer

from pat.data import sources
from pat.data.alpaca_chat import alpaca_chat
from pat.data.conversion import Reading
from pat.data.files import split_of
from pat.data.formats import detect_format, listed
from pat.data.load import load_training_data
from pat.data.streamed import open_source
from pat.errors import PatError

STORIES = Path(__file__).resolve().parents[2] / "data" / "stories260K"
CHAT: Any = SimpleNamespace(chat_template="{{ messages }}")  # a tokenizer is asked for nothing else
TOOLS: Any = SimpleNamespace(chat_template="{{ messages }} tool_calls tools developer thinking")
NO_CHAT: Any = SimpleNamespace(chat_template=None)
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def alpaca_rows(count: int) -> Rows:
    return [{"instruction": f"ask {i}", "input": "", "output": f"answer {i}"} for i in range(count)]


def converted(tmp_path: Path, rows: Rows, tokenizer: Any = CHAT, **options: Any) -> Rows:
    data = load_training_data(write(tmp_path / "data.jsonl", rows), tokenizer=tokenizer, held_out=0, **options)
    return data.train.to_list()


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"prompt": list(messages[:-1]), "completion": [messages[-1]], **more}


SYSTEM = {"role": "system", "content": "s"}
TOOL = {"role": "tool", "content": "1"}
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 0.1234567890123}}}]
SPELLED = json.dumps(CALL[0]["function"])

CONVERSATIONS: dict[str, tuple[dict[str, Any], Rows]] = {
    "one example for each answer": (
        {"messages": [SYSTEM, user("a"), answer("b"), user("c"), answer("d"), user("e")]},
        [chat(SYSTEM, user("a"), answer("b")), chat(SYSTEM, user("a"), answer("b"), user("c"), answer("d"))],
    ),
    "a greeting is context": (
        {"messages": [answer("hi"), user("a"), answer("b")]},
        [chat(answer("hi"), user("a"), answer("b"))],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "Human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [chat(user("a"), answer("b"))],
    ),
    "roles of tools": (
        {
            "conversation": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": SPELLED},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "b"},
            ]
        },
        [
            chat(user("a"), answer("", tool_calls=CALL)),
            chat(user("a"), answer("", tool_calls=CALL), TOOL, answer("b")),
        ],
    ),
    "null beside a call": (
        {"messages": [user("a"), answer(None, tool_calls=CALL, refusal=None)], "tools": [{"name": "f", "more": {}}]},
        [chat(user("a"), answer("", tool_calls=CALL), tools=[{"name": "f", "more": {}}])],
    ),
    "OpenAI's older call": (
        {"messages": [user("a"), answer(None, function_call=CALL[0]["function"])]},
        [chat(user("a"), answer("", tool_calls=CALL))],
    ),
    "content parts": (
        {"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), answer("c")]},
        [chat(user("ab"), answer("c"))],
    ),
    "reasoning as the template calls it": (
        {"messages": [user("a"), answer("b", reasoning_content="hm")]},
        [chat(user("a"), answer("b", thinking="hm"))],
    ),
    "a role that the template knows": (
        {"messages": [{"role": "developer", "content": "s"}, user("a"), answer("b")]},
        [chat({"role": "developer", "content": "s"}, user("a"), answer("b"))],
    ),
    "answers not to be learned": (
        {"messages": [user("a"), answer("bad", weight=0), user("c", train=True), answer("d", weight=1)]},
        [chat(user("a"), answer("bad"), user("c"), answer("d"))],
    ),
    "columns beside": (
        {
            "instruction": "q",
            "output": 4,
            "system": "s",
            "history": [["q0", "a0"]],
            "tools": '[{"name": "f"}]',
            "chat_template_kwargs": {"thinking": True},
        },
        [
            chat(
                SYSTEM,
                user("q0"),
                answer("a0"),
                user("q"),
                answer("4"),
                tools=[{"name": "f"}],
                chat_template_kwargs={"thinking": True},
            )
        ],
    ),
    "prompt and completion of messages": (
        {"prompt": [user("a")], "completion": [answer("b"), TOOL, answer("c")]},
        [{"prompt": [user("a")], "completion": [answer("b"), TOOL, answer("c")]}],
    ),
    "flags of other tools": (
        {
            "messages": [
                user("a"),
                answer("b", train_on_turn=False),
                answer("c", trainable=False),
                user("d"),
                answer("e"),
            ]
        },
        [chat(user("a"), answer("b"), answer("c"), user("d"), answer("e"))],
    ),
    "nulls beside the names that are used": (
        {
            "conversations": [
                {"role": None, "content": None, "from": "human", "value": "a"},
                {"role": "assistant", "content": "b", "from": None, "value": None},
            ]
        },
        [chat(user("a"), answer("b"))],
    ),
    "messages as JSON text": (
        {"messages": json.dumps([user("a"), answer("b")])},
        [chat(user("a"), answer("b"))],
    ),
    "prompt and completion as JSON text": (
        {"prompt": json.dumps([user("a")]), "completion": " " + json.dumps([answer("b")])},
        [chat(user("a"), answer("b"))],
    ),
    "NaN is null": (
        {
            "messages": [user("a", train=float("nan")), answer(float("nan"), tool_calls=CALL, weight=float("nan"))],
            "system": float("nan"),
            "tools": float("nan"),
        },
        [chat(user("a"), answer("", tool_calls=CALL), tools=None)],
    ),
    "an input without an instruction": (
        {"instruction": " ", "input": "i", "output": "a"},
        [chat(user("i"), answer("a"))],
    ),
    "instruction with context": (
        {"Question": "q", "context": "c", "answer": "a"},
        [chat(user("q\n\nc"), answer("a"))],
    ),
}


@pytest.mark.parametrize(("row", "examples"), CONVERSATIONS.values(), ids=list(CONVERSATIONS))
def test_all_that_a_row_says_reaches_the_chat_template(tmp_path: Path, row: Any, examples: Rows) -> None:
    assert converted(tmp_path, [row], TOOLS) == examples


def test_what_a_template_does_not_know_goes_by_the_name_that_all_know(tmp_path: Path) -> None:
    calls = [{"from": "human", "value": "a"}, {"from": "function_call", "value": SPELLED}]
    developer = [{"role": "developer", "content": "s"}, user("a"), answer("b")]
    rows = [{"messages": calls}, {"messages": developer}]
    assert converted(tmp_path, rows) == [chat(user("a"), answer(SPELLED)), chat(SYSTEM, user("a"), answer("b"))]


def test_without_a_chat_template_instructions_are_worded_as_alpaca_does(tmp_path: Path) -> None:
    rows = [{"instruction": "Add {one}", "input": "2, é", "output": "3"}, {"query": "Hi,\nyou", "response": "\nhi"}]
    opening = "Below is an instruction that describes a task"
    closing = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    with_input = f"{opening}, paired with an input that provides further context. {closing}"
    assert converted(tmp_path, rows[:1], NO_CHAT) == [
        {"prompt": f"{with_input}Add {{one}}\n\n### Input:\n2, é\n\n### Response:\n", "completion": "3"}
    ]
    without = {"prompt": f"{opening}. {closing}Hi,\nyou\n\n### Response:\n", "completion": "\nhi"}
    assert converted(tmp_path, rows[1:], template="alpaca") == [without]
    conversation = [{"messages": [user("Hi,\nyou"), answer("\nhi")]}]
    assert converted(tmp_path, conversation, NO_CHAT) == [without]


def test_a_chat_template_of_alpacas_words_changes_no_instructions(tmp_path: Path) -> None:
    made = SimpleNamespace(chat_template=alpaca_chat(AutoTokenizer.from_pretrained(STORIES)))
    rows = [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Hi", "output": "hi"}]
    assert converted(tmp_path, rows, made) == converted(tmp_path, rows, NO_CHAT)
    asked = converted(tmp_path, rows[:1], made, template="chat")
    assert asked == [chat(user("Add\n\n1 2"), answer("3"))]
    turns = [user("a"), answer("b"), user("c"), answer("d")]
    assert converted(tmp_path, [{"messages": turns}], made) == [chat(*turns[:2]), chat(*turns)]
    refused(write(tmp_path / "of.jsonl", [rows[1] | {"system": "s"}]), "'system' has no place", tokenizer=made)


def test_strings_stay_as_they_are_unless_a_template_is_asked_for(tmp_path: Path) -> None:
    row = {"prompt": "Q: 1+1\nA:", "completion": " 2", "id": 7}
    kept = {"prompt": "Q: 1+1\nA:", "completion": " 2"}
    assert converted(tmp_path, [row]) == [kept]
    assert converted(tmp_path, [row], template="chat") == [chat(user("Q: 1+1\nA:"), answer(" 2"))]
    texts = [{"text": "Once upon"}, {"text": " "}, {"text": "a time"}]
    assert converted(tmp_path, texts) == [{"text": "Once upon"}, {"text": "a time"}]
    assert converted(tmp_path, [row], text_field="prompt") == [{"text": "Q: 1+1\nA:"}]


def test_rows_without_a_response_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*alpaca_rows(2), {"instruction": "x", "output": " \n"}, {"instruction": "y", "output": None, "id": 1}]
    data = load_training_data(write(tmp_path / "data.jsonl", rows), held_out=0)
    assert (data.num_rows, data.num_dropped, len(data.train), data.source.unread) == (4, 2, 2, ("id",))
    with pytest.raises(PatError, match="all 2 responses are empty"):
        load_training_data(write(tmp_path / "empty.jsonl", rows[2:]))


@pytest.mark.parametrize(
    ("columns", "title"),
    [
        (("instruction", "input", "output"), "instruction/output"),
        (("id", "Question", "answer"), "Question/answer"),
        (("prompt", "completion"), "prompt/completion"),
        (("conversations",), "conversations"),
        (("text",), "text"),
    ],
)
def test_a_format_is_called_by_its_columns(columns: tuple[str, ...], title: str) -> None:
    assert detect_format(columns, "data.jsonl").title == title


def test_a_column_without_a_name_is_never_read(tmp_path: Path) -> None:
    """Pandas writes such a file, of a table with its index."""
    (tmp_path / "d.csv").write_text(",instruction,output\n7,ask,answer\n8,ask,answer\n", encoding="utf-8")
    data = load_training_data(tmp_path / "d.csv", tokenizer=CHAT, held_out=0)
    assert data.train[0] == chat(user("ask"), answer("answer"))
    assert data.source.unread == ("",) and listed(data.source.unread) == "'' (unnamed)"
    refused(tmp_path / "d.csv", "got dataset_text_field=''", "'' (unnamed), instruction, output", text_field="")


# -- containers ------------------------------------------------------------------------------------------------------

JSONL = "".join(json.dumps(row) + "\n" for row in alpaca_rows(3)).encode()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def delimited(rows: Rows, by: str) -> bytes:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(by.join(f'"{cell}"' for cell in line) for line in lines).encode()


def parquet(rows: Rows) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


FILES: dict[str, bytes | Callable[[Path], None]] = {
    "d.jsonl": b"\xef\xbb\xbf\n" + JSONL.replace(b"\n", b"\r\n"),
    "d.ndjson": JSONL,
    "lines.json": JSONL,
    "list.json": json.dumps(alpaca_rows(3), indent=1).encode(),
    "list.jsonl": b"\xef\xbb\xbf\n" + json.dumps(alpaca_rows(3), indent=1).encode(),
    "line.ndjson": json.dumps(alpaca_rows(3)).encode(),
    "held.json": b'{"version": "1",\n"data": ' + json.dumps(alpaca_rows(3)).encode() + b"}",
    "d.csv": delimited(alpaca_rows(3), ","),
    "blank.csv": b"\xef\xbb\xbf\n \n" + delimited(alpaca_rows(3), ","),
    "d.tsv": delimited(alpaca_rows(3), "\t"),
    "d.parquet": parquet(alpaca_rows(3)),
    "d.jsonl.gz": gzip.compress(JSONL, mtime=0),
    "d.csv.bz2": bz2.compress(delimited(alpaca_rows(3), ",")),
    "d.json.xz": lzma.compress(json.dumps(alpaca_rows(3)).encode()),
    "d.tsv.zst": zstd(delimited(alpaca_rows(3), "\t")),
    "saved": lambda path: Dataset.from_list(alpaca_rows(3)).save_to_disk(str(path)),
    "parts": lambda path: DatasetDict(
        train=Dataset.from_list(alpaca_rows(3)), test=Dataset.from_list(alpaca_rows(9))
    ).save_to_disk(str(path)),
    "folder": lambda path: (path.mkdir(), (path / "README.md").touch(), write(path / "d.jsonl", alpaca_rows(3))),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("name", list(FILES))
def test_every_container_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path, content = tmp_path / name, FILES[name]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    data = load_training_data(path, held_out=0, template="alpaca", split="train[:2]")
    assert data.train["completion"][:] == ["answer 0", "answer 1"] and data.num_rows == 2
    if isinstance(content, bytes):
        assert data.source.fingerprint == "sha256:" + hashlib.sha256(content).hexdigest()


def folder_of(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def one(instruction: str) -> str:
    return json.dumps({"instruction": instruction, "output": instruction}) + "\n"


def test_the_files_of_a_folder_are_read_as_each_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        "b.csv": "instruction,output\n007,NA\n",
        "a.jsonl": one("a") + json.dumps({"instruction": "-", "output": None}),
        "train/c.json": f"[{one('c')}]",
        "train.tsv": "instruction\toutput\n1.50\t1e5\n",
        "more/test_1.csv": "instruction,output\nheld,back\n",
        "Eval/d.jsonl": one("held back"),
        "notes.txt": "no data",
        "config.json": "{}",
        ".hidden.jsonl": one("hidden"),
        ".git/e.jsonl": one("hidden"),
    }
    folder = folder_of(tmp_path / "data", files)
    (folder / "more" / "back").symlink_to(folder)
    data = load_training_data(folder, tokenizer=CHAT, held_out=0)
    pairs = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in data.train.to_list()]
    assert pairs == [("a", "a"), ("007", "NA"), ("c", "c"), ("1.50", "1e5")]
    assert (data.num_rows, data.num_dropped) == (5, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "data: 5 files are not read: .hidden.jsonl, Eval/d.jsonl (split 'test'), config.json, "
        "more/test_1.csv (split 'test'), notes.txt."
    ]
    known = load_training_data(folder.rename(tmp_path / "moved"), tokenizer=CHAT, held_out=0).source.fingerprint
    assert known == data.source.fingerprint
    (tmp_path / "moved" / "b.csv").write_text("instruction,output\n7,NA\n", encoding="utf-8")
    assert load_training_data(tmp_path / "moved", tokenizer=CHAT, held_out=0).source.fingerprint != known


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", "abc"), ("train[1:]", "bc"), ("test", "x"), ("train[:1]+test", "ax"), ("train[:1]+train[2:]", "ac")],
)
def test_a_folder_has_the_splits_that_its_files_name(tmp_path: Path, split: str, expected: str) -> None:
    files = {"train.jsonl": one("b") + one("c"), "extra.jsonl": one("a"), "test.jsonl": one("x"), "dev/t.jsonl": "{"}
    folder = folder_of(tmp_path / "data", files)
    data = load_training_data(folder, held_out=0, split=split)
    assert "".join(data.train["completion"][:]) == expected
    refused(folder, "split 'other'", "'validation', 'train', 'test'", split="other")


def test_a_table_of_a_folder_is_made_anew_when_one_of_its_files_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SMALL_BYTES", 1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = folder_of(tmp_path / "data", {"a.jsonl": one("a"), "b.jsonl": one("b")})
    first, again = (load_training_data(folder, held_out=0).source for _ in range(2))
    assert first.key is not None and again.key == first.key
    folder_of(folder, {"b.jsonl": one("b") + one("c")})
    assert load_training_data(folder, held_out=0).train["completion"][:] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train_sft-00000-of-00002-1a2b.parquet", "train_sft"),
        ("latest.jsonl", "train"),
        ("train/test.jsonl", "train"),
        ("dev-2/a.csv", "validation"),
        ("my_Test2.json", "test"),
    ],
)
def test_a_path_names_its_split(path: str, split: str) -> None:
    assert split_of(Path(path)) == split


def test_what_a_sole_file_is_called_does_not_matter(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", {"sub/test.jsonl": one("a")})
    assert load_training_data(folder, held_out=0).num_rows == 1


def test_a_folder_that_says_how_it_is_read_is_left_to_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files: b.jsonl\n---\n"
    folder = folder_of(tmp_path / "data", {"README.md": card, "a.jsonl": one("a"), "b.jsonl": one("b")})
    monkeypatch.setattr(sources, "load_dataset", lambda path, **_: Dataset.from_list([{"text": path}]))
    assert load_training_data(folder, held_out=0).train.to_list() == [{"text": str(folder)}]
    folder_of(folder, {"README.md": "---\nlicense: mit\n---\n"})
    assert load_training_data(folder, held_out=0).train["completion"][:] == ["a", "b"]
    folder_of(folder, {"README.md": "---\na: [\n---\n"})
    assert load_training_data(folder, held_out=0).num_rows == 2 and "is no dataset card" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_cells_of_csv_files_stay_as_they_are_where_datasets_reads_them(tmp_path: Path, streaming: bool) -> None:
    """A sole file, too, which the folder says is of a split and has a separator of its own."""
    parts = "    sep: ;\n  data_files:\n  - split: test\n    path: a.csv\n"
    card = f"---\nconfigs:\n- config_name: odd\n{parts.replace('    sep', '  sep')}---\n"
    cells = {"q": "007", "b": "3", "c": "1.50", "d": "NA", "e": "True", "f": ""}
    rows = "".join(f"{key};{value}\n" for key, value in cells.items())
    folder = folder_of(tmp_path / "data", {"README.md": card, "a.csv": f"instruction;output\n{rows}"})
    reading = Reading()
    options: dict[str, Any] = {"split": "test", "config_name": "odd"}
    if streaming:
        placed = list(open_source(str(folder), reading, 0, **options)[0].placed())
        assert [row for _, row in placed] == [{"instruction": key, "output": cells[key]} for key in cells]
    else:
        data = load_training_data(folder, held_out=0, **options)
        assert data.train["completion"][:] == ["007", "3", "1.50", "NA", "True"] and data.num_dropped == 1
    labels = "      class_label:\n        names:\n          '0': neg\n          '1': pos\n"
    features = "  features:\n  - name: instruction\n    dtype: string\n  - name: output\n    dtype:\n" + labels
    card = f"---\ndataset_info:\n{features}configs:\n- config_name: default\n  data_files: a.csv\n---\n"
    folder_of(folder, {"README.md": card, "a.csv": "instruction,output\na,1\nb,0\n"})
    assert load_training_data(folder, held_out=0).train["completion"][:] == ["pos", "neg"]
    card = "---\nconfigs:\n---\n"  # says nothing
    folder_of(folder, {"README.md": card, "a.csv": "instruction,output\na,007\n"})
    assert load_training_data(folder, held_out=0).train["completion"][:] == ["007"]


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize("fault", ["missing", "torn", "other"])
def test_a_saved_dataset_that_is_not_whole_is_named(tmp_path: Path, file: str, fault: str) -> None:
    folder = tmp_path / "saved"
    Dataset.from_list(alpaca_rows(300)).save_to_disk(str(folder))
    if fault == "missing":
        (folder / file).unlink()
    else:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: len(data) // 2] if fault == "torn" else b"[]")
    if (file, fault) == ("state.json", "missing"):
        refused(folder, str(folder))  # is a folder of other files then
        return
    for read in (load_training_data, lambda path: open_source(str(path), Reading(), 0)):
        with pytest.raises(PatError, match=r"is no whole dataset of `save_to_disk`|could not be read"):
            read(folder)


def test_preferences_are_named(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    refused(write(tmp_path / "data.jsonl", rows), "which tell preferences", "rename 'chosen' to 'completion'")


def test_files_of_other_forms_are_named_by_what_is_missing(tmp_path: Path) -> None:
    files = {"a.jsonl": one("a"), "b.jsonl": json.dumps({"messages": [user("a"), answer("b")]})}
    place = "a.jsonl, line 1: field 'messages' is missing (found instruction, output); expected a list of messages"
    refused(folder_of(tmp_path / "data", files), place, tokenizer=CHAT)


def test_rows_of_tables_have_no_fields_of_others(tmp_path: Path) -> None:
    """In Arrow every message has the fields of all; those that are null belong to other rows."""
    rows = [{"messages": [user("a"), answer("b", tool_calls=CALL)]}, {"messages": [user("c"), answer("d")]}]
    (tmp_path / "d.parquet").write_bytes(parquet(rows))
    data = load_training_data(tmp_path / "d.parquet", tokenizer=TOOLS, held_out=0)
    assert data.train.to_list() == [chat(user("a"), answer("b", tool_calls=CALL)), chat(user("c"), answer("d"))]


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet", "saved"])
@pytest.mark.parametrize("completion", ["x", [answer("x")]])
def test_a_null_answer_is_dropped_and_counted_in_every_container(tmp_path: Path, name: str, completion: Any) -> None:
    prompt = "q" if completion == "x" else [user("q")]
    rows = [{"prompt": prompt, "completion": completion, "system": None}, {"prompt": prompt, "completion": None}]
    if name == "saved":
        Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
    else:
        (tmp_path / name).write_bytes(parquet(rows)) if name == "d.parquet" else write(tmp_path / name, rows)
    data = load_training_data(tmp_path / name, tokenizer=CHAT, held_out=0)
    assert (data.num_rows, data.num_dropped) == (2, 1)
    assert data.train.to_list() == [{"prompt": prompt, "completion": completion}]


LABELS = datasets.Features({"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])})


def test_labels_are_learned_by_their_names(tmp_path: Path) -> None:
    """A table holds labels as numbers, and -1 where there is none."""
    table = Dataset.from_dict({"question": ["a", "b", "c"], "answer": [1, -1, 0]}, features=LABELS)
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    for name in ("d.parquet", "saved"):
        data = load_training_data(tmp_path / name, held_out=0)
        assert data.train["completion"][:] == ["yes", "no"] and data.num_dropped == 1
    # What tells of labels may be older than the column.
    rewritten = pyarrow.parquet.read_table(tmp_path / "d.parquet").set_column(1, "answer", [["often", "never", "no"]])
    pyarrow.parquet.write_table(rewritten, tmp_path / "d.parquet")
    assert load_training_data(tmp_path / "d.parquet", held_out=0).train["completion"][:] == ["often", "never", "no"]
    _, head, _ = open_source(str(tmp_path / "saved"), Reading(), 0)
    assert head.rows["completion"][:] == ["yes", "no"] and head.num_dropped == 1


def test_a_torn_first_line_that_opens_a_list_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('[{"role": "us\n' + one("a") + one("b"), encoding="utf-8")
    data = load_training_data(tmp_path / "d.jsonl", held_out=0, skips=True)
    assert data.train["completion"][:] == ["a", "b"] and data.num_rows == 3


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["instruction", "output", "output"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    refused(tmp_path / "d.parquet", "d.parquet: got more than one column 'output'")


def test_long_cells_and_long_numbers_are_read(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(f"instruction,output\n{'x' * 200_000},y\n", encoding="utf-8")
    assert len(load_training_data(tmp_path / "d.csv", held_out=0).train[0]["prompt"]) > 200_000
    digits = "9" * 5000
    (tmp_path / "d.jsonl").write_text(f'{{"instruction": {digits}, "output": "b"}}', encoding="utf-8")
    assert digits in load_training_data(tmp_path / "d.jsonl", held_out=0).train[0]["prompt"]


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(path: Path | str, *parts: str, **options: Any) -> None:
    with pytest.raises(PatError) as caught:
        load_training_data(path, **options)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_status == 2
    assert message.count(str(path)) <= 1  # said once, not again in other words
    for part in parts:
        assert part in message, f"{part!r} not in {message!r}"


GOOD = json.dumps(alpaca_rows(1)[0])
DEEP = "[" * 100_000 + "]" * 100_000

BAD_FILES: list[tuple[str, str | bytes, list[str]]] = [
    ("data.txt", "hello", ["suffix '.txt'", ".jsonl, .ndjson, .parquet, .csv"]),
    ("data.gz", "hello", ["suffix ''"]),
    ("data.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-9], ["data.jsonl.gz: not readable"]),
    ("data.jsonl.zst", zstd(JSONL)[:-5], ["data.jsonl.zst: not readable"]),
    ("data.jsonl", b'{"text": "\xff"}', ["not readable", "UTF-8"]),
    ("data.jsonl", "", ["has no rows"]),
    ("data.json", "[]", ["has no rows"]),
    ("data.csv", "instruction,output\n", ["has no rows"]),
    ("data.jsonl", f"{GOOD}\n\n{GOOD[:-1]}\n{GOOD}", ["data.jsonl, line 3", "not valid JSON"]),
    ("data.json", f"[{GOOD},\n {GOOD[:-5]}]", ["data.json, line 2", "not valid JSON"]),
    ("data.jsonl", f"{GOOD}\n[1]", ["data.jsonl, line 2", "a JSON list", "expected an object"]),
    ("data.jsonl", f"[{GOOD},\n {GOOD[:-5]}]", ["data.jsonl, line 2", "not valid JSON"]),
    ("data.jsonl", f"[1]\n{GOOD}", ["data.jsonl, line 1", "a JSON list", "expected an object"]),
    ("data.csv", "\n\n", ["has no rows"]),
    ("data.csv", "\n,,a\n1,2,3\n", ["line 2", "more than one column ''"]),
    ("data.json", f"[{GOOD}, 3]", ["data.json, row 2", "a JSON number"]),
    ("data.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', ["several lists of rows (train, test)"]),
    ("data.jsonl", f'{GOOD}\n{{"x": {DEEP}}}', ["line 2: nested too deeply"]),
    ("data.json", f'[{GOOD},\n{{"x": {DEEP}}}]', ["line 2: nested too deeply"]),
    ("data.jsonl", f'{GOOD}\n{{"output": "a", "output": "b"}}', ["line 2", "the field 'output' more than once"]),
    ("data.csv", "instruction,output,output\na,b,c\n", ["line 1", "more than one column 'output'"]),
    ("data.csv", "instruction,output\na,b\nc\n", ["data.csv, line 3", "fields"]),
    ("data.csv", "instruction,output\na,b\nc,d,e\n", ["data.csv, line 3", "fields"]),
    ("data.json", '{"instruction": ["a"], "output": ["b"]}', ["for each column (instruction, output)", "each row"]),
    ("data.json", '{"instruction": {"0": "a"}, "output": {"0": "b"}}', ["for each column (instruction, output)"]),
    ("data.csv", "messages\n[{'role': 'user'}]\n", ["line 2: field 'messages' is not valid JSON", "json.dumps"]),
    ("data.csv", 'messages\n"a\nb"\n', ["line 2: field 'messages' is of type str"]),
    ("data.parquet", "no parquet", ["not readable", "expected a parquet file"]),
    ("data.jsonl", '{"frage": "a", "antwort": "b"}', ["columns antwort, frage", "instruction", "messages", "rename"]),
    ("data.csv", "question;answer\na;b\n", ["columns question;answer", "by commas, not by ';'"]),
    ("data.csv", "question;answer\na;b, c\n", ["line 2: got another number of fields", "by commas, not by ';'"]),
    ("data.csv", 'question,answer\na,b\nc,"d\ne,f\n', ["the row from line 3 on: not valid CSV"]),
]


@pytest.mark.parametrize(("name", "content", "parts"), BAD_FILES)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, parts: list[str]) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path / name, str(tmp_path / name), *parts)


IMAGE = [{"type": "image_url", "image_url": {"url": "x.png"}}]

BAD_ROWS: list[tuple[dict[str, Any], Any, str]] = [
    ({"instruction": "a"}, CHAT, "'output' is missing (found instruction)"),
    ({"instruction": None, "output": "b"}, CHAT, "'instruction' is missing or null"),
    ({"instruction": float("nan"), "output": "b"}, CHAT, "'instruction' is missing or null"),
    ({"instruction": "a", "output": True}, CHAT, "'output' is of type bool"),
    ({"instruction": "a", "output": {"x": 1}}, CHAT, "'output' is of type dict"),
    ({"instruction": "a", "output": ["b", "c"]}, CHAT, "'output' is a list with a part of type str, expected a string"),
    ({"instruction": "a", "output": [answer("b")]}, CHAT, "'output' is a list of messages, expected a string"),
    ({"instruction": "\ud800", "output": "b"}, CHAT, "not valid Unicode"),
    ({"instruction": "a", "output": "b", "system": "s"}, NO_CHAT, "'system' has no place in the Alpaca wording"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, CHAT, "[question, answer] pairs"),
    ({"instruction": "a", "output": "b", "tools": "[{"}, CHAT, "'tools' is not valid JSON"),
]
BAD_CONVERSATIONS: list[tuple[Any, Any, str]] = [
    ("hi", CHAT, "'messages' is of type str"),
    ([], CHAT, "'messages' is an empty list"),
    ([3], CHAT, "message 1 of field 'messages' is of type int"),
    (["hi", "yo"], CHAT, "message 1 of field 'messages' is of type str, expected an object with role and content"),
    (
        [user("a"), answer("b", mask=False)],
        CHAT,
        "message 2 of field 'messages' has 'mask', which tools mean in different ways; give it weight 0",
    ),
    ([{"role": "boss", "content": "x"}], CHAT, "role 'boss'"),
    ([user("a"), answer(None)], CHAT, "content of message 2 of field 'messages' is missing or null"),
    ([user(IMAGE), answer("b")], CHAT, "a part of type 'image_url'"),
    ([user("a"), answer("b", weight=0.5)], CHAT, "weight of message 2 of field 'messages' is 0.5"),
    ([user("a"), answer("b"), user("c"), answer("d")], NO_CHAT, "got a conversation of user, assistant, user, assis"),
    ([user("a"), answer("b", reasoning="c")], NO_CHAT, "user, assistant with reasoning"),
]


@pytest.mark.parametrize(
    ("row", "tokenizer", "part"), [*BAD_ROWS, *(({"messages": m}, *rest) for m, *rest in BAD_CONVERSATIONS)]
)
def test_bad_rows_are_named_by_their_line(tmp_path: Path, row: dict[str, Any], tokenizer: Any, part: str) -> None:
    good = {"messages": [user("a"), answer("b")]} if "messages" in row else alpaca_rows(1)[0]
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n", encoding="utf-8")
    refused(path, f"{path}, line 3: ", part, tokenizer=tokenizer)


def test_text_that_is_no_message_list_stays_text(tmp_path: Path) -> None:
    spelled = [json.dumps([user("a")]), '[{"name": "f"}]', "[1]", "[a"]
    rows = [{"prompt": "say it in JSON", "completion": text} for text in spelled]
    assert [row["completion"] for row in converted(tmp_path, rows)] == spelled
    rows.append({"prompt": spelled[0], "completion": "b"})
    assert converted(tmp_path, rows)[-1] == rows[-1]
    refused(write(tmp_path / "of.jsonl", rows[-1:]), "field 'completion' is of type str", tokenizer=CHAT)


def test_where_prompts_are_learned_a_conversation_is_one_example(tmp_path: Path) -> None:
    turns = [user("a"), answer("b"), user("c"), answer("d"), user("e")]
    assert converted(tmp_path, [{"messages": turns}], learns_prompts=True) == [chat(*turns[:4])]
    for row in ({"messages": [answer("b", weight=0), *turns]}, {"prompt": [user("a", train=0)], "completion": turns}):
        path = write(tmp_path / "of.jsonl", [row])
        refused(path, "line 1: a message is not to be learned", "--comp", tokenizer=CHAT, learns_prompts=True)


def test_pairs_that_differ_from_row_to_row(tmp_path: Path) -> None:
    pairs = [{"prompt": "a", "completion": "b"}, {"prompt": [user("a")], "completion": [answer("b")]}]
    refused(write(tmp_path / "a.jsonl", pairs), "line 2: field 'prompt' is a list", tokenizer=CHAT)
    pairs[1]["completion"] = [answer("b", train=False)]
    refused(write(tmp_path / "b.jsonl", pairs[1:]), "not to be learned", tokenizer=CHAT)
    two = [{"messages": [SYSTEM, user("a"), answer("b")], "system": "other"}]
    refused(write(tmp_path / "c.jsonl", two), "another system message", tokenizer=CHAT)


@pytest.mark.parametrize(
    ("name", "content", "num_bad", "first"),
    [
        ("d.jsonl", f'{GOOD}\n{{"instruction": \n[3]\n{GOOD}\n{{"instruction": "a"}}\n', 3, "line 2: not valid JSON"),
        ("d.jsonl", b'\xff\n{"instruction": 1}\n' + GOOD.encode() + b"\n" + GOOD.encode(), 2, "line 1: not readable"),
        ("d.json", f'[{GOOD}, 3, {GOOD}, {{"output": "b", "instruction": []}}]', 2, "row 2: got a JSON number"),
        ("d.csv", "instruction,output\na,b\nc\nd,e,f\ng,h\n", 2, "line 3: got another number of fields"),
    ],
)
def test_bad_rows_are_skipped_and_counted_if_asked_for(
    tmp_path: Path, name: str, content: str | bytes, num_bad: int, first: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(path, first)
    source = load_training_data(path, held_out=0, skips=True).source
    assert (source.num_bad, source.num_usable, source.num_rows) == (num_bad, 2, num_bad + 2)
    assert first in source.first_bad


def test_places_options_and_splits_that_are_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "none.jsonl", "no such file")
    refused("none.jsonl", "none.jsonl: no such file")  # looks like a file: no hub involved
    refused(tmp_path, "is a folder without a data file")
    path = write(tmp_path / "data.jsonl", alpaca_rows(10))
    refused(path, "split 'test'", "'train'", split="test")
    refused(path, "selects none", split="train[4:4]")
    refused(path, "no chat template", tokenizer=NO_CHAT, template="chat")
    refused(path, "dataset_text_field='story'", "input, instruction, output", text_field="story")
    for held_out in (10, -1, 1.0, 1.5, "nan", "inf"):
        refused(path, f"held_out={held_out}", held_out=held_out)
    refused(path, "none.jsonl: no such file", held_out=tmp_path / "none.jsonl")


# -- what is kept apart ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "held_out", "expected"),
    [
        (1, None, 0),
        (2, None, 1),
        (100, None, 10),
        (700, None, 20),
        (12_000, None, 200),
        (10, "3", 3),
        (10, 0.25, 3),
        (9, "0", 0),
    ],
)
def test_held_out_size(tmp_path: Path, num_rows: int, held_out: Any, expected: int) -> None:
    data = load_training_data(write(tmp_path / "data.jsonl", alpaca_rows(num_rows)), held_out=held_out)
    assert (0 if data.held_out is None else len(data.held_out)) == expected
    assert len(data.train) == num_rows - expected


def test_held_out_rows_depend_on_the_seed_only_and_are_disjoint(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", alpaca_rows(50))
    parts = [load_training_data(path, held_out=10, seed=seed) for seed in (1, 1, 2)]
    first, again, other = ([data.train["completion"][:], data.held_out["completion"][:]] for data in parts)  # type: ignore[index]
    assert first == again != other
    assert sorted(first[0] + first[1]) == sorted(f"answer {i}" for i in range(50))
    assert first[0] == sorted(first[0], key=lambda text: int(text.split()[1]))  # the order is that of the file


def test_no_conversation_is_on_both_sides(tmp_path: Path) -> None:
    rows = [{"messages": [user(f"a {i}"), answer("b"), user("c"), answer("d")]} for i in range(20)]
    data = load_training_data(write(tmp_path / "data.jsonl", rows), tokenizer=CHAT, held_out=5)
    assert data.held_out is not None
    firsts = [{row["prompt"][0]["content"] for row in part} for part in (data.train, data.held_out)]
    assert (len(firsts[0]), len(firsts[1]), len(data.held_out)) == (15, 5, 10)
    assert not firsts[0] & firsts[1]


def test_held_out_from_its_own_file(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", alpaca_rows(5))
    other = write(tmp_path / "other.jsonl", [{"question": "new", "answer": "row"}])
    data = load_training_data(path, held_out=other)
    assert data.held_out is not None and len(data.train) == 5
    assert data.held_out["completion"][:] == ["row"] and data.held_out_name == str(other)


# -- the hub ---------------------------------------------------------------------------------------------------------


def test_hub_dataset_is_converted_and_checked_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Dataset.from_list([*alpaca_rows(3), {"instruction": "x", "input": "", "output": ""}])
    calls = []

    def load_dataset(path: str, **kwargs: Any) -> Dataset:
        calls.append((path, kwargs))
        return hub

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "load_dataset_builder", lambda *_, **__: SimpleNamespace(info=DatasetInfo()))
    data = load_training_data("owner/name", config_name="en", split="train[:4]", held_out=1)
    assert calls == [("owner/name", {"name": "en", "split": "train[:4]", "streaming": False})]
    assert data.held_out is not None and (len(data.train), len(data.held_out)) == (2, 1)
    assert (data.num_rows, data.num_dropped, data.name) == (4, 1, "owner/name")
    assert data.source.fingerprint == f"datasets:{hub._fingerprint}"

    hub = Dataset.from_list([{"instruction": "x", "output": "y"}, {"instruction": None, "output": "y"}])
    refused("owner/name", "owner/name, row 2: field 'instruction' is missing")


def wrapped() -> Exception:
    error = RuntimeError("An error occurred while generating the dataset")
    error.__cause__ = ValueError("line 3 is torn")
    return error


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (wrapped(), "could not be loaded, split 'train' (line 3 is torn)"),
        (ConnectionError("Couldn't reach the Hub"), "owner/name: no such file, and the hub could not be reached"),
        (ValueError("Config name is missing.\nPick one of a, b"), "Config name is missing. Pick one of a, b"),
    ],
)
def test_hub_trouble_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, part: str) -> None:
    def load_dataset(path: str, **kwargs: Any) -> Dataset:
        raise error

    monkeypatch.setattr(sources, "load_dataset_builder", load_dataset)
    refused("owner/name", part)


def test_a_folder_with_a_name_like_that_of_a_missing_dataset_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    refused("trian", "trian: no such file (did you mean train?)")
