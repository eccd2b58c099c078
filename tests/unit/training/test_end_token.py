"""A base that was never trained on the token that ends its answers is said to be one."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny_models import build, tiny_tokenizer

from pat.nll import IGNORED
from pat.training.end_token import end_of, warn_of_end_token
from pat.training.vocabulary import Vocabulary


def test_the_end_is_what_most_answers_end_with() -> None:
    rows = [[IGNORED, 5, 2], [IGNORED, 7, 2], [IGNORED, 9], [3, IGNORED], []]
    assert end_of({"input_ids": row, "labels": row} for row in rows) == 2
    assert end_of([]) is None and end_of([{"input_ids": [1], "labels": [IGNORED]}]) is None


@pytest.mark.parametrize("tied", [True, False])
def test_an_end_token_that_looks_like_others_is_said(tied: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = build("llama", tied=tied), tiny_tokenizer()
    vocabulary, end = Vocabulary(tokenizer, model.config.vocab_size), cast(int, tokenizer.eos_token_id)
    warn_of_end_token(vocabulary, model, end, ())
    assert not caplog.messages
    head = cast(Any, model.get_output_embeddings()).weight.data
    head[end - 2 : end] = head[end] * 1.001
    knows = next(token for token in range(len(head)) if token not in range(end - 2, end + 1))
    model.config.eos_token_id = [end, knows]
    warn_of_end_token(vocabulary, model, end, ())
    assert f"{tokenizer.eos_token!r}: 2 other tokens have the same row" in caplog.messages[-1]
    assert f"such as {tokenizer.convert_ids_to_tokens(knows)!r}" in caplog.messages[-1]
    warn_of_end_token(vocabulary, model, end - 1, ["norm"])  # as a chat template's own end
    assert "--lora_modules_to_save" in caplog.messages[-1] and len(caplog.messages) == 2
    warn_of_end_token(vocabulary, model, knows, ())
    # It is trained, one way or the other, or not known.
    warn_of_end_token(Vocabulary(tokenizer, model.config.vocab_size, added=(end,)), model, end, ())
    warn_of_end_token(vocabulary, model, end, ["lm_head"])
    warn_of_end_token(vocabulary, model, None, ())
    quantised = SimpleNamespace(weight=head.to(torch.uint8))
    ends = {"get_output_embeddings": lambda: quantised, "get_input_embeddings": lambda: None}
    other = SimpleNamespace(**ends, named_modules=lambda: [])
    warn_of_end_token(vocabulary, cast(Any, other), end, ())
    assert len(caplog.messages) == 2
