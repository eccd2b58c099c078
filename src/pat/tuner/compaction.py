"""Compaction: a hard masked model becomes a small model with an ordinary LoRA adapter, to be trained on.

Both are the same function to rounding (docs/adr/0008). For a writer with LoRA (A, B, scale k) and a low-rank
operator D = I + L1 diag(v) L0, on the kept channels K:

    z[K] = W[K] x + k B[K] A x + (L1 diag(v))[K] (L0 W + k L0 B A) x

so the small model has the frozen weight W[K] and one adapter of more rank. The scale stays k here, so that what was
LoRA before goes on moving at the speed it had; the operator's share of A is divided by it, so that this share moves as
with a scale of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from pat.errors import PatError
from pat.loading import seeded
from pat.method.operator import LowRankOperator
from pat.surgery.adapted import AdaptedMatrix
from pat.surgery.dense import build_dense
from pat.surgery.fold import Channels, Operator, cut_writer_rows
from pat.surgery.precision import to_float64
from pat.surgery.residual import Linear, ResidualBranch
from pat.tuner.compact_config import NAMES_OF_EXPERTS, compact_lora_config, means_other_modules, staying
from pat.tuner.config import PatConfig
from pat.tuner.merging import MaskedModel, in_double
from pat.tuner.weights import base_parameter


@dataclass(frozen=True)
class Inherited:
    """A parameter of the compact model that is one of the masked model's, cut by a selection at most."""

    parameter: nn.Parameter
    cut: Callable[[Tensor], Tensor]
    """Cuts a tensor that has the shape of the old parameter (an optimizer's moment)."""


@dataclass(frozen=True)
class Factors:
    """One module's LoRA factors in the small model: A `(r, in)`, B `(out, r)` and the scale k of B A."""

    a: Tensor
    b: Tensor
    scale: float
    # What the optimizer may carry over: what a factor was, if it is it still, cut by index at most.
    a_was: Inherited | None = None
    b_was: Inherited | None = None


@dataclass(frozen=True)
class CompactModel:
    """The small model with its LoRA adapter, and which of its trainable parameters continue one of before."""

    model: PeftModel
    inherited: dict[nn.Parameter, Inherited]


@dataclass(frozen=True)
class Compacted:
    """The two parts of a compact model: a small base model as any other, and LoRA for it."""

    base: PreTrainedModel
    config: LoraConfig
    factors: dict[str, Factors]
    """Factors of LoRA by module path, as the small model has it; LoRA on other modules starts anew."""
    adapter: str

    @torch.no_grad()
    def attach(self, seed: int = 0) -> CompactModel:
        """Put LoRA on the base, in place, and give it the factors; what starts anew is drawn from `seed`.

        The global random state is left alone, so that a run that is resumed here finds the same values.
        """
        with seeded(seed, self.base):
            model = cast(PeftModel, get_peft_model(self.base, self.config, adapter_name=self.adapter))
        inherited: dict[nn.Parameter, Inherited] = {}
        for path, given in self.factors.items():
            layer = cast(LoraLayer, self.base.get_submodule(path))
            for factor, value, was in (
                (layer.lora_A[self.adapter].weight, given.a, given.a_was),
                (layer.lora_B[self.adapter].weight, given.b, given.b_was),
            ):
                parameter = cast(nn.Parameter, factor)
                parameter.copy_(value)
                if was is not None:
                    inherited[parameter] = was
        return CompactModel(model, inherited)


def check_compactable(config: PatConfig) -> None:
    """Check that an adapter can be compacted.

    Raises:
        PatError: the base is quantised: its small form would be dequantised, and so larger than what it replaces.
    """
    if config.base_quantization is not None:
        raise PatError("Got a quantised base model, whose compact form would not be quantised; use no_compact.")


def compact(model: MaskedModel, config: PatConfig, adapter: str) -> Compacted:
    """Return the compact form of a masked model; the masked model stays as it is.

    LoRA on readers is cut; LoRA and operator of a writer become one adapter. With dropout, or the dense operator, D
    goes into the frozen weight and into B. DoRA, experts and other variants are folded and start anew, which is the
    same function as well.

    Args:
        model: what to compact; its mask must be 0/1.
        config: of its adapter.
        adapter: name of that adapter.
    """
    check_compactable(config)
    channels = Channels.from_mask(model.mask.keep, model.mask.basis)
    splitter = _Splitter(model, config, adapter, channels)
    factors: dict[str, Factors] = {}
    # One configuration cannot describe plain LoRA beside a variant of it: then all is folded and starts anew.
    for branch in model.kept_stream.branches if splitter.all_plain() else ():
        for reader in branch.readers:
            if (layer := splitter.lora(reader)) is not None:
                factors[reader.path] = splitter.reader(branch, reader, layer)
        if (writer := splitter.writer(branch)) is not None:
            factors[branch.writer.path] = writer
    # The frozen weights: without LoRA where it lives on as an adapter, without the operator where that does.
    split = {linear.weight for linear in splitter.split}

    def factored(name: str) -> Tensor | AdaptedMatrix:
        return base_parameter(model.base, name) if name in split else model.factored(name)

    operators = {site: op for site, op in model.operators.items() if site not in splitter.operators_in_rank}
    form = replace(model, factored=factored, operators=operators).dense_form(model.base.dtype)
    biases = model.layers.renamed_keys(splitter.biases)
    weights = ((name, biases.get(name, folded)) for name, folded in form.weights)
    base = build_dense(model.base, form.config, weights, model.base.dtype)
    base = cast(PreTrainedModel, base.to(model.base.device))  # type: ignore[arg-type]
    others = splitter.lora_without(factors)
    shapes = {path: (len(given.a), given.scale) for path, given in factors.items()}
    if not factors and means_other_modules(config, model.layers, model.stream.family):
        shapes, others = splitter.shapes(others), []
    shapes, factors = model.layers.renamed_keys(shapes), model.layers.renamed_keys(factors)
    others = list(model.layers.renamed_keys(dict.fromkeys(others)))
    return Compacted(base, compact_lora_config(base, config, shapes, others, model.layers), factors, adapter)


class _Splitter:
    """Turns LoRA layers and operators into factors, and notes what the frozen weights must then leave out."""

    def __init__(self, model: MaskedModel, config: PatConfig, adapter: str, channels: Channels) -> None:
        self.model, self.config, self.adapter, self.channels = model, config, adapter, channels
        self.qk_scaled = model.stream.scaled_projections()
        self.split: list[Linear] = []
        self.operators_in_rank: set[str] = set()
        self.biases: dict[str, Tensor] = {}

    def all_plain(self) -> bool:
        """Tell whether two factors are all there is to every LoRA layer on a module."""
        layers = (_lora_layer(module) for module in self.model.base.modules())
        return all(
            layer is None or (layer.lora_variant.get(self.adapter) is None and not layer.lora_bias.get(self.adapter))
            for layer in layers
        )

    def lora_without(self, factors: Mapping[str, Factors]) -> list[str]:
        """Return the modules with LoRA that bring no factors along and can be targeted again (an embedding)."""
        paths = [path for path, module in self.model.base.named_modules() if _lora_layer(module) is not None]
        out_of_reach = {
            linear.path
            for branch in self.model.stream.branches
            for linear in (*branch.readers, branch.writer)
            if self._is_out_of_reach(linear)
        }
        nothing_else = not factors and not self.config.target_parameters
        paths = staying(paths, self.model.layers, out_of_reach, nothing_else=nothing_else)
        return [path for path in paths if path not in factors]

    def shapes(self, paths: Iterable[str]) -> dict[str, tuple[int, float]]:
        """Return rank and scale of the LoRA on some modules, by their paths."""
        layers = {path: cast(LoraLayer, self.model.base.get_submodule(path)) for path in paths}
        return {path: (layer.r[self.adapter], float(layer.scaling[self.adapter])) for path, layer in layers.items()}

    def lora(self, linear: Linear) -> LoraLayer | None:
        """Return the LoRA layer on a linear module, if there is one."""
        layer = None if self._is_out_of_reach(linear) else _lora_layer(self.model.base.get_submodule(linear.path))
        return layer if layer is not None and self.adapter in layer.lora_A else None

    def reader(self, branch: ResidualBranch, reader: Linear, layer: LoraLayer) -> Factors:
        """Cut A along the residual stream; in a rotated stream the norm's gain goes into it as into the weight."""
        self.split.append(reader)
        a, b, scale = self._factors(layer)
        rotated = self.channels.basis is not None
        if rotated and branch.pre_norm is not None:
            gain = to_float64(self.model.parameter(f"{branch.pre_norm}.weight")) + self.model.stream.family.gain_offset
            a = a * gain * self.channels.gain
        scaled = reader.path in self.qk_scaled
        cut = self.model.cuts.get(branch.writer.path) if reader in branch.inner else None
        rows: Callable[[Tensor], Tensor] = cut.rows if cut is not None else _as_it_is
        b = rows(b)
        a_was, b_was = (cast(nn.Parameter, factor[self.adapter].weight) for factor in (layer.lora_A, layer.lora_B))
        return Factors(
            self.channels.cut(a),
            b * self.channels.gain if scaled else b,
            scale,
            a_was=None if rotated else Inherited(a_was, self.channels.select),
            b_was=None if scaled else Inherited(b_was, rows),
        )

    def writer(self, branch: ResidualBranch) -> Factors | None:
        """Return the factors of a writer, None if it is folded as a whole."""
        writer = branch.writer
        if self._is_out_of_reach(writer):
            return None
        layer, operator = self.lora(writer), self.model.operators.get(branch.site)
        dropout = layer is not None and not isinstance(layer.lora_dropout[self.adapter], nn.Identity)
        if isinstance(operator, LowRankOperator) and not dropout:
            return self._writer_with_operator(branch, layer, cast(LowRankOperator, in_double(operator)))
        if layer is None:
            return None
        self.split.append(writer)
        a, b, scale = self._factors(layer)
        folded = None if operator is None else in_double(operator)
        columns, a_was, b_was = self._columns(writer), None, None
        if folded is None and self.channels.basis is None:
            # Only selected from; through a refit, A is another combination of numbers.
            a_was, b_was = (cast(nn.Parameter, factor[self.adapter].weight) for factor in (layer.lora_A, layer.lora_B))
        is_selection = (cut := self.model.cuts.get(writer.path)) is None or cut.reconstruction is None
        return Factors(
            columns(a),
            cut_writer_rows(b.mT, folded, self.channels).mT,
            scale,
            a_was=Inherited(a_was, columns) if a_was is not None and is_selection else None,
            b_was=Inherited(b_was, lambda moment: self.channels.select(moment.mT).mT) if b_was is not None else None,
        )

    def _columns(self, writer: Linear) -> Callable[[Tensor], Tensor]:
        """Return what cuts the columns of a writer, and those of its A, along the space inside its branch."""
        cut = self.model.cuts.get(writer.path)
        return _as_it_is if cut is None else cut.columns

    def _writer_with_operator(
        self, branch: ResidualBranch, layer: LoraLayer | None, operator: LowRankOperator
    ) -> Factors:
        writer = branch.writer
        self.split.append(writer)
        self.operators_in_rank.add(branch.site)
        columns = self._columns(writer)
        weight = columns(to_float64(base_parameter(self.model.base, writer.weight)))
        if writer.bias is not None:
            bias = to_float64(self.model.parameter(writer.bias))
            self.biases[writer.bias] = cut_writer_rows(bias, cast(Operator, operator), self.channels)
        down, up = operator.down.to(weight), (operator.up * operator.v()).to(weight)
        up = self.channels.cut(up.mT).mT
        if layer is None:
            return Factors(down @ weight, up, 1.0)
        a, b, scale = self._factors(layer)
        a = columns(a)
        through = down @ weight + scale * (down @ b) @ a
        # The scale is divided out of A's share, not of B's: it is B that moves what the adapter writes, and k times an
        # optimizer's step on so many new ranks at once is more than a model survives.
        return Factors(torch.cat([a, through / scale]), torch.cat([self.channels.cut(b.mT).mT, up], dim=1), scale)

    def _is_out_of_reach(self, linear: Linear) -> bool:
        """Tell whether ordinary LoRA cannot have two factors of ours on a linear map.

        Bare parameters (experts) are wrapped in another way; see also `NAMES_OF_EXPERTS`.
        """
        is_bare = linear.weight == linear.path
        leaf = linear.path.rpartition(".")[2]
        if not is_bare and isinstance(self.model.base.get_submodule(linear.path), AuxiliaryTrainingWrapper):
            return True  # trained as a whole (modules_to_save), and so in stage two
        return is_bare or (bool(self.model.stream.family.expert_parameters) and leaf in NAMES_OF_EXPERTS)

    def _factors(self, layer: LoraLayer) -> tuple[Tensor, Tensor, float]:
        weights = (cast(Tensor, factor[self.adapter].weight) for factor in (layer.lora_A, layer.lora_B))
        a, b = (to_float64(weight.detach()) for weight in weights)
        return a, b, float(layer.scaling[self.adapter])


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _lora_layer(module: nn.Module) -> LoraLayer | None:
    """Return a module if it is LoRA on a whole module; `ParamWrapper` is LoRA on a bare parameter."""
    layer: Any = module
    return layer if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper) else None
