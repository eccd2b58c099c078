"""Turn an adapted model into its dense form in a chosen precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pat.errors import PatError
from pat.method.basis import UnifiedMask
from pat.method.gate import Gate
from pat.method.inner import InnerGate
from pat.method.operator import Operator
from pat.shape import AXES
from pat.surgery.adapted import AdaptedMatrix, merged
from pat.surgery.axes import ExpertsCut, InnerCut, cut_inner
from pat.surgery.dense import DenseForm, shrink_config
from pat.surgery.describe import head_dim
from pat.surgery.fold import Channels, HeadPlan, fold_weights
from pat.surgery.layers import LayerCut, layers_of
from pat.surgery.precision import lift, to_float64
from pat.surgery.residual import ResidualStream
from pat.tuner.weights import embedding_ratio


@dataclass(frozen=True)
class MaskedModel:
    """A base model with one hardened adapter, as a merge or a compaction sees it."""

    base: PreTrainedModel
    stream: ResidualStream
    factored: Callable[[str], Tensor | AdaptedMatrix]
    """Base parameters by name, with LoRA merged in, a plain one not multiplied out."""
    mask: UnifiedMask
    operators: Mapping[str, Operator]
    cuts: Mapping[str, InnerCut]
    """Cuts of the spaces inside branches, by the path of the branch's writer."""
    layers: LayerCut
    """Layers that stay; all, if they are not cut."""
    final_gain: Tensor
    """Gain of the final norm as stored in the base, `(d,)`."""
    untie: bool
    """Whether a tied model gets a head of its own."""

    @classmethod
    def of(
        cls,
        base: PreTrainedModel,
        stream: ResidualStream,
        factored: Callable[[str], Tensor | AdaptedMatrix],
        *,
        mask: UnifiedMask,
        operators: Mapping[str, Operator],
        gates: Mapping[str, InnerGate],
        over_layers: Gate | None,
        untie: bool,
    ) -> MaskedModel:
        """Return it for the parts of an adapter that are hung into a base model."""
        cuts, size = {}, head_dim(base)
        for branch in stream.branches:
            if (gate := gates.get(branch.gate_site)) is not None:
                fused = (gate.width, size, size) if branch.axis == "heads" else (1, 1)
                kind = ExpertsCut if branch.has_experts else InnerCut
                cuts[branch.writer.path] = kind(gate.keep, gate.reconstruction, fused)
        num_layers = len(layers_of(stream))
        kept = range(num_layers) if over_layers is None else over_layers.keep_indices.tolist()
        return cls(
            base=base,
            stream=stream,
            factored=factored,
            mask=mask,
            operators=operators,
            cuts=cuts,
            layers=LayerCut(stream.family.layers, tuple(kept), num_layers),
            final_gain=to_float64(merged(factored(f"{stream.final_norm}.weight"))) + stream.family.gain_offset,
            untie=untie,
        )

    @property
    def kept_stream(self) -> ResidualStream:
        """The residual stream through the layers that stay, with the names of the base model."""
        return self.layers.stream(self.stream)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the dense model that are not the base's, or may not be, by the field of its configuration."""
        sizes = {self.stream.family.hidden_size_field: self.mask.pruned_hidden_size}
        for branch in self.stream.branches:
            if branch.axis is not None and (cut := self.cuts.get(branch.writer.path)) is not None:
                sizes[AXES[branch.axis].field] = cut.num_kept
        return sizes

    def parameter(self, name: str) -> Tensor:
        """Return a base parameter with LoRA merged in."""
        return merged(self.factored(name))

    def dense_form(self, dtype: torch.dtype, *, precision: torch.dtype = torch.float64) -> DenseForm:
        """Return the small dense form, whose weights are folded when they are asked for.

        Args:
            dtype: of the dense model and its weights.
            precision: to fold matrices in.

        Raises:
            PatError: transformers refuses a model of that width.
        """
        base, stream, mask = self.base, self.kept_stream, self.mask
        tied = stream.head is None and not self.untie
        config = shrink_config(
            base.config,
            stream.family,
            self.sizes,
            head_dim=head_dim(base),
            tied=tied,
            keep_layers=self.layers.keep if self.layers.cuts else None,
        )
        ratio = 1.0
        if stream.family.scaled_embedding:
            ratio = embedding_ratio(base.get_submodule(stream.embedding), mask.pruned_hidden_size, dtype)
        final_gain = None
        if mask.head_factor is not None:
            final_gain = self.final_gain * to_float64(mask.head_factor).to(self.final_gain.device)
        folded_stream = stream.untie() if self.untie and stream.head is None else stream
        weights = fold_weights(
            folded_stream,
            cut_inner(self.factored, stream, self.cuts),
            Channels.from_mask(mask.keep, mask.basis),
            _Lifted(self.operators, precision),
            HeadPlan(tied=tied, final_gain=final_gain, embedding_ratio=ratio),
            precision=precision,
            dtype=dtype,
        )
        named = ((str(self.layers.renamed(name)), weight) for name, weight in weights)
        return DenseForm(config, named, folded_stream.num_tensors)


def check_hard(gates: Sequence[Gate], purpose: str) -> None:
    """Check that a mask and its gates are 0/1, as many as chosen, and have been refitted, as `purpose` needs it.

    Raises:
        PatError: one of them is soft, keeps another number than it should, or awaits its refit.
    """
    for gate in gates:
        gate.check_kept(f"Got {purpose} of an adapter that")
    mask = next((gate for gate in gates if not gate.hardened), None)
    if mask is None:
        if any(isinstance(gate, InnerGate) and gate.awaits_refit for gate in gates):
            raise PatError(
                f"Got {purpose} of an adapter whose MLPs or heads are cut and not refitted; call model.refit(batches) "
                "first, or make it with refit=False."
            )
        return
    if mask.milestone_step is None:
        raise PatError(
            f"Got {purpose} of an adapter whose mask has never been trained and is soft; put PatCallback() into the "
            "trainer's callbacks and train past the milestone first."
        )
    raise PatError(
        f"Got {purpose} at step {mask.step} of an adapter whose mask is still soft (milestone: step "
        f"{mask.milestone_step}); train past the milestone first."
    )


def adapted_form(base: PreTrainedModel, names: Iterable[str], parameter: Callable[[str], Tensor]) -> DenseForm:
    """Return the dense form of a model with an ordinary LoRA adapter: its own configuration, nothing cut.

    Args:
        base: the adapted model.
        names: of its parameters without adapter.
        parameter: those parameters with LoRA merged in.
    """
    listed = list(names)
    config = copy.deepcopy(base.config)
    config.use_cache = True  # trainers switch it off, for training alone
    return DenseForm(config, ((name, parameter(name)) for name in listed), len(listed))


def in_double(operator: Operator) -> Operator:
    """Return a copy of an operator in float64, without gradients."""
    return _lifted(operator, torch.float64)


class _Lifted(Mapping[str, Operator]):
    """Operators in another precision, made when they are asked for: all at once would take as much as a model."""

    def __init__(self, operators: Mapping[str, Operator], precision: torch.dtype) -> None:
        self.operators, self.precision = operators, precision

    def __getitem__(self, site: str) -> Operator:
        return _lifted(self.operators[site], self.precision)

    def __iter__(self) -> Iterator[str]:
        return iter(self.operators)

    def __len__(self) -> int:
        return len(self.operators)


def _lifted(operator: Operator, precision: torch.dtype) -> Operator:
    twin = copy.deepcopy(operator).requires_grad_(False)
    for parameter in twin.parameters():
        parameter.data = lift(parameter.data, precision)
    return twin
