"""ShortGPT: which layers go, and that the small model is the base with those layers skipped."""

from __future__ import annotations

import pytest
import torch
from compare.baselines.shortgpt import block_influence, keep_layers, shortgpt
from tiny_models import KINDS, batch, build
from transformers import PreTrainedModel

CALIBRATION = list(batch(seed=5, batch_size=7, length=12)["input_ids"][:6])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", KINDS)
def test_the_small_model_is_the_base_with_layers_skipped(family: str, tied: bool) -> None:
    model = build(family, tied=tied)
    num_layers = model.config.num_hidden_layers
    keep = [index for index in range(num_layers) if index != 1]
    small = keep_layers(model, keep)
    assert small.config.num_hidden_layers == num_layers - 1
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == list(range(num_layers - 1))
    if types := getattr(model.config, "layer_types", None):
        assert small.config.layer_types == [types[index] for index in keep]

    def skip(module, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handle = model.model.layers[1].register_forward_hook(skip, with_kwargs=True)
    with torch.no_grad():
        expected = model(**batch()).logits
        handle.remove()
        difference = small(**batch()).logits - expected
    assert difference[batch()["attention_mask"].bool()].abs().max() < 1e-6
    generated = small.generate(**batch(), max_new_tokens=3, do_sample=False)  # the cache counts layers
    assert generated.shape[1] == batch()["input_ids"].shape[1] + 3


def test_a_layer_that_does_nothing_goes_first_and_the_size_is_the_nearest(
    stories260k: tuple[PreTrainedModel, object],
) -> None:
    model, _ = stories260k
    layers = model.model.layers
    sequences = list(torch.randint(3, 500, (4, 32), generator=torch.Generator().manual_seed(1)))
    total, size = (sum(p.numel() for p in module.parameters()) for module in (model, layers[0]))
    for removed, target in ((1, total - size), (1, total - int(1.4 * size)), (2, total - int(1.6 * size)), (0, total)):
        small, keep = shortgpt(model, sequences, target_parameters=target)
        influence = block_influence(model, sequences)
        assert len(keep) == len(layers) - removed
        assert sum(p.numel() for p in small.parameters()) == total - removed * size
        assert set(range(len(layers))) - set(keep) == set(influence.argsort()[:removed].tolist())


def test_influence_is_the_angle_between_what_a_layer_gets_and_gives() -> None:
    model = build("llama", tied=False)
    with torch.no_grad():
        for writer in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            writer.weight.zero_()
            if writer.bias is not None:
                writer.bias.zero_()
        states = model(input_ids=torch.stack(CALIBRATION), output_hidden_states=True).hidden_states
    influence = block_influence(model, CALIBRATION)
    assert influence[1].abs() < 1e-6
    before, after = states[0].double(), states[1].double()
    cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    assert influence[0].item() == pytest.approx(1 - cosine.mean().item(), abs=1e-6)
