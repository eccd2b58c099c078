"""The 14 tasks by name, and rows of the hub's datasets as questions."""

import json
from pathlib import Path
from typing import Any

import pytest

from pat.errors import PatError
from pat.questions import TASKS, evenly_spaced, load_rows, resolve_tasks

LABELS = ["A", "B", "C", "D"]

HUB_ROWS: dict[str, tuple[int, dict[str, Any]]] = {
    "arc_challenge": (
        0,
        {
            "question": "A puddle is gone after a sunny day. Which process best explains this?",
            "choices": {"text": ["evaporation", "condensation", "freezing", "erosion"], "label": LABELS},
            "answerKey": "A",
        },
    ),
    "arc_easy": (
        0,
        {
            "question": "Which of these animals can fly?",
            "choices": {"text": ["a dog", "a bird", "a fish", "a cow"], "label": ["1", "2", "3", "4"]},
            "answerKey": "2",
        },
    ),
    "boolq": (
        1,
        {
            "passage": "Penguin -- Penguins are birds that live near the sea. They swim well, but they cannot fly.",
            "question": "can penguins fly",
            "label": 0,
        },
    ),
    "copa": (
        1,
        {
            "premise": "The boy dropped the glass.",
            "question": "effect",
            "choice1": "It grew bigger.",
            "choice2": "It broke into pieces.",
            "label": 1,
        },
    ),
    "hellaswag": (
        6,
        {
            "activity_label": "Mending a bike",
            "ctx": "How to mend a flat tire. [title] Take off the wheel. [step] You",
            "endings": [
                "should sing to the wheel for a week.",
                "find the hole and put a patch on it.",
                "should throw the bike into a lake.",
                "paint the hole red.",
            ],
            "label": "1",
        },
    ),
    "mmlu": (
        0,
        {
            "subject": "elementary_mathematics",
            "question": "What is 7 + 5?",
            "choices": ["10", "11", "12", "13"],
            "answer": 2,
        },
    ),
    "multirc": (
        4,
        {
            "paragraph": "Tom and his father built a boat of wood. It took them the whole winter. In spring they "
            "painted it blue and sailed on the lake.",
            "question": "Who built the boat?",
            "answer": "Tom alone",
            "label": 0,
        },
    ),
    "openbookqa": (
        0,
        {
            "fact1": "bees carry pollen from flower to flower",
            "question_stem": "Without bees there would be fewer",
            "choices": {"text": ["stones", "fruits", "clouds", "shoes"], "label": LABELS},
            "answerKey": "B",
        },
    ),
    "piqa": (
        4,
        {
            "goal": "To open a jar that is stuck,",
            "sol1": "hold its lid under warm water. ",
            "sol2": "hold its lid with soap on your hands. ",
            "label": 0,
        },
    ),
    "rte": (
        1,
        {"premise": "The shop is closed on Sunday.", "hypothesis": "The shop is open on Sunday.", "label": 1},
    ),
    "siqa": (
        2,
        {
            "context": "Leo studied hard for the test.",
            "question": "Why did Leo do this?",
            "answerA": "to forget it all",
            "answerB": "to lose his pencil",
            "answerC": "to get a good grade",
            "label": "3",
        },
    ),
    "wic": (
        1,
        {
            "word": "read",
            "sentence1": "He likes to read in bed.",
            "sentence2": "She can read a long book.",
            "label": 1,
        },
    ),
    "winogrande": (
        3,
        {
            "sentence": "The mouse ran away from the cat because the _ was afraid.",
            "option1": "mouse",
            "option2": "cat",
            "answer": "1",
        },
    ),
    "wsc": (
        4,
        {
            "text": "Mary told Jane that her shoes were wet, and Jane changed them.",
            "span1_index": 2,
            "span1_text": "Jane",
            "span2_index": 4,
            "span2_text": "her",
            "label": 1,
        },
    ),
}
"""By task: the place of a question in the local file, and its row as the hub has it."""

GOOD = {"stem": "s", "choices": ["a", "b"], "answer": 1, "prompt": "s\nA. a\nB. b\nAnswer:"}


@pytest.mark.parametrize("name", TASKS)
def test_a_row_of_the_hub_becomes_the_row_of_the_local_file(name: str, tests_data: Path) -> None:
    """The files are what the authors' evaluation asks: the wording was compared with their own rows when written."""
    place, row = HUB_ROWS[name]
    assert TASKS[name].convert(row) == load_rows(name, tests_data / "tasks")[place]


def test_the_prompt_shows_a_choice_as_it_is_and_scores_it_without_outer_spaces(tests_data: Path) -> None:
    row = load_rows("piqa", tests_data / "tasks")[4]
    assert "A. hold its lid under warm water. \n" in row["prompt"]
    assert row["choices"][0] == "hold its lid under warm water."


def test_a_question_without_a_subject_is_about_nothing() -> None:
    row = TASKS["mmlu"].convert(HUB_ROWS["mmlu"][1] | {"subject": ""})
    assert row is not None
    assert row["stem"].startswith("There is a single choice question. Answer the question by replying A, B, C or D.\n")


def test_spans_whose_index_is_wrong_are_not_marked() -> None:
    row = TASKS["wsc"].convert(HUB_ROWS["wsc"][1] | {"span2_index": 99})
    assert row is not None and "told * Jane * that her shoes" in row["stem"]


def test_the_paper_has_fourteen_tasks_which_are_named_one_by_one_or_all_at_once() -> None:
    assert resolve_tasks("paper") == list(TASKS) and len(TASKS) == 14
    assert resolve_tasks(" copa, arc_easy,copa") == resolve_tasks(["copa", "arc_easy,copa"]) == ["copa", "arc_easy"]
    assert len(resolve_tasks(["copa", "paper"])) == 14
    for wrong in ("copa,nothing", "", []):
        with pytest.raises(PatError, match="arc_challenge, arc_easy, boolq"):
            resolve_tasks(wrong)


def test_a_limit_takes_evenly_spaced_rows() -> None:
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, None) == evenly_spaced(3, 3) == evenly_spaced(3, 99) == [0, 1, 2]
    assert evenly_spaced(0, 3) == []


@pytest.mark.parametrize(
    ("task", "split", "asked"),
    [
        ("mmlu", "train", "auxiliary_train"),
        ("mmlu", "train[:5]+train[9:]", "auxiliary_train[:5]+auxiliary_train[9:]"),
        ("mmlu", "dev", "dev"),
        ("arc_easy", "train[:100]", "train[:100]"),
        ("arc_easy", None, "validation"),
    ],
)
def test_the_hub_is_asked_for_the_tasks_own_splits_and_three_choices_are_left_out(
    task: str, split: str | None, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    three = {"question": "?", "choices": {"text": ["a"] * 3, "label": LABELS[:3]}, "answerKey": "A"}

    def load(path: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        calls.append((path, config, split))
        return [HUB_ROWS[task][1], *([three] if task == "arc_easy" else [])]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert len(load_rows(task, None, split=split)) == 1
    assert calls == [(TASKS[task].path, TASKS[task].config, asked)]


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("boolq", {"label": -1}),  # what the hub has in place of an answer that is kept secret
        ("piqa", {"label": -1}),
        ("siqa", {"label": "0"}),
        ("hellaswag", {"label": ""}),
        ("arc_easy", {"answerKey": "?"}),
        ("mmlu", {"choices": ["a"] * 9}),
        ("winogrande", {"option1": None}),
    ],
)
def test_a_row_of_the_hub_that_is_no_question_is_named(
    task: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = HUB_ROWS[task][1]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [good, good | change])
    with pytest.raises(PatError, match=rf"{TASKS[task].path}, split '{TASKS[task].split}', row 2: is not a question"):
        load_rows(task, None)


def test_a_hub_that_cannot_be_reached_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unexpected(Exception):
        """Of no class that is known here."""

    def load(*_: Any, **__: Any) -> None:
        raise Unexpected("no route")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(PatError, match=r"no route; pass --data_dir with files"):
        load_rows("copa", None)
    with pytest.raises(PatError, match=r"no route; pass task:FOLDER/copa with files to train on"):
        load_rows("copa", None, split="train")


def test_fields_that_are_not_ours_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "copa.jsonl").write_text(json.dumps(GOOD | {"subject": "law", "source": {"page": 1}}) + "\n\n")
    assert load_rows("copa", tmp_path) == [GOOD | {"subject": "law"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["copa.jsonl", "no such file"]),
        ("", ["copa", "no rows"]),
        ("{", ["line 1", "JSON"]),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"answer": 2}), ["line 2", "index of the right one"]),
        (json.dumps(GOOD | {"answer": True}), ["line 1", "index of the right one"]),
        (json.dumps(GOOD | {"choices": ["a"]}), ["line 1"]),
        (json.dumps(GOOD | {"choices": ["a", ""]}), ["line 1"]),
        (json.dumps(GOOD | {"stem": None}), ["line 1", "stem"]),
        (json.dumps([1]), ["row 1"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
    ],
)
def test_what_is_wrong_with_a_file_of_questions_is_said(content: Any, words: list[str], tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "copa.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PatError) as error:
        load_rows("copa", tmp_path)
    assert all(word in str(error.value) for word in words)
