"""A base that was never trained on its end token is said to be one."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny_models import build, tiny_tokenizer

from pat.training.end_token import warn_of_end_token
from pat.training.vocabulary import Vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_an_end_token_that_looks_like_others_is_said(tied: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = build("llama", tied=tied), tiny_tokenizer()
    vocabulary, end = Vocabulary(tokenizer, model.config.vocab_size), cast(int, tokenizer.eos_token_id)
    warn_of_end_token(vocabulary, model)
    assert not caplog.messages
    head = cast(Any, model.get_output_embeddings()).weight.data
    head[end - 2 : end] = head[end] * 1.001
    knows = next(token for token in range(len(head)) if token not in range(end - 2, end + 1))
    model.config.eos_token_id = [end, knows]
    warn_of_end_token(vocabulary, model)
    (said,) = caplog.messages
    assert f"{tokenizer.eos_token!r}: 2 other tokens have the same row" in said
    assert f"such as {tokenizer.convert_ids_to_tokens(knows)!r}" in said
    warn_of_end_token(Vocabulary(tokenizer, model.config.vocab_size, added=(end,)), model)  # which is trained
    quantised = SimpleNamespace(weight=head.to(torch.uint8))
    warn_of_end_token(vocabulary, cast(Any, SimpleNamespace(get_output_embeddings=lambda: quantised)))
    assert len(caplog.messages) == 1
