"""THE one place for which engines run a pruned model: by family, by what was cut, and how we know.

A cut leaves an ordinary checkpoint, but an engine may take hidden size / heads for the size of a head, so that a
smaller hidden size is refused there, or, worse, read wrongly and without an error.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from pat.report.table import Table
from pat.shape import AXES

Verdict = Literal["runs", "fails", "silently wrong", "refused", "not run here"]
"""Verdicts on an engine. Where one is refused, this package does not write the file that the engine needs."""


@dataclass(frozen=True)
class Engine:
    """An engine, and the version that a verdict is about."""

    name: str
    tested: str
    """Versions run, or where a verdict without a run comes from."""


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("transformers", "5.23.0, the contract suite"),
        Engine("vLLM", "0.32.0 on a CPU, with transformers 5.19.0"),
        Engine("llama.cpp", "xllamacpp 2026.10.11549"),
        Engine("ONNX Runtime", "1.32.0"),
        Engine("OpenVINO", "2026.4.1"),
    )
}


@dataclass(frozen=True)
class Row:
    """A verdict on one engine; the first row that fits a model is taken."""

    engine: str
    verdict: Verdict
    families: frozenset[str] = frozenset()
    """Those that it is about; empty for all."""
    axes: frozenset[str] = frozenset()
    """It is about models in which one of them is cut; empty for all."""
    why: str = ""
    remedy: str = ""
    """Advice for whom the engine does not run the cut; empty if there is none."""

    def fits(self, model_type: str, cut: Collection[str]) -> bool:
        """Tell whether the row is about a model of a family in which some axes are cut."""
        return (not self.families or model_type in self.families) and (not self.axes or bool(self.axes & set(cut)))


_HEADS = frozenset({"hidden", "heads"})
"""Axes after which the heads no longer make up the hidden size."""

_DERIVED = "it takes hidden size / heads for the size of a head"

_OTHER_AXES = "give --axes mlp or --axes layers instead"

_BY_VLLM = "start it with --model-impl transformers"
"""What has vLLM run transformers' own model, which knows the size of a head."""

_RAN = (
    "arcee ernie4_5 gemma gemma2 gemma3_text glm4 granite granitemoe internlm3 iquestcoder llama mistral "
    "mixtral olmo2 olmo3 phi3 qwen3 qwen3_moe seed_oss smollm3"
)
"""Families whose files were run in llama.cpp."""

_GRAPHS = "apertus flex_olmo gemma2 gemma3_text granitemoe ministral3 mistral olmo2 phi3 qwen3_moe"
"""Families beside Llama whose graphs were run in ONNX Runtime."""

SERVING: tuple[Row, ...] = (
    Row("transformers", "runs"),
    Row(
        "vLLM", "silently wrong", frozenset({"qwen2"}), frozenset({"hidden"}), _DERIVED, f"{_BY_VLLM}, or {_OTHER_AXES}"
    ),
    Row("vLLM", "fails", frozenset({"qwen2"}), frozenset({"heads"}), _DERIVED, f"{_BY_VLLM}, or {_OTHER_AXES}"),
    Row("vLLM", "silently wrong", frozenset({"granitemoe"}), frozenset({"hidden"}), _DERIVED, _OTHER_AXES),
    Row("vLLM", "fails", frozenset({"granitemoe"}), frozenset({"heads"}), _DERIVED, _OTHER_AXES),
    Row(
        "vLLM",
        "fails",
        frozenset({"internlm3", "iquestcoder"}),
        why="its version of transformers does not know the type",
    ),
    Row("vLLM", "fails", frozenset({"mellum"}), why="it takes num_nextn_predict_layers for a number, which is null"),
    Row("vLLM", "not run here", frozenset({"minimax_m2"}), why="its routing needs a GPU there"),
    Row(
        "vLLM",
        "runs",
        frozenset({"ministral3"}),
        why="as far as the base was trained; it leaves out llama_4_scaling_beta, which counts beyond",
    ),
    Row("vLLM", "runs", why="log-probabilities of tiny models, whole and with each axis cut"),
    Row("llama.cpp", "runs", frozenset({"qwen2"}), why="a cut hidden size is written as the architecture llama"),
    Row("llama.cpp", "fails", frozenset({"phi3", "olmo2", "olmo3"}), _HEADS, _DERIVED, _OTHER_AXES),
    Row(
        "llama.cpp",
        "runs",
        frozenset(_RAN.split()),
        why="30 greedy tokens of tiny models, whole, as cut by default, and with hidden size cut",
    ),
    Row("llama.cpp", "refused", why="`pat export` has no record of it"),
    Row("ONNX Runtime", "runs", frozenset({"llama"}), why="logits of stories260K and SmolLM2 with fewer MLP channels"),
    Row("ONNX Runtime", "runs", frozenset(_GRAPHS.split()), why="logits of tiny models, whole"),
    Row("ONNX Runtime", "not run here"),
    Row("OpenVINO", "runs", frozenset({"llama"}), why="logits of stories260K and SmolLM2 with fewer MLP channels"),
    Row("OpenVINO", "not run here"),
)


_SAID = {
    "fails": "{} cannot load a model of type {}{}, because {}",
    "silently wrong": "{} reads a model of type {}{} wrongly and without an error, because {}",
    "refused": "{} gets no file of a model of type {}{}, because {}",
}
"""Sentences before training on an engine that does not run a model, by the verdict. Each takes the name of the engine,
the type of the model, what is cut, and the reason."""


def verdicts(model_type: str, cut: Collection[str]) -> dict[str, Row]:
    """Return the row of each engine for a model of a family in which some axes are cut."""
    return {name: next(row for row in SERVING if row.engine == name and row.fits(model_type, cut)) for name in ENGINES}


def trouble(model_type: str, cut: Collection[str]) -> str | None:
    """Return one sentence on the engines that a pruned model does not run in, or wrongly; None if none is known."""
    bad = [row for row in verdicts(model_type, cut).values() if row.verdict in _SAID]
    parts = [
        _SAID[row.verdict].format(row.engine, model_type, " with this cut" if row.axes else "", row.why)
        + (f"; {row.remedy}" if row.remedy else "")
        for row in bad
    ]
    return f"{', and '.join(parts)}." if parts else None


def serving_table() -> Table:
    """Return the table for people; the first row of an engine that fits a model is the one about it."""
    named = {row.engine for row in SERVING if row.families}
    rows = [
        [
            f"{row.engine} ({ENGINES[row.engine].tested})",
            ", ".join(sorted(row.families)) or ("all others" if row.engine in named else "all"),
            ", ".join(name for name in AXES if name in row.axes) or "any",
            row.verdict,
            "; ".join(part for part in (row.why, row.remedy) if part),
        ]
        for row in SERVING
    ]
    return Table("Engines", ("engine", "families", "what is cut", "verdict", "why"), rows, num_text_columns=5)
