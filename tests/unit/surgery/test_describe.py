"""Facts about a model come from the model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, build
from torch import nn

from pat.errors import PatError
from pat.surgery.describe import check_tie, count_parameters, head_dim, map_of, shares_head


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("said", [True, False])
def test_whether_a_model_is_tied_is_seen_in_its_tensors(tied: bool, said: bool) -> None:
    model = build("llama", tied=tied)
    model.config.tie_word_embeddings = said
    assert shares_head(model) == tied
    assert (map_of(model).head is None) == tied
    if said and not tied:
        with pytest.raises(PatError, match=r"set tie_word_embeddings to false .* untie_word_embeddings=True"):
            check_tie(model)
        assert not check_tie(model, untie=True)
    else:
        assert check_tie(model) == tied
    assert count_parameters(model.config, tied=shares_head(model)) == sum(p.numel() for p in model.parameters())


def test_one_memory_under_two_names_is_one_matrix() -> None:
    model = build("llama", tied=False)
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.data)
    assert shares_head(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(family: str) -> None:
    with torch.device("meta"):
        model = build(family, tied=True)
    derived = model.config.hidden_size // model.config.num_attention_heads
    assert head_dim(model) == (getattr(model.config, "head_dim", None) or derived)
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())
