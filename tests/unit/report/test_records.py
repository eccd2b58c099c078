"""Records: JSON that every reader understands, warnings collected on the way, and schemas that fit."""

import enum
import json
import logging
import platform
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from pat.cli import COMMANDS
from pat.errors import RunFailed
from pat.report.records import Record, collected_warnings, processor_name, write_record

SCHEMAS = Path(__file__).resolve().parents[3] / "docs" / "schemas"


class Kind(enum.Enum):
    ONE = "one"


@dataclass(frozen=True, kw_only=True)
class Outcome(Record):
    command: str = "test"
    folder: Path
    figures: dict[str, float]
    kinds: tuple[Kind, ...]


def test_a_record_is_written_with_where_it_comes_from_and_without_what_json_has_not(tmp_path: Path) -> None:
    figures = {"a": 1.5, "b": float("nan"), "c": float("inf")}
    write_record(tmp_path / "x" / "r.json", Outcome(folder=Path("a/b"), figures=figures, kinds=(Kind.ONE,)))
    written = json.loads((tmp_path / "x" / "r.json").read_text())
    assert list(written)[:5] == ["command", "schema_version", "versions", "machine", "warnings"]
    assert written["figures"] == {"a": 1.5, "b": None, "c": None}
    assert written["folder"] == "a/b" and written["kinds"] == ["one"]
    assert {"pat-llm", "torch", "python"} <= set(written["versions"])


def test_a_record_that_cannot_be_written_leaves_the_earlier_one_and_a_link_stays_a_link(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    file, link = tmp_path / "r.json", tmp_path / "link.json"
    link.symlink_to(file)
    write_record(link, {"a": 1})
    assert link.is_symlink() and json.loads(file.read_text()) == {"a": 1}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(RunFailed, match=r"link.json: could not be written"):
            write_record(link, {"a": "b" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads(file.read_text()) == {"a": 1} and sorted(tmp_path.iterdir()) == [link, file]


def test_warnings_of_ours_are_collected_and_still_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
    with collected_warnings() as said:
        logging.getLogger("pat.training.callbacks.callback").warning("%d rows are lost.", 3)
        logging.getLogger("elsewhere").warning("Not ours.")
    logging.getLogger("pat").warning("Too late.")
    assert said == ["3 rows are lost."]
    assert capsys.readouterr().err.splitlines() == ["3 rows are lost.", "Not ours.", "Too late."]


def test_the_published_schemas_are_those_of_the_records() -> None:
    """`python docs/schemas/write.py` writes them anew."""
    spec = spec_from_file_location("write_schemas", SCHEMAS / "write.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := module_from_spec(spec))
    assert {path.stem for path in SCHEMAS.glob("*.json")} == set(COMMANDS)
    for name, schema in module.schemas().items():
        assert json.loads((SCHEMAS / f"{name}.json").read_text()) == schema, name


def test_the_processor_is_named_by_linux_or_by_its_architecture(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert processor_name(file) == (platform.processor() or platform.machine())
    file.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel\t\t: 1\n")
    assert processor_name(file) == "Some CPU @ 2 GHz"
