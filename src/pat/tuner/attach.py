"""Hang mask, gates and operators of one adapter into a model that peft has put LoRA on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn

from pat.method.basis import UnifiedMask
from pat.method.gate import Gate
from pat.method.inner import ExpertsGate, InnerGate
from pat.method.operator import build_operator
from pat.surgery.layers import droppable_layers
from pat.tuner.config import PatConfig
from pat.tuner.depth import branch_ends
from pat.tuner.experts import ExpertsGateLayer, count_experts
from pat.tuner.layer import (
    DEPTH_NAME,
    GATE_NAME,
    MASK_NAME,
    OPERATOR_NAME,
    DepthLayer,
    GateLayer,
    HsmLayer,
    MaskLayer,
)
from pat.tuner.prepare import AttachmentPlan


def add_pruning_layers(
    model: nn.Module, adapter_name: str, config: PatConfig, plan: AttachmentPlan, *, empty: bool
) -> None:
    """Add an adapter's mask beside the embedding, its gates and operators beside the writers, and hook them.

    Gates are there for the axes that are cut, operators if the hidden size is.

    Args:
        model: the base model with peft's layers in it.
        adapter_name: name of the adapter.
        config: of the adapter.
        plan: what attaching it comes to.
        empty: leave the operators without values, because they are about to be loaded.
    """
    stream, shape = plan.stream, plan.shape
    kind: Any = config.mask
    mask = UnifiedMask(
        shape.size("hidden"),
        shape.pruned("hidden"),
        kind=kind if shape.cuts("hidden") else "frozen",
        has_basis=plan.rotation == "pca",
        has_head_factor=plan.rotation == "pca" and plan.tied,
        lr_multiplier=config.mask_lr_multiplier,
    )
    mask_layer = cast(MaskLayer, _layer(model, stream.embedding, MASK_NAME, MaskLayer()))
    mask_layer.add_adapter(adapter_name, mask, _device_of(model, stream.embedding))
    for branch in stream.branches:
        if branch.axis is not None and shape.cuts(branch.axis):
            path, experts = branch.gate_site, branch.has_experts
            layer_cls, gate_cls = (ExpertsGateLayer, ExpertsGate) if experts else (GateLayer, InnerGate)
            gates = cast(GateLayer, _layer(model, path, GATE_NAME, layer_cls()))
            gate = gate_cls(
                shape.size(branch.axis),
                shape.pruned(branch.axis),
                width=plan.group_width if branch.axis == "heads" else 1,
                kind=kind,
                refits=config.refit,
                lr_multiplier=config.mask_lr_multiplier,
                num_stacked=count_experts(model.get_submodule(path)) if experts else None,
            )
            gates.add_adapter(adapter_name, gate, _device_of(model, path))
            gates.attach(model.get_submodule(path))
    if shape.cuts("layers"):
        depth = cast(DepthLayer, _layer(model, stream.embedding, DEPTH_NAME, DepthLayer()))
        over_layers = Gate(
            shape.size("layers"), shape.pruned("layers"), kind=kind, lr_multiplier=config.mask_lr_multiplier
        )
        with torch.no_grad():
            over_layers.pinned.copy_(~torch.tensor(droppable_layers(stream)))
        depth.add_adapter(adapter_name, over_layers, _device_of(model, stream.embedding))
        depth.attach(branch_ends(model, stream))
    # Without a cut of the stream there is nothing that operators would make up for.
    for site in stream.sites if shape.cuts("hidden") else ():
        layer = cast(HsmLayer, _layer(model, site, OPERATOR_NAME, HsmLayer(mask_layer)))
        with torch.device("meta") if empty else nullcontext():  # orthogonalising takes minutes in a large model
            operator = build_operator(
                shape.size("hidden"), config.operator_rank, lr_multiplier=config.operator_lr_multiplier
            )
        layer.add_adapter(adapter_name, operator, _device_of(model, site))
        # LoRA and modules_to_save may just have replaced the writer: hook whatever stands there now.
        final_norm = model.get_submodule(stream.final_norm) if site == stream.embedding else None
        layer.set_tied(adapter_name, tied=final_norm is not None and plan.tied)
        layer.attach(model.get_submodule(site), final_norm)


def _layer(model: nn.Module, site: str, name: str, new: nn.Module) -> nn.Module:
    """Return the layer of that name on the module that holds a site; put the new one there if there is none."""
    holder = model.get_submodule(site.rpartition(".")[0])
    if not hasattr(holder, name):
        holder.add_module(name, new)
    return cast(nn.Module, getattr(holder, name))


def _device_of(model: nn.Module, site: str) -> torch.device:
    return next(model.get_submodule(site).parameters()).device
