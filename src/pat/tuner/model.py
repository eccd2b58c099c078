"""The PAT tuner: LoRA, with the mask and operators of the residual stream and the gates of the other axes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from pat.errors import PatError
from pat.loading import keep_plain_layout
from pat.method.basis import UnifiedMask
from pat.method.gate import Gate
from pat.method.inner import InnerGate
from pat.method.operator import Operator, regularizers
from pat.surgery.dense import build_dense
from pat.surgery.residual import ResidualStream
from pat.surgery.rotation import ChannelOrder
from pat.tuner.attach import add_pruning_layers
from pat.tuner.compaction import Compacted, compact
from pat.tuner.config import PatConfig, check_change
from pat.tuner.gates import by_axis, held
from pat.tuner.guard import GuardedForward
from pat.tuner.layer import DEPTH_NAME, GATE_NAME, MASK_NAME, NAMES, OPERATOR_NAME, MaskLayer, PruningLayer
from pat.tuner.measure import choose
from pat.tuner.merging import MaskedModel, check_hard
from pat.tuner.prepare import default_targets, new_parameters_are_empty, plan_attachment
from pat.tuner.refit import InnerMoments, refit
from pat.tuner.weights import effective_parameter, factored_parameter

Batches = Iterable[Mapping[str, Any]]


class PatModel(GuardedForward):
    """Pruning-aware tuning of a causal language model (paper, section 3), as a peft tuner.

    Reached as `peft_model.base_model`; its methods can be called on the `PeftModel` as well. Attaching, switching,
    saving and loading are peft's own. The base model is never modified while an adapter is on it.

    Raises:
        PatError: on attaching, if the model's family is not supported, a size is illegal, or the adapter does not
            belong to this base model.
    """

    # peft's switches then reach mask, gates and operators as well as LoRA's layers.
    tuner_layer_cls = BaseTunerLayer  # type: ignore[assignment]
    # peft then refuses to inject layers without the tuner, which alone moves masks and knows what belongs to them.
    uses_shared_state = True

    residual_stream: ResidualStream | None = None
    _moments: dict[str, InnerMoments] | None = None  # by adapter, from the calibration until the refit

    # -- attaching ---------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter: LoRA by peft, then mask, gates and operators."""
        # What is filled in belongs to this adapter: the user's object can be used for another one.
        config = self.peft_config[adapter_name] = copy.deepcopy(self.pat_config(adapter_name))
        # peft says it as an option or, for the first adapter, by a context that empties new parameters.
        empty = bool(kwargs.get("low_cpu_mem_usage")) or new_parameters_are_empty()
        check_change(config, [other for name, other in self.peft_config.items() if name != adapter_name], empty=empty)
        plan = plan_attachment(model, config, known_stream=self.residual_stream)
        self.residual_stream = plan.stream
        keep_plain_layout(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.resolved_from = config.asked()  # as peft leaves them
        add_pruning_layers(model, adapter_name, config, plan, empty=empty)
        for layer in self._sparsification_layers():
            layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert self.residual_stream is not None
        return default_targets(cast(PatConfig, peft_config), self.model, self.residual_stream)

    # -- the method's own surface ------------------------------------------------------------------------------

    @property
    def adapter(self) -> str:
        """Name of the one active adapter.

        Raises:
            PatError: none or several are active.
        """
        if len(self.active_adapters) != 1:
            raise PatError(
                f"Got active adapters {self.active_adapters}; expected exactly one PAT adapter to be active."
            )
        return self.active_adapters[0]

    def pat_config(self, adapter_name: str | None = None) -> PatConfig:
        """Return the configuration of an adapter, by default the active one."""
        return cast(PatConfig, self.peft_config[adapter_name or self.adapter])

    def mask(self, adapter_name: str | None = None) -> UnifiedMask:
        """Return the unified mask of an adapter, by default the active one."""
        stream = cast(ResidualStream, self.residual_stream)
        holder = self.model.get_submodule(stream.embedding.rpartition(".")[0])
        return cast(MaskLayer, getattr(holder, MASK_NAME)).mask(adapter_name or self.adapter)

    def operators(self, adapter_name: str | None = None) -> dict[str, Operator]:
        """Return the operators of an adapter by site, in execution order; none if the stream is not cut."""
        sites = cast(ResidualStream, self.residual_stream).sites
        return held(self.model, OPERATOR_NAME, sites, adapter_name or self.adapter)

    def gates(self, adapter_name: str | None = None) -> dict[str, InnerGate]:
        """Return the gates of an adapter inside branches, by the branches' `gate_site`, in execution order."""
        paths = [branch.gate_site for branch in cast(ResidualStream, self.residual_stream).branches]
        return held(self.model, GATE_NAME, paths, adapter_name or self.adapter)

    def layer_gate(self, adapter_name: str | None = None) -> Gate | None:
        """Return the gate of an adapter over the model's layers, None if they are not cut."""
        embedding = cast(ResidualStream, self.residual_stream).embedding
        return held(self.model, DEPTH_NAME, [embedding], adapter_name or self.adapter).get(embedding)

    def gates_by_axis(self, adapter_name: str | None = None) -> dict[str, list[Gate]]:
        """Return the gates of an adapter by the axis that they cut; the mask is there whether or not it cuts."""
        stream = cast(ResidualStream, self.residual_stream)
        return by_axis(stream, self.mask(adapter_name), self.gates(adapter_name), self.layer_gate(adapter_name))

    def all_gates(self, adapter_name: str | None = None) -> list[Gate]:
        """Return an adapter's mask and all its gates."""
        return [gate for gates in self.gates_by_axis(adapter_name).values() for gate in gates]

    def set_step(self, step: int, milestone_step: int, adapter_name: str | None = None) -> None:
        """Move mask and gates to an optimizer step; from `milestone_step` on they are 0/1 and fixed (eq. 6-8)."""
        gates = self.all_gates(adapter_name)
        for gate in gates:
            gate.check_milestone(milestone_step)
        for gate in gates:
            gate.set_step(step, milestone_step)

    def regularizers(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """Return the unweighted losses `active` (eq. 9) and `identity` (eq. 11), scalars with gradients."""
        return regularizers(self.all_gates(adapter_name), self.operators(adapter_name).values())

    def needs_calibration(self, adapter_name: str | None = None) -> bool:
        """Tell whether the adapter wants a look at data before training: a rotation, or an order of the channels."""
        name = adapter_name or self.adapter
        gates = self.all_gates(name)[0 if self._orders_stream(name) else 1 :]
        return any(not gate.calibrated and not gate.hardened for gate in gates)

    def refit(self, batches: Batches, adapter_name: str | None = None) -> int:
        """Fit what fills in for what was cut before writers; return the number of tokens that the fit stands on.

        Batches are as in `calibrate`, and not read where its own measurement is still there; the gates are hard.
        """
        name = adapter_name or self.adapter
        gates = {path: gate for path, gate in self.gates(name).items() if gate.awaits_refit}
        moments = self._moments.pop(name, None) if self._moments else None
        moments = moments or InnerMoments(self.model, gates, batches, self.pat_config(name).refit_tokens)
        with self._without_adapters():
            refit(gates, moments)
        return moments.num_tokens

    def calibrate(
        self, dataloader: Iterable[Mapping[str, Any]], adapter_name: str | None = None
    ) -> ChannelOrder | None:
        """Choose the rotation and the prior orders of the channels; return that of the stream, if it is cut.

        In a distributed run every process has to call it; what all have measured together is the same in each.

        Args:
            dataloader: batches with `input_ids` `(batch, length)` and optionally `attention_mask`; read until
                `PatConfig.calibration_tokens` tokens are seen.
            adapter_name: the adapter to calibrate, by default the active one.

        Raises:
            PatError: the batches hold no token, or training of the mask has begun.
        """
        name = adapter_name or self.adapter
        mask = self.mask(name)
        if mask.step > 0 or mask.hardened:
            raise PatError(
                f"Got a calibration at step {mask.step}; expected it before training, since it changes the basis the "
                "mask was trained in."
            )
        # A script may ask for an order of the stream, which the configuration does not.
        orders_stream = self._orders_stream(name) or len(self.all_gates(name)) == 1
        moments = InnerMoments(self.model, self.gates(name), dataloader, self.pat_config(name).refit_tokens)
        with self._without_adapters():
            order = choose(
                self.model,
                cast(ResidualStream, self.residual_stream),
                self.pat_config(name),
                mask if orders_stream else None,
                self.layer_gate(name),
                moments,
                partial(effective_parameter, self.model, adapter_name=name),
            )
        if moments.known:
            self._moments = (self._moments or {}) | {name: moments}
        return order

    # -- leaving -----------------------------------------------------------------------------------------------

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> PreTrainedModel:
        """Return a new, smaller dense model of the base's own class; the masked model stays as it is.

        Args:
            progressbar: show progress over the parameters.
            safe_merge: check every folded weight for non-finite values.
            adapter_names: the name of one adapter; by default the active one.
            dtype: of the dense model, by default the base's (quantised bases: the dtype they compute in).

        Raises:
            PatError: the mask is not 0/1 yet, not one adapter is named, or (`safe_merge`) a weight is not finite.
        """
        if adapter_names is not None and (len(adapter_names) != 1 or adapter_names[0] not in self.peft_config):
            raise PatError(f"Got adapter_names={adapter_names}; expected exactly one of {list(self.peft_config)}.")
        masked = self.masked_model(adapter_names[0] if adapter_names else self.adapter, "a merge")
        dtype = dtype or masked.base.dtype
        form = masked.dense_form(dtype)
        num_weights = form.num_weights if progressbar else None
        return build_dense(
            masked.base, form.config, form.weights, dtype, check_finite=safe_merge, num_weights=num_weights
        )

    def compact(self, adapter_name: str | None = None) -> Compacted:
        """Return a small model with an ordinary LoRA adapter to train on (docs/adr/0008); this one stays as it is.

        Raises:
            PatError: the mask is not 0/1 yet, or the base model is quantised.
        """
        name = adapter_name or self.adapter
        return compact(self.masked_model(name, "a compaction"), self.pat_config(name), name)

    def masked_model(self, name: str, purpose: str) -> MaskedModel:
        """Return the model with one adapter as a merge or a compaction sees it; see `check_hard` for what it raises."""
        check_hard(self.all_gates(name), purpose)
        return MaskedModel.of(
            cast(PreTrainedModel, self.model),
            cast(ResidualStream, self.residual_stream),
            partial(factored_parameter, self.model, adapter_name=name),
            mask=self.mask(name),
            operators=self.operators(name),
            gates=self.gates(name),
            over_layers=self.layer_gate(name),
            untie=self.pat_config(name).untie_word_embeddings,
        )

    def unload(self) -> nn.Module:
        """Return the untouched base model by removing all adapters, with what `modules_to_save` has trained."""
        # Else peft would leave the trained modules in the place of the base's; it warns where an active one goes first.
        for name in sorted(self.peft_config, key=self.active_adapters.__contains__):
            self.delete_adapter(name)
        for layer in self._sparsification_layers():
            layer.detach()
        for module in list(self.model.modules()):
            for name in NAMES:
                if isinstance(module._modules.get(name), PruningLayer):
                    delattr(module, name)
        return super().unload()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: merging in place cannot change shapes."""
        raise PatError("PAT cannot be merged in place, since the merged model is smaller; use merge_and_unload().")

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: masks of different adapters keep different channels."""
        raise PatError("PAT adapters cannot be combined: their masks keep different channels. Merge one of them.")

    # -- internals ---------------------------------------------------------------------------------------------

    def _sparsification_layers(self) -> list[PruningLayer]:
        return [module for module in self.model.modules() if isinstance(module, PruningLayer)]

    def _orders_stream(self, adapter_name: str) -> bool:
        """Tell whether the channels of the stream are to be ordered by a calibration."""
        config, mask = self.pat_config(adapter_name), self.mask(adapter_name)
        return mask.num_kept < mask.size and (config.resolved_rotation == "pca" or config.rotation == "auto")

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        were_enabled = any(not layer.disable_adapters for layer in self._sparsification_layers())
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if were_enabled:
                self.enable_adapter_layers()


def find_tuner(model: nn.Module) -> PatModel | None:
    """Return the PAT tuner inside a model (wrapped by peft, accelerate or torch.compile), or None."""
    return next((module for module in model.modules() if isinstance(module, PatModel)), None)
