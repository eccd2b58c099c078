"""torch.compile takes a masked model as one graph, and compiles it anew only when the mask hardens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import batch, build
from tiny_training import attach, tuner_of
from torch._dynamo.testing import CompileCounter


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "rotation", "fields"),
    [
        ("llama", "pca", {}),
        ("gemma3_text", "none", {"mask": "frozen", "operator_rank": "dense"}),
    ],
)
def test_a_masked_model_is_one_graph_while_soft_and_one_while_hard(
    family: str, rotation: str, fields: dict[str, Any]
) -> None:
    torch.compiler.reset()
    layers = {"layer_types": ["sliding_attention"]} if family == "gemma3_text" else {}
    model = attach(
        build(family, tied=True, num_hidden_layers=1, **layers), rotation=rotation, pruned_hidden_size=36, **fields
    )
    tuner = tuner_of(model)
    if tuner.needs_calibration():
        tuner.calibrate([batch(seed=3, batch_size=8)])
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    inputs = batch() | {"labels": batch()["input_ids"]}
    graphs = []
    for step in range(6):
        tuner.set_step(step, 4)
        loss = compiled(**inputs).loss
        loss.backward()
        assert loss.item() == pytest.approx(model(**inputs).loss.item(), abs=1e-6)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1, 1, 2, 2]
