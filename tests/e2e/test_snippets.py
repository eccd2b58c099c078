"""What README and docs show runs as it stands, on a small model and with fewer steps."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from snippets import Snippet, snippets

from pat.cli import main
from pat.data.formats import ALPACA

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = {page.name: snippets(page) for page in PAGES}
NUM_NOT_RUN = 7

FEWER = {
    "tune": ["--max_steps", "2", "--held_out", "2", "--use_cpu", "true", "--bf16", "false", "--dtype", "float32"],
    "benchmark": [
        "--contexts",
        "16",
        "--batch_sizes",
        "1",
        "--new_tokens",
        "4",
        "--repetitions",
        "1",
        "--max_seconds",
        "5",
    ],
}
"""Flags that are added to a command."""

FEWER_STEPS = ('SFTConfig("checkpoints"', 'SFTConfig("checkpoints", max_steps=4, use_cpu=True, bf16=False')
"""The same in a script of one's own."""


def furnish(place: Path, base: Path, prompt: str = "prompt", response: str = "completion") -> None:
    """Put what the pages name into a working folder: the base, and data with these columns."""
    for name in ("BASE", "HuggingFaceTB/SmolLM2-135M-Instruct", "path/to/base"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(base)
    rows = [{prompt: f"say {i} ", response: f"it is {i * i}"} for i in range(24)]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (place / "text.txt").write_text("Once upon a time there was a small cat. " * 20, encoding="utf-8")


@pytest.fixture(scope="module")
def tuned(stories260k_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    place = tmp_path_factory.mktemp("tuned")
    furnish(place, stories260k_path, "instruction", "output")  # a model that can be asked through a chat template
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (command,) = (argv for snippet in SNIPPETS["index.md"] for argv in snippet.commands())
        assert main([*command, *FEWER["tune"]]) == 0
    return place / "out"


def test_the_words_of_alpaca_are_shown_as_they_are_trained_on() -> None:
    shown = (ROOT / "docs" / "tune.md").read_text(encoding="utf-8")
    assert f"```text\n{ALPACA.format(instruction='Add 1 and 2.')}```" in shown


@pytest.mark.parametrize("name", [name for name, found in SNIPPETS.items() if any(s.reason is None for s in found)])
def test_a_page_runs(
    name: str, tuned: Path, stories260k_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnish(tmp_path, stories260k_path)
    monkeypatch.chdir(tmp_path)
    to_run = [snippet for snippet in SNIPPETS[name] if snippet.reason is None]
    if not any(argv[0] == "tune" for snippet in to_run for argv in snippet.commands()):
        shutil.copytree(tuned, tmp_path / "out")
    for snippet in to_run:
        run(snippet)
    if name == "README.md":
        assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "small" / "model.safetensors").is_file()


def run(snippet: Snippet) -> None:
    if snippet.language == "python":
        exec(snippet.text.replace(*FEWER_STEPS), {"__name__": "page"})  # our own page
        return
    for argv in snippet.commands():
        assert main([*argv, *FEWER.get(argv[0], [])]) == 0, argv


def test_what_is_not_run_is_marked_and_counted() -> None:
    marked = [snippet for found in SNIPPETS.values() for snippet in found if snippet.reason is not None]
    assert len(marked) == NUM_NOT_RUN and all(len(str(snippet.reason)) > 20 for snippet in marked)
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(re.findall(r"<!-- not run", shown)) == NUM_NOT_RUN, "a mark stands in the line before its block"
    lines = [line for found in SNIPPETS.values() for s in found if not s.reason for line in s.shell_lines()]
    assert {line.split()[0] for line in lines} <= {"pat", "make", "pip"}, "no test runs another program"


TOLD = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.py")]
"""Files that tell people to call make, or to install an extra."""

MAKE = re.compile(r"`make ([^`]+)`|^make (.+)$", re.MULTILINE)
EXTRAS = re.compile(r"(?:pat-llm|\.)\[([\w,]+)\]|extra `(\w+)`")


def told(pattern: re.Pattern[str]) -> set[str]:
    """Return what the first group that has matched holds, wherever the pattern is found."""
    texts = (path.read_text(encoding="utf-8") for path in TOLD)
    return {next(filter(None, found.groups())) for text in texts for found in pattern.finditer(text)}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_knows_the_targets_and_variables_that_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
    targets = set()
    for target, *given in (shlex.split(line, comments=True) for line in told(MAKE)):
        targets.add(target)
        settings = dict(word.split("=", 1) for word in given)
        assert settings.keys() <= variables, (target, given)
        if "CONFIG" in settings and settings["CONFIG"] != "mine.yaml":  # a file of the reader's
            ready_made = ROOT / "benchmarks" / "compare" / "configs" / f"{settings['CONFIG']}.yaml"
            assert ready_made.is_file() or (ROOT / settings["CONFIG"]).is_file(), given
    assert {"demo", "test", "lint", "compare"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)  # prints, does nothing
        assert done.returncode == 0, done.stderr


def test_pip_knows_the_extras_that_are_named() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {name for names in told(EXTRAS) for name in names.split(",")}
    assert {"export", "quantization", "ui"} <= named <= extras.keys()
    files = told(re.compile(r"pip install -c (\S+)"))
    assert files and all((ROOT / name).is_file() for name in files)
