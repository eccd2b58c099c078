"""The 14 tasks by name, and rows of the hub's datasets as questions."""

import json
from pathlib import Path
from typing import Any

import pytest

from pat.errors import PatError
from pat.questions import hub
from pat.questions.rows import evenly_spaced, load_rows, read_rows
from pat.questions.table import TASKS, resolve_tasks

HUB_ROWS: dict[str, tuple[int, dict[str, Any]]] = {
    "arc_easy": (
        0,
        {
            "question": "Which technology was developed most recently?",
            "choices": {
                "text": ["cellular telephone", "television", "refrigerator", "airplane"],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "A",
        },
    ),
    "copa": (
        4,
        {
            "premise": "The hamburger meat browned.",
            "choice1": "The cook froze it.",
            "choice2": "The cook grilled it.",
            "question": "cause",
            "label": 1,
        },
    ),
    "boolq": (
        2,
        {
            "passage": "Phantom pain -- Phantom pain sensations are described as perceptions that an individual "
            "experiences relating to a limb or an organ that is not physically part of the body. Limb loss is a result "
            "of either removal by amputation or congenital limb deficiency. However, phantom limb sensations can also "
            "occur following nerve avulsion or spinal cord injury.",
            "question": "is pain experienced in a missing body part or paralyzed area",
            "label": 1,
        },
    ),
    "hellaswag": (
        0,
        {
            "activity_label": "Roof shingle removal",
            "ctx": "A man is sitting on a roof. he",
            "endings": [
                "is using wrap to wrap a pair of skis.",
                "is ripping level tiles off.",
                "is holding a rubik's cube.",
                "starts pulling up roofing on a roof.",
            ],
            "label": "3",
        },
    ),
    "mmlu": (
        0,
        {
            "question": "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.",
            "subject": "abstract_algebra",
            "choices": ["0", "4", "2", "6"],
            "answer": 1,
        },
    ),
    "openbookqa": (
        1,
        {
            "question_stem": "There is most likely going to be fog around:",
            "choices": {"text": ["a marsh", "a tundra", "the plains", "a desert"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
            "fact1": "fog is formed by water vapor condensing in the air",
        },
    ),
    "piqa": (
        1,
        {
            "goal": "dresser",
            "sol1": "replace drawer with bobby pin ",
            "sol2": "finish, woodgrain with  bobby pin ",
            "label": 1,
        },
    ),
    "rte": (
        0,
        {
            "premise": "Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44, "
            "according to the Christopher Reeve Foundation.",
            "hypothesis": "Christopher Reeve had an accident.",
            "label": 1,
        },
    ),
    "siqa": (
        0,
        {
            "context": "Tracy didn't go home that evening and resisted Riley's attacks.",
            "question": "What does Tracy need to do before this?",
            "answerA": "make a new plan",
            "answerB": "Go home and see Riley",
            "answerC": "Find somewhere to go",
            "label": "3",
        },
    ),
    "wic": (
        0,
        {
            "word": "class",
            "sentence1": "An emerging professional class.",
            "sentence2": "Apologizing for losing your temper, even though you were badly provoked, showed real class.",
            "label": 0,
        },
    ),
    "winogrande": (
        0,
        {
            "sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "2",
        },
    ),
    "wsc": (
        1,
        {
            "text": "Mr. Moncrieff visited Chester 's luxurious New York apartment, thinking that it belonged to his "
            "son Edward . The result was that Mr. Moncrieff has decided to cancel Edward 's allowance on the ground "
            "that he no longer requires his financial support.",
            "span1_index": 0,
            "span2_index": 39,
            "span1_text": "Mr. Moncrieff",
            "span2_text": "his",
            "label": 1,
        },
    ),
}
"""By task: the place of a question in the local file, and its row as the hub has it."""


@pytest.mark.parametrize("name", sorted(HUB_ROWS))
def test_a_row_of_the_hub_becomes_the_row_of_the_local_file(name: str, shared_data: Path) -> None:
    place, row = HUB_ROWS[name]
    local = read_rows(shared_data / "eval" / "tasks" / f"{name}.jsonl")[place]
    assert TASKS[name].convert(row) == local


def test_a_question_without_a_subject_is_about_nothing() -> None:
    row = hub.mmlu({"question": "Which?", "subject": "", "choices": ["a", "b", "c", "d"], "answer": 2})
    assert row["stem"].startswith("There is a single choice question. Answer the question by replying A, B, C or D.\n")


def test_multirc_asks_of_every_answer_whether_it_is_true() -> None:
    row = hub.multirc({"paragraph": "It rained. ", "question": "Was it dry?", "answer": "No", "label": 1})
    assert row["stem"] == "It rained. \nQuestion: Was it dry?\nAnswer: No\nIs it true?"
    assert row["prompt"] == row["stem"] + "\nA. Yes\nB. No\nAnswer:"
    assert (row["choices"], row["answer"]) == (["Yes", "No"], 0)


def test_questions_of_arc_without_four_choices_are_left_out() -> None:
    row = {"question": "?", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "A"}
    assert hub.arc(row) is None
    numbered = {"text": ["a", "b", "c", "d"], "label": ["1", "2", "3", "4"]}
    converted = hub.arc({"question": "?", "choices": numbered, "answerKey": "3"})
    assert converted is not None and converted["answer"] == 2


def test_the_marks_of_wikihow_leave_hellaswag() -> None:
    row = {"activity_label": "Abuse", "ctx": "How [header] to tell. [title] Look.", "endings": ["a [step] b"] * 4}
    converted = hub.hellaswag(row | {"label": "0"})
    assert converted["stem"].startswith("Abuse: How to tell.. Look.")
    assert converted["choices"][0] == "a b"


def test_wsc_marks_the_spans_at_their_words_and_leaves_wrong_indices_alone() -> None:
    row = {"text": "Jane gave Joan candy because she was hungry.", "span1_index": 2, "span1_text": "Joan", "label": 0}
    converted = hub.wsc(row | {"span2_index": 5, "span2_text": "she"})
    assert converted["stem"].startswith("Passage: Jane gave * Joan * candy because # she # was hungry.\n")
    assert converted["answer"] == 1
    unmarked = hub.wsc(row | {"span2_index": 99, "span2_text": "she"})
    assert "because she was" in unmarked["stem"]


def test_the_paper_has_fourteen_tasks_and_the_local_files_are_theirs(shared_data: Path) -> None:
    assert [task.name for task in resolve_tasks("paper")] == list(TASKS)
    assert len(TASKS) == 14 and len({task.title for task in TASKS.values()}) == 14
    assert sorted(TASKS) == sorted(path.stem for path in (shared_data / "eval" / "tasks").glob("*.jsonl"))


def test_tasks_are_named_one_by_one_or_all_at_once() -> None:
    assert [task.name for task in resolve_tasks(" copa, arc_easy,copa")] == ["copa", "arc_easy"]
    assert len(resolve_tasks(["copa", "paper"])) == 14
    for wrong in ("copa,nothing", "", []):
        with pytest.raises(PatError, match="arc_challenge, arc_easy, boolq"):
            resolve_tasks(wrong)


def test_a_limit_takes_evenly_spaced_questions(tmp_path: Path) -> None:
    rows: list[Any] = [GOOD | {"stem": f"{number}"} for number in range(10)]
    assert [row["stem"] for row in evenly_spaced(rows, 4)] == ["0", "2", "5", "7"]
    assert evenly_spaced(rows, None) == evenly_spaced(rows, 10) == evenly_spaced(rows, 99) == rows
    (tmp_path / "copa.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert [row["stem"] for row in load_rows(TASKS["copa"], tmp_path, limit=3)] == ["0", "3", "6"]


def test_a_dataset_of_the_hub_is_converted_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        three = {"question": "?", "choices": {"text": ["a"] * 3, "label": ["A", "B", "C"]}, "answerKey": "A"}
        return [three, HUB_ROWS["arc_easy"][1], HUB_ROWS["arc_easy"][1]]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert [len(load_rows(TASKS["arc_easy"], None, limit=limit)) for limit in (None, 1)] == [2, 1]
    assert asked[0] == ("allenai/ai2_arc", "ARC-Easy", "validation")


@pytest.mark.parametrize(
    ("task", "split", "asked"),
    [
        ("mmlu", "train", "auxiliary_train"),
        ("mmlu", "train[:100]", "auxiliary_train[:100]"),
        ("mmlu", "train[:5]+train[9:]", "auxiliary_train[:5]+auxiliary_train[9:]"),
        ("mmlu", "dev", "dev"),
        ("arc_easy", "train[:100]", "train[:100]"),
        ("arc_easy", None, "validation"),
    ],
)
def test_train_is_what_the_dataset_calls_it(
    task: str, split: str | None, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = []

    def load(path: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        splits.append(split)
        return [HUB_ROWS[task][1]]

    monkeypatch.setattr("datasets.load_dataset", load)
    load_rows(TASKS[task], None, split=split)
    assert splits == [asked]


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("boolq", {"label": -1}),
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
        load_rows(TASKS[task], None)


def test_fields_that_are_not_ours_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "copa.jsonl").write_text(json.dumps(GOOD | {"subject": "law", "source": {"page": 1}}))
    assert load_rows(TASKS["copa"], tmp_path) == [GOOD | {"subject": "law"}]


def test_a_hub_that_cannot_be_reached_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unexpected(Exception):
        """Of no class that is known here."""

    def load(*_: Any, **__: Any) -> None:
        raise Unexpected("no route")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(PatError, match=r"no route; pass --data_dir with the file copa\.jsonl"):
        load_rows(TASKS["copa"], None)


GOOD = {"stem": "s", "choices": ["a", "b"], "answer": 1, "prompt": "s\nA. a\nB. b\nAnswer:"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["copa.jsonl", "no such file"]),
        ("", ["copa", "no questions"]),
        ("{", ["line 1", "JSON"]),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"answer": 2}), ["line 2", "index of the right one"]),
        (json.dumps(GOOD | {"answer": True}), ["line 1", "index of the right one"]),
        (json.dumps(GOOD | {"choices": ["a"]}), ["line 1"]),
        (json.dumps(GOOD | {"choices": ["a", ""]}), ["line 1"]),
        (json.dumps(GOOD | {"stem": None}), ["line 1", "stem"]),
        (json.dumps([1]), ["line 1"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
    ],
)
def test_what_is_wrong_with_a_file_of_questions_is_said(content: Any, words: list[str], tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "copa.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PatError) as error:
        load_rows(TASKS["copa"], tmp_path)
    assert all(word in str(error.value) for word in words)
