"""The README.md of a checkpoint: what was cut from which model, how, and how exact the result is."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from pat.checkpoint.verify import Parity
from pat.report import numbers
from pat.report.records import environment
from pat.report.usage import LOAD, ways_to_ask
from pat.shape import AXES

UNKNOWN = "unknown"
"""Name of a base of which none is known."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""An id as the field `base_model` of a card has it: the hub wants the owner, too."""


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """The cut that was made in a base model, and how its channels were chosen.

    Every size stands before and after the cut, and both are equal where nothing is cut. Records of older versions have
    null for an axis that they left alone.
    """

    hidden_size: int
    pruned_hidden_size: int
    intermediate_size: int | None = None
    """Number of MLP channels of the base, for each expert where it has several."""
    pruned_intermediate_size: int | None = None
    num_key_value_heads: int | None = None
    pruned_num_key_value_heads: int | None = None
    num_hidden_layers: int | None = None
    pruned_num_hidden_layers: int | None = None
    vocab_size: int | None = None
    pruned_vocab_size: int | None = None
    num_parameters_base: int
    rotation: str
    mask: str
    milestone_step: int | None

    def describe(self) -> str:
        """Say what was cut."""
        return ", ".join(f"{name} {before} to {after}" for name, before, after in self.sizes)

    @property
    def trims_vocabulary(self) -> bool:
        """Whether the small model has fewer tokens than its base."""
        before, after = self.vocab_size, self.pruned_vocab_size
        return before is not None and after is not None and after < before

    @property
    def sizes(self) -> list[tuple[str, int, int]]:
        """Names of what is cut, with the sizes before and after."""
        cuts = [(axis.label, getattr(self, axis.field), getattr(self, axis.option)) for axis in AXES.values()]
        cuts.append(("vocabulary", self.vocab_size, self.pruned_vocab_size))
        return [(label, before, after) for label, before, after in cuts if before is not None and after < before]

    @property
    def axes(self) -> list[str]:
        """Names of the axes that are cut, see `pat.shape.AXES`."""
        sizes = {axis.name: (getattr(self, axis.field), getattr(self, axis.option)) for axis in AXES.values()}
        return [name for name, (before, after) in sizes.items() if before is not None and after < before]


@dataclass(frozen=True, kw_only=True)
class Cut(Pruning):
    """The cut that a dense checkpoint comes from, and the size of the checkpoint."""

    num_parameters: int
    num_bytes: int
    """Size of the checkpoint's weights."""
    file_bytes: int | None = None
    """Size of the files that hold them, which have headers as well; None in records of older versions."""

    @classmethod
    def of(cls, pruning: Pruning, *, num_parameters: int, num_bytes: int, file_bytes: int) -> Cut:
        """Return it for a dense checkpoint of these sizes."""
        facts = {field.name: getattr(pruning, field.name) for field in fields(Pruning)}
        return cls(**facts, num_parameters=num_parameters, num_bytes=num_bytes, file_bytes=file_bytes)

    @property
    def parameter_ratio(self) -> float:
        """Parameters after the cut as a share of those before."""
        return self.num_parameters / self.num_parameters_base


@dataclass(frozen=True, kw_only=True)
class Compaction(Pruning):
    """The cut that was made at the milestone, from where training went on with the small model."""

    base_model: str
    """Name of the model that was cut, as it may be shown."""
    parity: dict[str, Any]
    """Figures of the masked model against its compact form, see `Parity`."""
    fingerprint: str | None = None
    """Fingerprint of the small model, which its adapters are for; None in records of older versions."""


def shown_name(name: str) -> str:
    """Return a hub id as it is, and of a path the last component only: a card tells nobody's folders."""
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".") and not os.path.exists(name)
    return name if is_hub_id else re.split(r"[/\\]", name.rstrip("/\\"))[-1] or "local"


def as_markdown(text: str) -> str:
    """Return a text as one line that is nothing but text in Markdown: names of files and records may be anybody's."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return html.escape(" ".join(line.split()), quote=False).replace("`", "'").replace("|", "\\|").replace("[", "\\[")


def base_license(base_model: str, revision: str | None = None) -> dict[str, str]:
    """Return the licence fields of the base model's card, if it lies on this machine; empty otherwise."""
    data = _base_card(base_model, revision)
    found = {key: getattr(data, key, None) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def hub_id(base_model: str) -> str | None:
    """Return the id that the hub knows a base by; None where neither its name nor its place in the hub's cache tells.

    The card in a local folder does not: it names what the model there was made of, which is another model.
    """
    if not os.path.exists(base_model):
        return base_model if _HUB_ID.fullmatch(base_model) else None
    for part in Path(os.path.abspath(base_model)).parts:  # of the hub's own cache
        if part.startswith("models--") and part.count("--") == 2:
            return "/".join(part.split("--")[1:])
    return None


def _named_in_card(base_model: str) -> str | None:
    """Return the id that a local folder's card gives for what its model was made of."""
    named = getattr(_base_card(base_model, None), "base_model", None) if os.path.exists(base_model) else None
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    return named if isinstance(named, str) and _HUB_ID.fullmatch(named) else None


def _base_card(base_model: str, revision: str | None) -> ModelCardData | None:
    folder = Path(base_model)
    cached = folder / "README.md" if folder.is_dir() else _cached_card(base_model, revision)
    if cached is None or not cached.is_file():
        return None
    try:
        data: ModelCardData = ModelCard.load(cached, ignore_metadata_errors=True).data
    except (ValueError, OSError, yaml.YAMLError):  # a card that is broken is as good as none
        return None
    return data


def render_card(cut: Cut, parity: Parity, provenance: Mapping[str, Any]) -> str:
    """Render a model card in Markdown with YAML front matter.

    Args:
        cut: what was cut.
        parity: the comparison with the tuned model.
        provenance: what is known beyond that, all of it optional: `model_name_or_path` and its `revision`, `dataset`
            (only the last component of a path is shown), `prompt_format` in words, `recipe`, `seed`, `num_steps`,
            `num_tokens_seen`, `max_length`, `learning_rates` by group of parameters, `teacher`, `held_out_nll`,
            `held_out_standard_error` and `held_out_difference_error` (of the difference to the base, over the same
            rows) by model, `num_held_out_tokens`, `general_nll` by model, `base_bytes` (of the base's weights),
            `flops_per_token` of `base` and `dense`, `is_compacted` (the small model was trained on), and a sentence on
            `engines` that do not run it.
    """
    base_model = str(provenance.get("model_name_or_path") or UNKNOWN)
    license_fields: dict[str, Any] = base_license(base_model, provenance.get("revision"))
    named = hub_id(base_model)
    data = ModelCardData(
        base_model=named,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "pruning-aware-tuning", "pat-llm"],
        **license_fields,
    )
    rates: Mapping[str, float] = provenance.get("learning_rates") or {}
    dataset = provenance.get("dataset")
    card = ModelCard.from_template(
        data,
        template_str=resources.files("pat.checkpoint").joinpath("card.md.jinja").read_text(encoding="utf-8"),
        base=as_markdown(shown_name(base_model)),
        origin=_origin(base_model, named) if base_model not in (named, UNKNOWN) else None,
        cut=cut,
        parity=parity,
        run={name: as_markdown(value) if isinstance(value, str) else value for name, value in provenance.items()},
        data=as_markdown(shown_name(str(dataset))) if dataset else None,
        rates=", ".join(f"{as_markdown(name)} {rate:g}" for name, rate in rates.items()) or None,
        versions=", ".join(f"{name} {version}" for name, version in environment()["versions"].items()),
        load=LOAD.format(folder='"path/to/this/folder"'),
        ways=ways_to_ask(provenance.get("prompt_format")),
        # Without the base's files its number format is taken to be that of this model.
        base_bytes=provenance.get("base_bytes") or cut.num_bytes / cut.parameter_ratio,
        differences=_differences(provenance),
        flops=_flops(provenance),
        megabytes=numbers.size,
        loss=numbers.loss,
        deviation=numbers.deviation,
        number=lambda value: f"{value:,}" if isinstance(value, int) else None,
        percent=lambda share: f"{100 * (1 - share):.1f}",
    )
    return str(card)


def _flops(provenance: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the FLOPs of a token of base and small model in words; None where those of the small one are not known."""
    of = provenance.get("flops_per_token") or {}
    base, dense = of.get("base"), of.get("dense")
    if dense is None:
        return None
    fewer = f" ({numbers.change(base, dense)})" if base else ""
    return numbers.flops(base), f"{numbers.flops(dense)}{fewer}"


def _origin(base_model: str, named: str | None) -> str:
    """Say what a base is that was not named by an id of the hub."""
    name = f"`{as_markdown(shown_name(base_model))}`"
    if named is not None:
        return f"{name} was a folder of the Hub's cache, of `{named}`."
    made_of = _named_in_card(base_model)
    beside = f" Its own card says that it was made of `{made_of}`." if made_of else ""
    return (
        f"{name} names no model of the Hub (owner/name), so the metadata of this card have no `base_model`; add it if "
        f"you publish this model.{beside}"
    )


def _differences(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return how far the held-out loss of each model is from the base's, in words."""
    losses: Mapping[str, float] = provenance.get("held_out_nll") or {}
    errors: Mapping[str, float] = provenance.get("held_out_difference_error") or {}
    base = losses.get("base")
    return {
        name: numbers.MISSING if base is None or name == "base" else numbers.difference(nll - base, errors.get(name))
        for name, nll in losses.items()
    }


def _cached_card(repo_id: str, revision: str | None) -> Path | None:
    try:
        found = try_to_load_from_cache(repo_id, "README.md", revision=revision)
    except ValueError:  # not a hub id
        return None
    return Path(found) if isinstance(found, str) else None
