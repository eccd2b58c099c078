"""The table of engines: one row for each model, and a sentence where one does not run it."""

import json
import subprocess
import sys
from pathlib import Path

from pat.families import FAMILIES
from pat.file_sizes.gguf_families import GGUF_FAMILIES
from pat.serving import ENGINES, SERVING, serving_table, trouble, verdicts
from pat.shape import AXES

ROOT = Path(__file__).resolve().parents[2]


def test_every_model_has_a_verdict_of_every_engine() -> None:
    for family in FAMILIES:
        for axis in AXES:
            assert set(verdicts(family, [axis])) == set(ENGINES)


def test_rows_are_about_families_and_axes_that_there_are() -> None:
    for row in SERVING:
        assert row.families <= set(FAMILIES) and row.axes <= set(AXES) and row.engine in ENGINES
        assert row.why or row.verdict in ("runs", "not run here")


def test_trouble_is_told_where_the_heads_no_longer_make_up_the_hidden_size() -> None:
    assert trouble("qwen2", ["mlp"]) is None and trouble("llama", ["hidden", "mlp"]) is None
    assert trouble("qwen2", ["hidden"]) == (
        "vLLM reads a model of type qwen2 with this cut wrongly and without an error, because it takes hidden size / "
        "heads for the size of a head; start it with --model-impl transformers, or give --axes mlp or --axes layers "
        "instead."
    )
    assert "vLLM cannot load a model of type qwen2 with this cut" in (trouble("qwen2", ["heads", "mlp"]) or "")
    assert "llama.cpp cannot load a model of type olmo2" in (trouble("olmo2", ["hidden", "layers"]) or "")


def test_a_type_that_an_engine_does_not_know_is_told_whatever_is_cut() -> None:
    assert trouble("internlm3", ["mlp"]) == (
        "vLLM cannot load a model of type internlm3, because its version of transformers does not know the type."
    )


def test_a_family_of_which_no_file_is_written_is_told_before_training() -> None:
    refused = {family for family in FAMILIES if verdicts(family, ["mlp"])["llama.cpp"].verdict == "refused"}
    assert refused == set(FAMILIES) - set(GGUF_FAMILIES)
    for family in refused:
        assert f"llama.cpp gets no file of a model of type {family}, because `pat export`" in (
            trouble(family, ["mlp"]) or ""
        )


def test_what_vllm_came_to_is_what_the_record_says() -> None:
    cells = json.loads((ROOT / "benchmarks" / "results" / "serving_vllm.json").read_text(encoding="utf-8"))["cells"]
    for family in FAMILIES:
        for cut in ("default", *(axis for axis in AXES if axis != "mlp")):  # the default cuts MLPs
            came_to = cells[f"{family}, {cut}"]["verdict"]
            said = verdicts(family, ["mlp" if cut == "default" else cut])["vLLM"].verdict
            assert said == came_to or said == "not run here" or came_to == "refused by pat", (family, cut)
    assert sum(cell["verdict"] == "runs" for cell in cells.values()) > 100


def test_what_llama_cpp_ran_is_what_can_be_written_for_it() -> None:
    ran = {name for row in SERVING if row.engine == "llama.cpp" for name in row.families}
    assert ran == set(GGUF_FAMILIES)


def test_the_documentation_has_the_table() -> None:
    page = ROOT / "docs" / "export.md"
    assert serving_table().to_markdown() in page.read_text(encoding="utf-8")


def test_the_comparison_with_vllm_explains_itself_where_nothing_is_installed() -> None:
    """Nor vLLM: `-S` leaves the standard library. What it cannot do without is said before models are made."""
    script = [sys.executable, "-I", "-S", str(ROOT / "benchmarks" / "serving_vllm.py")]
    page = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "A clean run needs" in page and "--vllm_python" in page
    refused = subprocess.run([*script, "--output", "out.json"], capture_output=True, text=True)
    assert refused.returncode == 2 and "--vllm_python and --output are needed" in refused.stderr
