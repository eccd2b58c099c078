"""Minitron's criterion: which channels stay, and that the small model is the base without the others."""

from __future__ import annotations

import pytest
import torch
from compare.baselines.minitron import channel_scores, minitron, num_channels
from tiny_models import KINDS, batch, build
from torch import Tensor

from pat.errors import PatError

CALIBRATION = list(batch(seed=5, batch_size=7, length=12)["input_ids"][:6])


def with_hooks(model, keep: int) -> Tensor:
    """Logits of the base whose down projections see zeros in the channels of least activation, found independently."""
    seen: dict[int, list[Tensor]] = {}
    layers = model.model.layers
    for sequence in CALIBRATION:
        for index, layer in enumerate(layers):
            hook = layer.mlp.down_proj.register_forward_pre_hook(
                lambda module, args, index=index: seen.setdefault(index, []).append(args[0][0].abs().mean(0))
            )
            with torch.no_grad():
                model(input_ids=sequence[None])
            hook.remove()
    handles = []
    for index, layer in enumerate(layers):
        score = torch.stack(seen[index]).norm(dim=0)
        mask = torch.zeros_like(score).index_fill_(0, score.topk(keep).indices, 1)
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,)))
    with torch.no_grad():
        logits = model(**batch()).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [kind for kind in KINDS if "moe" not in kind])
def test_the_small_model_is_the_base_without_the_channels_of_least_activation(family: str, tied: bool) -> None:
    model = build(family, tied=tied)
    if not hasattr(model.model.layers[0].mlp, "down_proj"):
        with pytest.raises(PatError, match="cannot cut"):
            num_channels(model, 10**9)
        return
    total = sum(p.numel() for p in model.parameters())
    target = total - total // 10
    small, channels = minitron(model, CALIBRATION, target_parameters=target)
    size = model.config.intermediate_size
    per_channel = (total - sum(p.numel() for p in small.parameters())) / (size - channels)
    assert 0 <= target - sum(p.numel() for p in small.parameters()) < per_channel
    assert 0 < channels < size == len(next(iter(channel_scores(model, CALIBRATION).values())))
    real = batch()["attention_mask"].bool()
    with torch.no_grad():
        assert (small(**batch()).logits - with_hooks(model, channels))[real].abs().max() < 1e-4


def test_a_target_that_the_mlps_cannot_give_is_refused() -> None:
    with pytest.raises(PatError, match="without any MLP"):
        num_channels(build("llama", tied=True), 10)
