"""The contract of every family: what was trained is what is saved, and the base stays what it was.

Each cell (see `cells`) is one short training with a stock `Trainer`, of which every property below is asked. Run
`pytest tests/contract -k arcee` for one family, `-k "dora and streamed"` for options, with `-m ""` for all cells.
"""

from __future__ import annotations

import copy
import itertools
import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import ADAPTERS, FACTORS, OBSTACLES, Cell, contract_cells
from masked64 import in_float64, logits64
from peft import LoraConfig, PeftModel
from tiny_models import FAMILIES, WITHOUT_BIAS, shallow, tiny_tokenizer
from tiny_training import (
    Trained,
    attach,
    heard,
    largest_difference,
    logits,
    losses,
    pat_config,
    train,
    train_and_merge,
    tuner_of,
)
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from pat.checkpoint import merge as merging
from pat.checkpoint.merge import merge
from pat.families import DENSE_LAYERS, FIRST_LAYERS, LAYER_LISTS, Family, get_family
from pat.loading import keep_plain_layout
from pat.shape import AXES
from pat.surgery.residual import map_residual_stream, model_tensors
from pat.surgery.rope import legacy_rope
from pat.surgery.rotation import equalised_gain, gain_block
from pat.tuner.layer import PruningLayer
from pat.tuner.prepare import check_config

HIDDEN, KEPT = 48, 36
CHANNELS, KEPT_CHANNELS = 72, 50  # of an MLP
EXPERT_CHANNELS, KEPT_EXPERT_CHANNELS = 40, 24
GROUPS, KEPT_GROUPS = 2, 1  # of heads with one key/value head
LAYERS, KEPT_LAYERS = 3, 2
SIZES = {
    "hidden": (HIDDEN, KEPT),
    "mlp": (CHANNELS, KEPT_CHANNELS),
    "heads": (GROUPS, KEPT_GROUPS),
    "layers": (LAYERS, KEPT_LAYERS),
}
"""Sizes before and after the cut, by axis; see `Run.sizes` for experts."""
STEPS, MILESTONE = 3, 2

PARITY = 1e-4
"""Masked against dense, max |Δlogit| in float32 at logits of size one: the project's acceptance."""

SAME_FUNCTION = 1e-5
"""Two float32 evaluations of the same function whose products are ordered differently."""

EXACT = 1e-12
"""Float64 throughout at logits of size one: two layers of sums over at most 80 products."""

COMPACT_EXACT = 1e-6
"""peft keeps adapters in float32, and a DoRA magnitude is computed in it (ten times as much)."""

ALIGNMENT = 1e-6
"""The same weights at another alignment in memory (a file's mapping has one of its own): some kernels, those of the
experts among them, then sum in another order. All other families agree to the last bit."""


@dataclass
class Run:
    """A cell that has been trained."""

    cell: Cell
    folder: Path
    base_config: dict[str, Any] = field(default_factory=dict)
    """Configuration of the base model, before anything was attached."""

    @property
    def family(self) -> Family:
        return get_family(self.cell.family)

    def base(self) -> PreTrainedModel:
        """The base model; equal weights every time."""
        model = shallow(self.cell.family, tied=self.cell.tied, num_hidden_layers=self.num_layers)
        if not self.cell.quantised:
            return model
        if not (self.folder / "base").is_dir():
            model.save_pretrained(self.folder / "base")
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = AutoModelForCausalLM.from_pretrained(self.folder / "base", quantization_config=four_bits)
        keep_plain_layout(model)  # as attaching does, but the base's logits are taken before that
        return model

    @property
    def plain_config(self) -> Any:
        """Configuration of the base model, unquantised."""
        return shallow(self.cell.family, tied=self.cell.tied, num_hidden_layers=self.num_layers).config

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Fields of the `PatConfig`."""
        fields = {"rotation": self.cell.rotation} | ADAPTERS[self.cell.adapter]
        fields |= {AXES[axis].option: size for axis, (_, size) in self.sizes.items()}
        if self.cell.adapter == "bias":
            stream = map_residual_stream(self.family, model_tensors(self.base()), tied=self.cell.tied)
            linears = [linear for branch in stream.branches for linear in (*branch.readers, branch.writer)]
            fields["target_modules"] = sorted({lin.path.rpartition(".")[2] for lin in linears if lin.bias is not None})
        if self.cell.adapter == "saved":
            fields["modules_to_save"] = ["norm", "embed_tokens" if self.cell.tied else "lm_head"]
            fields["ensure_weight_tying"] = self.cell.tied
        return fields

    @property
    def num_layers(self) -> int:
        """Layers of the base model; where none are cut, two are enough for one to read what another wrote."""
        return LAYERS if self.cell.cuts("layers") else 2

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Sizes before and after the cut, by the axes that are cut."""
        experts = {"mlp": (EXPERT_CHANNELS, KEPT_EXPERT_CHANNELS)} if self.family.expert_parameters else {}
        return {axis: sizes for axis, sizes in (SIZES | experts).items() if self.cell.cuts(axis)}

    @property
    def cut(self) -> dict[str, int]:
        """Sizes that are cut, by the field of the configuration."""
        fields = {"mlp": self.family.mlp_field}
        return {fields.get(axis, AXES[axis].field): size for axis, (_, size) in self.sizes.items()}

    @property
    def kept(self) -> int:
        """Hidden size of the dense model."""
        return KEPT if self.cell.cuts("hidden") else HIDDEN

    @property
    def training(self) -> dict[str, Any]:
        """Of the resumed cells with a checkpoint at every step."""
        if self.cell.path != "resumed":
            return {"max_steps": STEPS}
        return {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1}

    @cached_property
    def trained(self) -> Trained:
        base, training = self.base(), self.training | {"output_dir": self.folder / "run"}
        self.base_config = base.config.to_dict()
        return train_and_merge(base, training=training, milestone=MILESTONE / STEPS, **self.fields)

    @cached_property
    def twin(self) -> PeftModel:
        """The trained model in float64."""
        return in_float64(self.trained.model)


# -- properties --------------------------------------------------------------------------------------------------------


def a_fresh_adapter_changes_nothing(run: Run) -> None:
    """Not even the last bit: neither the operators nor, before its calibration, the mask."""
    assert torch.equal(run.trained.fresh_logits, run.trained.base_logits)


def the_start_of_training_is_the_base(run: Run) -> None:
    trained = run.trained
    mask = trained.tuner.mask()
    if mask.basis is None:
        assert torch.equal(trained.calibrated_logits, trained.base_logits)
    elif mask.head_factor is None:
        assert largest_difference(trained.calibrated_logits, trained.base_logits) <= PARITY
    else:  # the base with the final gain equalised in the rotated block
        equalised = run.base()
        norm = equalised.get_submodule(run.family.final_norm)
        gain = norm.weight.detach() + run.family.gain_offset
        block = gain_block(gain, trained.tuner.pat_config().gain_tolerance)
        assert 0 < int(block.sum()) < HIDDEN
        norm.weight.data.copy_(equalised_gain(gain, block) - run.family.gain_offset)
        assert largest_difference(trained.calibrated_logits, logits(equalised)) <= SAME_FUNCTION


def everything_was_trained(run: Run) -> None:
    """Otherwise the parity would be that of an adapter that does nothing."""
    trained, tuner = run.trained, run.trained.tuner
    assert largest_difference(trained.masked_logits, trained.base_logits) > 0.3
    assert all(gate.weight is None or gate.weight.any() for gate in tuner.all_gates())
    assert len(tuner.operators()) == (1 + 2 * run.num_layers if run.cell.cuts("hidden") else 0)
    gates = {axis: len(found) for axis, found in tuner.gates_by_axis().items()}
    axes = [branch.axis for branch in tuner.residual_stream.branches]  # None of a dense MLP beside experts
    inner = {axis: axes.count(axis) for axis in ("mlp", "heads") if run.cell.cuts(axis)}
    assert gates == {"hidden": 1} | inner | ({"layers": 1} if run.cell.cuts("layers") else {})
    probe = torch.ones(1, HIDDEN)
    for site, operator in tuner.operators().items():
        assert operator.change(probe).any(), site
    parts = dict(trained.model.named_parameters())
    lora = [parameter for name, parameter in parts.items() if "lora_B" in name]
    assert lora and all(parameter.any() for parameter in lora)
    assert any("magnitude" in name for name in parts) == (run.cell.adapter == "dora")
    assert any("modules_to_save" in name for name in parts) == (run.cell.adapter == "saved")


def masked_and_dense_model_are_the_same(run: Run) -> None:
    assert run.trained.dense_logits.std() > 0.3  # a difference of zero between silent models would mean nothing
    assert largest_difference(run.trained.masked_logits, run.trained.dense_logits) <= PARITY


def they_agree_to_the_last_digits_in_float64(run: Run) -> None:
    if run.cell.quantised:
        return  # whose weights are numbers of four bits
    before = {name: tensor.clone() for name, tensor in run.twin.state_dict().items()}
    dense = run.twin.merge_and_unload(dtype=torch.float64)
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.float64}
    assert largest_difference(logits64(run.twin), logits64(dense)) <= EXACT
    after = run.twin.state_dict()  # the merge has left the masked model as it was
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def exactly_the_asked_for_channels_are_kept(run: Run) -> None:
    for axis, gates in run.trained.tuner.gates_by_axis().items():
        before, after = run.sizes.get(axis, (HIDDEN, HIDDEN))
        for gate in gates:
            assert gate.hardened and gate.milestone_step == gate.step == MILESTONE
            assert gate.keep.shape[-1] == gate.size == before and (gate.keep.sum(-1) == after).all()
            assert not gate.pinned[~gate.keep].any()


def what_is_lost_before_writers_is_filled_in_for(run: Run) -> None:
    for gate in run.trained.tuner.gates().values():
        dropped, kept = (gate.size - gate.num_kept) * gate.width, gate.num_kept * gate.width
        assert gate.calibrated and gate.reconstruction.shape == (*gate.keep.shape[:-1], dropped, kept)
        assert gate.reconstruction.any()


def the_automatic_rotation_is_pca_where_it_is_exact(run: Run) -> None:
    """Elsewhere there is none, but the channels are in the order of their measured importance."""
    mask = run.trained.tuner.mask()
    if not run.cell.cuts("hidden"):
        assert run.trained.tuner.pat_config().resolved_rotation == "none" and mask.basis is None
        return
    automatic = run.cell.rotation == "auto"
    norm_is_trained = run.cell.adapter == "saved" and run.cell.tied
    rotates = automatic and not run.family.has_post_norms and not norm_is_trained
    assert run.trained.tuner.pat_config().resolved_rotation == ("pca" if rotates else "none")
    assert (mask.basis is not None) == rotates
    assert mask.calibrated == automatic
    if automatic:
        assert int((mask.prior > 0).sum() + mask.pinned.sum()) == KEPT


def the_dense_model_is_the_bases_class_and_smaller(run: Run) -> None:
    base, dense = run.trained.tuner.model, run.trained.dense
    assert type(dense) is type(base)
    assert dense.config.hidden_size == run.kept
    assert run.kept % dense.config.num_attention_heads == 0
    assert dense.config.head_dim == base.model.layers[0].self_attn.head_dim
    groups = run.cut.get("num_key_value_heads", GROUPS)
    assert dense.config.num_attention_heads * GROUPS == base.config.num_attention_heads * groups
    assert dense.config.rms_norm_eps == pytest.approx(base.config.rms_norm_eps * HIDDEN / run.kept, rel=1e-12)
    after = dense.config.to_dict()
    changed = {key for key in run.base_config | after if run.base_config.get(key) != after.get(key)}
    allowed = set(run.cut) | ({"num_attention_heads"} if run.cell.cuts("heads") else set())
    allowed |= {*LAYER_LISTS, FIRST_LAYERS, DENSE_LAYERS} if run.cell.cuts("layers") else set()
    allowed |= {"hidden_size", "head_dim", "rms_norm_eps", "quantization_config", "_name_or_path"}
    assert changed - set(legacy_rope(dense.config)) <= allowed
    sizes = {"head_dim": dense.config.head_dim, "num_hidden_layers": run.num_layers}
    heads = {"num_attention_heads": dense.config.num_attention_heads} if run.cell.cuts("heads") else {}
    whole, cut = (
        shallow(run.cell.family, tied=run.cell.tied, **(sizes | changes)).num_parameters()
        for changes in ({}, run.cut | heads)
    )
    assert dense.num_parameters() == cut < 0.92 * whole
    planned = check_config(run.plain_config, run.family, pat_config(**run.fields))
    assert planned.pruning_ratio == 1 - cut / whole


def tied_stays_tied(run: Run) -> None:
    dense = run.trained.dense
    shared = dense.lm_head.weight is dense.model.embed_tokens.weight
    assert shared == run.cell.tied == dense.config.tie_word_embeddings


def the_base_is_never_modified(run: Run) -> None:
    """With the adapter switched off, exactly the base's logits; after unload(), exactly the base's parameters.

    Asked last, because the adapter is gone then.
    """
    trained = run.trained
    with trained.model.disable_adapter():
        assert torch.equal(logits(trained.model), trained.base_logits)
    assert torch.equal(logits(trained.model), trained.masked_logits)

    if run.cell.adapter == "saved":
        return  # peft's unload() leaves modules in that were trained as a whole
    unloaded = trained.model.unload()
    state = unloaded.state_dict()
    assert state.keys() == trained.base_weights.keys()
    assert all(torch.equal(state[name], value) for name, value in trained.base_weights.items())
    assert not any(isinstance(module, PruningLayer) for module in unloaded.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unloaded.modules())
    assert torch.equal(logits(unloaded), trained.base_logits)


def the_dense_folder_opens_in_stock_transformers(run: Run) -> None:
    dense, folder = run.trained.dense, run.folder / "dense"
    dense.save_pretrained(folder)
    with heard() as messages:
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert not messages
    assert type(loaded) is type(dense)
    assert loaded.config.rope_parameters == dense.config.rope_parameters
    assert all(torch.equal(dense.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())
    assert largest_difference(logits(loaded), run.trained.dense_logits) <= ALIGNMENT
    assert all(file.suffix != ".bin" for file in folder.iterdir())


# -- paths -------------------------------------------------------------------------------------------------------------


def compacted(run: Run) -> None:
    """At the compaction point the small model with its ordinary LoRA adapter is the masked model."""
    before = logits64(run.twin)
    parts = tuner_of(run.twin).compact()
    parts.base.save_pretrained(run.folder / "compact")  # as a run does; it leaves its mark on the configuration
    compact = parts.attach().model.double().eval()
    tolerance = COMPACT_EXACT * (10 if run.cell.adapter == "dora" else 1)
    assert largest_difference(before, logits64(compact)) <= tolerance
    assert torch.equal(logits64(run.twin), before)  # and the masked model is as it was
    assert largest_difference(before, logits64(copy.deepcopy(compact).merge_and_unload())) <= tolerance
    assert compact.get_base_model().config.hidden_size == run.kept
    assert type(compact.peft_config["default"]) is LoraConfig


def streamed(run: Run) -> None:
    """`pat merge` writes bit for bit what `merge_and_unload` gives, without holding either model."""
    base, adapter, out, text = (run.folder / name for name in ("base", "adapter", "out", "text"))
    text.write_text("Verified on little text. " * 4)
    run.base().save_pretrained(base)
    tiny_tokenizer(base)
    run.trained.model.save_pretrained(adapter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "load_adapted", None)  # which would hold the base in memory
        merge(adapter, out, base_model=str(base), text_file=text, fold_dtype="float64", progress=False)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    expected = model_tensors(run.trained.dense)
    for name, tensor in model_tensors(loaded).items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert loaded.config.rope_parameters == run.trained.dense.config.rope_parameters
    for name in ("config.json", "generation_config.json"):
        written, saved = (json.loads((folder / name).read_text()) for folder in (out, run.folder / "dense"))
        # For transformers 4 alone; `save_pretrained` does not write it.
        for name in {"rope_scaling", *loaded.config.attribute_map} - saved.keys():
            written.pop(name, None)
        assert written == saved


def resumed(run: Run) -> None:
    """A run that goes on from a checkpoint is, to the last bit, the one that was never interrupted."""
    step = 1 + zlib.crc32(str(run.cell).encode()) % (STEPS - 1)  # before the milestone, or at it
    torch.manual_seed(1000 + step)  # neither the adapter's new initial values nor the random state may matter
    model = attach(run.base(), milestone=MILESTONE / STEPS, **run.fields)
    checkpoint = run.folder / "run" / f"checkpoint-{step}"
    trainer = train(model, resume_from=checkpoint, output_dir=run.folder / "resumed", **run.training)
    assert losses(trainer) == losses(run.trained.trainer)
    assert torch.equal(logits(model), run.trained.masked_logits)


def reloaded(run: Run) -> None:
    """A saved adapter on the same base is the same model, masked and merged."""
    run.trained.model.save_pretrained(run.folder / "adapter")
    model: nn.Module = PeftModel.from_pretrained(run.base(), run.folder / "adapter")
    assert torch.equal(logits(model), run.trained.masked_logits)
    assert torch.equal(logits(model.merge_and_unload()), run.trained.dense_logits)


PROPERTIES: tuple[Callable[[Run], None], ...] = (
    a_fresh_adapter_changes_nothing,
    the_start_of_training_is_the_base,
    everything_was_trained,
    masked_and_dense_model_are_the_same,
    they_agree_to_the_last_digits_in_float64,
    exactly_the_asked_for_channels_are_kept,
    what_is_lost_before_writers_is_filled_in_for,
    the_automatic_rotation_is_pca_where_it_is_exact,
    the_dense_model_is_the_bases_class_and_smaller,
    tied_stays_tied,
    the_dense_folder_opens_in_stock_transformers,
)
PATHS: dict[str, Callable[[Run], None]] = {
    "compacted": compacted,
    "streamed": streamed,
    "resumed": resumed,
    "reloaded": reloaded,
}

FEW, MORE = contract_cells()


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=str(cell)) for cell in FEW]
    + [pytest.param(cell, id=str(cell), marks=pytest.mark.slow) for cell in MORE],
)
def test_contract(cell: Cell, tmp_path: Path) -> None:
    run = Run(cell, tmp_path)
    for check in (*PROPERTIES, PATHS[cell.path], the_base_is_never_modified):
        check(run)


def test_every_pair_of_options_occurs() -> None:
    """Except for those that the method refuses, or that do not exist."""
    cells = [asdict(cell) for cell in FEW + MORE]
    for first, second in itertools.combinations(FACTORS, 2):
        seen = {(cell[first], cell[second]) for cell in cells}
        absent = set(itertools.product(FACTORS[first], FACTORS[second])) - seen
        assert absent <= {
            ("4bit", "compacted"),
            ("4bit", "streamed"),
            *(("dense", axes) for axes in FACTORS["axes"] if "hidden" not in axes),
            *((family, "bias") for family in WITHOUT_BIAS),
            *(
                (family, axes)
                for family in FAMILIES
                for axes in FACTORS["axes"]
                if OBSTACLES[family] & {*axes.split("+")}
            ),
        }
    for cell in ("tied-auto", "untied-none"):
        assert {c.family for c in FEW if c.form == cell} == set(FAMILIES)
