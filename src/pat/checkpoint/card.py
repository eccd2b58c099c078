"""The README.md of a checkpoint: what was cut from which model, how, and how exact the result is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from pat.checkpoint.verify import Parity
from pat.report.records import environment

PROVENANCE = (
    "model_name_or_path", "dataset", "prompt_format", "recipe", "seed", "num_steps", "num_tokens_seen", "max_length",
    "learning_rates", "held_out_nll", "held_out_standard_error", "num_held_out_tokens", "limits",
)  # fmt: skip
"""What a card can tell of a run, under these names, as `results.json` has them: base model and data (only the last
component of a path is shown), the form of the prompts in words, numbers, the learning rate of each group of parameters,
held-out losses with their standard errors by model, and sentences about what the model is not for."""


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What was cut from a base model, and how it was chosen."""

    hidden_size: int
    pruned_hidden_size: int
    num_parameters_base: int
    rotation: str
    mask: str
    milestone_step: int | None


@dataclass(frozen=True, kw_only=True)
class Cut(Pruning):
    """What was cut, for a dense checkpoint."""

    num_parameters: int
    num_bytes: int
    """Size of the checkpoint's weight files."""

    @classmethod
    def of(cls, pruning: Pruning, *, num_parameters: int, num_bytes: int) -> Cut:
        """Return it for a dense checkpoint of these sizes."""
        facts = {field.name: getattr(pruning, field.name) for field in fields(Pruning)}
        return cls(**facts, num_parameters=num_parameters, num_bytes=num_bytes)

    @property
    def parameter_ratio(self) -> float:
        """Parameters after the cut as a share of those before."""
        return self.num_parameters / self.num_parameters_base


@dataclass(frozen=True, kw_only=True)
class Compaction(Pruning):
    """What was cut at the milestone, where training went on with the small model."""

    base_model: str
    """Name of the model that was cut, as it may be shown."""
    parity: dict[str, Any]
    """Figures of the masked model against its compact form, see `Parity`."""


def shown_name(name: str) -> str:
    """Return a hub id as it is, and of a path the last component only: a card tells nobody's folders."""
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".") and not Path(name).exists()
    return name if is_hub_id else re.split(r"[/\\]", name.rstrip("/\\"))[-1] or "local"


def base_license(base_model: str) -> dict[str, str]:
    """Return the licence fields of the base model's card, if it lies on this machine; empty otherwise."""
    folder = Path(base_model)
    cached = folder / "README.md" if folder.is_dir() else _cached_card(base_model)
    if cached is None or not cached.is_file():
        return {}
    try:
        data = ModelCard.load(cached, ignore_metadata_errors=True).data
    except (ValueError, OSError, yaml.YAMLError):  # a card that is broken is as good as none
        return {}
    found = {key: getattr(data, key, None) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def render_card(cut: Cut, parity: Parity, provenance: Mapping[str, Any]) -> str:
    """Render a model card in Markdown with YAML front matter.

    Args:
        cut: what was cut.
        parity: the comparison with the tuned model.
        provenance: what is known beyond that; see `PROVENANCE` for the keys, all of them optional.
    """
    base_model = str(provenance.get("model_name_or_path") or "unknown")
    base = shown_name(base_model)
    license_fields: dict[str, Any] = base_license(base_model)
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "pruning-aware-tuning", "pat-llm"],
        **license_fields,
    )
    percent = 100 * (1 - cut.parameter_ratio)
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {base}, hidden size {cut.pruned_hidden_size}",
        f"A smaller dense version of `{base}`: tuned and pruned in one run with Pruning-Aware Tuning, then merged into "
        f"a standard checkpoint with {percent:.1f} % fewer parameters.",
        "## Use",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
        "```",
        "## What was cut",
        _table(("", "base", "this model"), _sizes(cut)),
        "## How",
        _bullets(_method(cut, provenance)),
        "## Is it the model that was tuned?",
        f"This checkpoint was read back from disk and compared with the tuned model on {parity.num_tokens:,} tokens "
        f"of text, in {parity.dtype}:",
        _table(("figure", "value"), _parity(parity)),
    ]
    held_out_nll: Mapping[str, float] = provenance.get("held_out_nll") or {}
    if held_out_nll:
        errors: Mapping[str, float] = provenance.get("held_out_standard_error") or {}
        rows = [
            (name, f"{nll:.3f}" + (f" ± {errors[name]:.3f}" if name in errors else ""))
            for name, nll in held_out_nll.items()
        ]
        num_tokens = provenance.get("num_held_out_tokens")
        on = "" if num_tokens is None else f", on {num_tokens:,} tokens"
        sections += ["## Held-out loss", _table(("model", f"nats per response token{on}"), rows)]
    sections += [
        "## Limits",
        _bullets(_limits(provenance)),
        "## Method",
        'Liu et al., "PAT: Pruning-Aware Tuning for Large Language Models", AAAI 2025, '
        "[arXiv:2408.14721](https://arxiv.org/abs/2408.14721).",
    ]
    return "\n\n".join(sections) + "\n"


def _sizes(cut: Cut) -> list[tuple[str, ...]]:
    return [
        (
            "hidden size",
            f"{cut.hidden_size:,}",
            f"{cut.pruned_hidden_size:,} (−{100 * (1 - cut.pruned_hidden_size / cut.hidden_size):.1f} %)",
        ),
        (
            "parameters",
            f"{cut.num_parameters_base:,}",
            f"{cut.num_parameters:,} (−{100 * (1 - cut.parameter_ratio):.1f} %)",
        ),
        ("weight files", "", f"{cut.num_bytes / 1e6:,.1f} MB"),
    ]


def _limits(provenance: Mapping[str, Any]) -> list[str]:
    prompts = provenance.get("prompt_format")
    return [
        "What the base model gets wrong, this one may get wrong as well; and it has lost some of what the base knew.",
        *([] if prompts is None else [f"It was tuned on prompts of one form: {prompts}."]),
        *(
            []
            if not provenance.get("max_length")
            else [f"No text it was tuned on was longer than {provenance['max_length']:,} tokens."]
        ),
        *map(str, provenance.get("limits") or ()),
    ]


def _method(cut: Cut, provenance: Mapping[str, Any]) -> list[str]:
    rates: Mapping[str, float] = provenance.get("learning_rates") or {}
    num_tokens = provenance.get("num_tokens_seen")
    facts = {
        "recipe": provenance.get("recipe"),
        "data": shown_name(str(provenance["dataset"])) if provenance.get("dataset") else None,
        "prompt format": provenance.get("prompt_format"),
        "optimizer steps": provenance.get("num_steps"),
        "tokens seen": None if num_tokens is None else f"{num_tokens:,}",
        "learning rates": ", ".join(f"{name} {rate:g}" for name, rate in rates.items()) or None,
        "seed": provenance.get("seed"),
        "mask": cut.mask,
        "milestone": None if cut.milestone_step is None else f"the mask is 0/1 from step {cut.milestone_step:,} on",
        "rotation of the residual stream": cut.rotation,
        "versions": ", ".join(f"{name} {version}" for name, version in environment()["versions"].items()),
    }
    return [f"{name}: {fact}" for name, fact in facts.items() if fact is not None]


def _parity(parity: Parity) -> list[tuple[str, ...]]:
    floor = parity.permutation_floor
    return [
        ("largest difference of a logit", f"{parity.max_abs_logit_diff:.2e}"),
        *([] if floor is None else [("what permuting the channels alone makes of it", f"{floor:.2e}")]),
        ("their standard deviation", f"{parity.logit_std:.2f}"),
        ("mean KL divergence (nats per token)", f"{parity.mean_kl:.2e}"),
        ("same most likely next token", f"{100 * parity.top1_agreement:.2f} %"),
    ]


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows))


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cached_card(repo_id: str) -> Path | None:
    try:
        found = try_to_load_from_cache(repo_id, "README.md")
    except ValueError:  # not a hub id
        return None
    return Path(found) if isinstance(found, str) else None
