"""Data files and hub datasets on their way to SFTTrainer."""

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pat.errors import PatError
from pat.training import sources
from pat.training.data import check_truncation, load_training_data

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per word; unknown words are `<unk>`, which is all that lengths need."""
    words = models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")
    inner = Tokenizer(words)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def alpaca_rows(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"ask {i}", "input": "", "output": f"answer {i}"} for i in range(count)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text("\n" + json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


def load_rows(path: Path, **kwargs: Any) -> list[dict[str, Any]]:
    return load_training_data(path, held_out=0, **kwargs).train.to_list()


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"instruction": 'Say hi,\n"friend"', "input": "", "output": "hi\nthere", "source": "me"},
        {"instruction": "Add {one}", "input": "2, é", "output": "3", "source": "me"},
    ]
    path = write(tmp_path / f"data{suffix}", rows)

    data = load_training_data(path, template="alpaca", held_out=0)

    assert data.train.to_list() == [
        {
            "prompt": "Below is an instruction that describes a task. Write a response that appropriately "
            'completes the request.\n\n### Instruction:\nSay hi,\n"friend"\n\n### Response:\n',
            "completion": "hi\nthere",
        },
        {
            "prompt": "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd {one}\n\n### Input:\n2, é\n\n### Response:\n",
            "completion": "3",
        },
    ]
    assert (data.format, data.template, data.held_out) == ("alpaca", "alpaca", None)
    assert (data.source, data.num_rows, data.num_dropped) == (str(path), 2, 0)
    assert data.fingerprint == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def test_json_suffix_with_one_object_per_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", alpaca_rows(3)).rename(tmp_path / "data.json")
    assert len(load_rows(path)) == 3


def test_chat_template_makes_message_lists(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "lamini.jsonl",
        [
            {"instruction": "Sum up.", "context": "A story.", "response": "Short."},
            {"instruction": "Greet.", "context": None, "response": "Hi."},
        ],
    )
    data = load_training_data(path, tokenizer=make_tokenizer(CHAT_TEMPLATE), held_out=0)
    assert data.template == "chat"
    assert data.train.to_list() == [
        {
            "prompt": [{"role": "user", "content": "Sum up.\n\nA story."}],
            "completion": [{"role": "assistant", "content": "Short."}],
        },
        {
            "prompt": [{"role": "user", "content": "Greet."}],
            "completion": [{"role": "assistant", "content": "Hi."}],
        },
    ]


def test_auto_takes_alpaca_without_a_chat_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", alpaca_rows(1))
    assert load_training_data(path, tokenizer=make_tokenizer(), held_out=0).template == "alpaca"
    with pytest.raises(PatError, match="no chat template"):
        load_training_data(path, tokenizer=make_tokenizer(), template="chat")


def test_prompt_completion_strings_stay_unless_a_template_is_asked_for(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "Q: 1+1\nA:", "completion": " 2", "id": 7}])
    assert load_rows(path, tokenizer=tokenizer) == [{"prompt": "Q: 1+1\nA:", "completion": " 2"}]
    assert load_rows(path, tokenizer=tokenizer, template="chat") == [
        {
            "prompt": [{"role": "user", "content": "Q: 1+1\nA:"}],
            "completion": [{"role": "assistant", "content": " 2"}],
        }
    ]
    [row] = load_rows(path, tokenizer=tokenizer, template="alpaca")
    assert "### Instruction:\nQ: 1+1\nA:\n\n### Response:\n" in row["prompt"]


def test_prompt_completion_message_lists(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Hi."}],
    }
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    assert load_rows(path, tokenizer=make_tokenizer(CHAT_TEMPLATE)) == [row]


def test_conversations_give_one_row_per_answer(tmp_path: Path) -> None:
    turns = [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "e"),
    ]
    messages = [{"role": role, "content": content, "weight": 1} for role, content in turns]
    clean = [{"role": role, "content": content} for role, content in turns]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": messages}])
    data = load_training_data(path, tokenizer=make_tokenizer(CHAT_TEMPLATE), held_out=0)
    assert data.format == "messages"
    assert data.train.to_list() == [
        {"prompt": clean[:2], "completion": [clean[2]]},
        {"prompt": clean[:4], "completion": [clean[4]]},
    ]


def test_a_greeting_before_any_question_is_context_not_an_answer(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role} for role in ("assistant", "user", "assistant")]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    data = load_training_data(path, tokenizer=make_tokenizer(CHAT_TEMPLATE), held_out=0)
    assert data.train.to_list() == [{"prompt": turns[:2], "completion": turns[2:]}]
    assert data.num_dropped == 1


def test_sharegpt_names(tmp_path: Path) -> None:
    conversation = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    path = write_jsonl(tmp_path / "data.jsonl", [{"conversations": conversation}])
    assert load_rows(path, tokenizer=make_tokenizer(CHAT_TEMPLATE)) == [
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "completion": [{"role": "assistant", "content": "Hello"}],
        }
    ]
    # A base model without chat template: one question and one answer still fit the Alpaca wording.
    [row] = load_rows(path, tokenizer=make_tokenizer())
    assert row["prompt"].endswith("### Instruction:\nHi\n\n### Response:\n") and row["completion"] == "Hello"


def test_longer_conversations_need_a_chat_template(tmp_path: Path) -> None:
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": turns}])
    with pytest.raises(PatError, match=r"line 1: got a conversation of user, assistant, user, assistant"):
        load_training_data(path, tokenizer=make_tokenizer())


def test_plain_text_stays_plain(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "Once upon"}, {"text": " "}, {"text": "a time"}])
    data = load_training_data(path, tokenizer=make_tokenizer(CHAT_TEMPLATE), held_out=0)
    assert data.train.to_list() == [{"text": "Once upon"}, {"text": "a time"}]
    assert (data.format, data.template, data.num_dropped) == ("text", None, 1)


def test_rows_without_response_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*alpaca_rows(2), {"instruction": "x", "output": " \n"}, {"instruction": "y", "output": None}]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    data = load_training_data(path, held_out=0)
    assert (data.num_rows, data.num_dropped, len(data.train)) == (4, 2, 2)

    with pytest.raises(PatError, match="all 2 responses are empty"):
        load_training_data(write_jsonl(tmp_path / "empty.jsonl", rows[2:]))


def assert_one_line_error(path: Path | str, *parts: str, **kwargs: Any) -> None:
    with pytest.raises(PatError) as caught:
        load_training_data(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} not in {message!r}"
    assert caught.value.exit_status == 2


GOOD = json.dumps(alpaca_rows(1)[0])


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("data.txt", "hello", ["suffix '.txt'", ".jsonl, .parquet, .csv"]),
        ("data.jsonl", "", ["has no rows"]),
        ("data.json", "[]", ["has no rows"]),
        ("data.csv", "instruction,output\n", ["has no rows"]),
        ("data.jsonl", f"{GOOD}\n\n{GOOD[:-1]}\n{GOOD}", ["data.jsonl, line 3", "not valid JSON"]),
        ("data.json", f"[{GOOD},\n {GOOD[:-5]}]", ["data.json, line 2", "not valid JSON"]),
        ("data.jsonl", f"{GOOD}\n[1]", ["data.jsonl, line 2", "a JSON list", "expected an object"]),
        ("data.json", f"[{GOOD}, 3]", ["data.json, row 2", "a JSON number"]),
        ("data.csv", "instruction,output\na,b\nc\n", ["data.csv, line 3", "fields"]),
        ("data.csv", "instruction,output\na,b\nc,d,e\n", ["data.csv, line 3", "fields"]),
        ("data.parquet", "no parquet", ["not a readable parquet file"]),
        (
            "data.jsonl",
            '{"question": "a", "answer": "b"}',
            ["columns answer, question", "alpaca", "messages"],
        ),
        ("data.jsonl", f'{GOOD}\n\n{{"instruction": "a"}}', ["line 3", "'output' is missing", "instruction"]),
        ("data.jsonl", f'{GOOD}\n{{"instruction": "a", "output": 3}}', ["line 2", "'output' is of type int"]),
        (
            "data.jsonl",
            f'{GOOD}\n{{"instruction": null, "output": "b"}}',
            ["line 2", "'instruction' is missing or"],
        ),
        (
            "data.jsonl",
            f'{GOOD}\n{{"instruction": "\\ud800", "output": "b"}}',
            ["line 2", "not valid Unicode"],
        ),
        ("data.jsonl", '{"messages": "hi"}', ["line 1", "'messages' is of type str"]),
        ("data.jsonl", '{"messages": []}', ["line 1", "an empty list"]),
        (
            "data.jsonl",
            '{"messages": [{"role": "boss", "content": "x"}]}',
            ["line 1", "role 'boss'", "assistant"],
        ),
        (
            "data.jsonl",
            '{"messages": [{"role": "user", "content": 1}]}',
            ["content of message 1", "type int"],
        ),
        ("data.jsonl", '{"prompt": "a", "completion": [1]}', ["line 1", "'completion' is of type list"]),
        (
            "data.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": [{"role": "user"}], "completion": []}',
            ["line 2", "'prompt' is a list"],
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, parts: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert_one_line_error(path, str(path), *parts)


def test_csv_errors_tell_the_line_a_row_starts_on(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('messages\n"a\nb"\n', encoding="utf-8")
    assert_one_line_error(path, "line 2: field 'messages' is of type str")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "\xff"}')
    assert_one_line_error(path, "not readable", "UTF-8")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert_one_line_error(tmp_path / "none.jsonl", "no such file")
    assert_one_line_error("none.jsonl", "none.jsonl: no such file")  # looks like a file: no hub involved
    assert_one_line_error(tmp_path, "is a folder")


def test_local_splits_are_slices_of_train(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", alpaca_rows(10))
    rows = load_rows(path, split="train[2:4]")
    assert [row["completion"] for row in rows] == ["answer 2", "answer 3"]
    assert_one_line_error(path, "split 'test'", split="test")
    assert_one_line_error(path, "selects none", split="train[4:4]")


@pytest.mark.parametrize(
    ("num_rows", "held_out", "expected"),
    [
        (1, None, 0),
        (2, None, 1),
        (100, None, 2),
        (12_000, None, 200),
        (10, 3, 3),
        (10, "3", 3),
        (10, 0.25, 3),
        (9, "0", 0),
    ],
)
def test_held_out_size(tmp_path: Path, num_rows: int, held_out: Any, expected: int) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", alpaca_rows(num_rows))
    data = load_training_data(path, held_out=held_out)
    assert (0 if data.held_out is None else len(data.held_out)) == expected
    assert len(data.train) == num_rows - expected


@pytest.mark.parametrize("held_out", [10, -1, 1.0, 1.5, "nan", "inf"])
def test_impossible_held_out_size(tmp_path: Path, held_out: Any) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", alpaca_rows(10))
    assert_one_line_error(path, f"held_out={held_out}", held_out=held_out)


def test_held_out_rows_depend_on_the_seed_only_and_are_disjoint(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", alpaca_rows(50))
    first, again, other = (load_training_data(path, held_out=10, seed=seed) for seed in (1, 1, 2))
    assert first.held_out is not None and again.held_out is not None and other.held_out is not None
    assert first.held_out.to_list() == again.held_out.to_list() != other.held_out.to_list()
    assert first.train.to_list() == again.train.to_list()
    answers = first.train["completion"][:] + first.held_out["completion"][:]
    assert sorted(answers) == sorted(f"answer {i}" for i in range(50))


def test_no_conversation_is_on_both_sides(tmp_path: Path) -> None:
    conversations = [
        {"messages": [{"role": role, "content": f"{role} {i}"} for role in ("user", "assistant") * 2]}
        for i in range(20)
    ]
    path = write_jsonl(tmp_path / "data.jsonl", conversations)
    data = load_training_data(path, tokenizer=make_tokenizer(CHAT_TEMPLATE), held_out=5)
    assert data.held_out is not None
    firsts = [{row["prompt"][0]["content"] for row in part} for part in (data.train, data.held_out)]
    assert (len(firsts[0]), len(firsts[1]), len(data.held_out)) == (15, 5, 10)
    assert not firsts[0] & firsts[1]


def test_held_out_from_its_own_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", alpaca_rows(5))
    other = write_jsonl(tmp_path / "other.jsonl", [{"instruction": "new", "output": "row"}])
    data = load_training_data(path, held_out=other)
    assert len(data.train) == 5 and data.held_out is not None
    assert data.held_out["completion"][:] == ["row"] and data.held_out_source == str(other)
    assert_one_line_error(path, "none.jsonl: no such file", held_out=tmp_path / "none.jsonl")


def test_hub_dataset_is_converted_and_checked_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Dataset.from_list([*alpaca_rows(3), {"instruction": "x", "input": "", "output": ""}])
    calls = []

    def load_dataset(path: str, **kwargs: Any) -> Dataset:
        calls.append((path, kwargs))
        return hub

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    data = load_training_data("owner/name", config_name="en", split="train[:4]", held_out=1)
    assert calls == [("owner/name", {"name": "en", "split": "train[:4]"})]
    assert data.held_out is not None and (len(data.train), len(data.held_out)) == (2, 1)
    assert (data.num_rows, data.num_dropped, data.source) == (4, 1, "owner/name")
    assert data.fingerprint == f"datasets:{hub._fingerprint}"

    hub = Dataset.from_list([{"instruction": "x", "output": "y"}, {"instruction": None, "output": "y"}])
    assert_one_line_error("owner/name", "owner/name, row 2: field 'instruction' is missing or null")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **kwargs: Any) -> Dataset:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    assert_one_line_error("owner/name", "owner/name: no such file, and the hub could not be reached")


def test_hub_trouble_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **kwargs: Any) -> Dataset:
        raise ValueError("Config name is missing.\nPick one of a, b")

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    assert_one_line_error("owner/name", "Config name is missing. Pick one of a, b")


def test_truncation_is_counted() -> None:
    tokenizer = make_tokenizer()
    dataset = Dataset.from_list([{"prompt": "word " * length, "completion": "one two"} for length in (3, 4, 5, 9)])
    # A prompt of n words and a response fit partly from n + 1 tokens on.
    counts = [check_truncation(tokenizer, dataset, max_length) for max_length in (4, 5, 6, 9, 10, None)]
    assert counts == [3, 2, 1, 1, 0, 0]
    with pytest.raises(PatError, match=r"All 4 responses.*max_length 3.*takes 4;"):
        check_truncation(tokenizer, dataset, 3)


def test_plain_text_has_no_response_to_lose() -> None:
    assert check_truncation(make_tokenizer(), Dataset.from_list([{"text": "word " * 9}]), 2) == 0


def test_a_prompt_that_loses_its_end_to_the_response_leaves_room_for_it() -> None:
    """The template's generation prompt alone is longer than what precedes the answer in the conversation."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}</s> </s> {% endif %}"
    )
    row = {
        "prompt": [{"role": "user", "content": "one two"}],
        "completion": [{"role": "assistant", "content": "three"}],
    }
    assert check_truncation(tokenizer, Dataset.from_list([row]), 3) == 0
    with pytest.raises(PatError, match="takes 3;"):
        check_truncation(tokenizer, Dataset.from_list([row]), 2)
