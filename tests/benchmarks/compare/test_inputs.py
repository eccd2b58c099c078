"""Digests of what a comparison's figures come from."""

from pathlib import Path

from compare.inputs import digest_questions


def test_the_fingerprint_is_that_of_the_questions_that_are_asked(tests_data: Path, tmp_path: Path) -> None:
    text = (tests_data / "tasks" / "copa.jsonl").read_text()
    (tmp_path / "copa.jsonl").write_text(text)
    same = digest_questions("copa", tests_data / "tasks", None)
    assert digest_questions("copa", tmp_path, None) == digest_questions("copa", tmp_path, 99) == same
    (tmp_path / "copa.jsonl").write_text(text.replace('"answer": 0', '"answer": 1', 1))
    assert len({same, digest_questions("copa", tmp_path, None), digest_questions("copa", tmp_path, 3)}) == 3
