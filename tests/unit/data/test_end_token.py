"""Tests of the tokens that end answers, and of the warnings where a model does not learn to stop."""

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny_models import build, tiny_tokenizer
from transformers import GenerationConfig

from pat.data.end_token import NO_END, EndFinder, ends_of, taught_to_stop, warn_of_end_token
from pat.data.vocabulary import Vocabulary
from pat.loading import TokenSetup


def test_the_end_is_the_last_special_token_but_for_blank_ones() -> None:
    tokenizer = tiny_tokenizer()
    find = EndFinder(tokenizer)
    user, eos = cast(int, tokenizer.convert_tokens_to_ids("<|user|>")), cast(int, tokenizer.eos_token_id)
    yes, blank = (
        tokenizer("yes", add_special_tokens=False)["input_ids"],
        tokenizer.encode(" ", add_special_tokens=False),
    )
    assert not cast(str, tokenizer.decode(blank)).strip() and yes
    assert find([user, *yes, eos]) == find([*yes, user, eos, *blank, *blank]) == eos
    tokenizer.add_tokens(["\n", "hooray"])  # ordinary words; line breaks are in Gemma's tokenizers, too
    find, (line, word) = EndFinder(tokenizer), cast(list[int], tokenizer.convert_tokens_to_ids(["\n", "hooray"]))
    assert find([*yes, eos, line]) == eos and find([*yes, word]) == NO_END
    assert find([eos, *yes]) == find([*yes, *blank]) == NO_END and find([]) is None


def test_answers_have_several_ends_if_each_is_no_rare_one() -> None:
    counts = [Counter({5: 80, 6: 19, 7: 1, NO_END: 100}), Counter({2: 3})]
    assert ends_of(counts) == [5, 2] and ends_of([Counter({5: 80, 6: 19}), counts[1]]) == [5, 6, 2]


def test_generation_stops_where_answers_end(caplog: pytest.LogCaptureFixture) -> None:
    config, tokenizer = build("llama", tied=True).config, tiny_tokenizer()
    tokens = TokenSetup.of(config, GenerationConfig(eos_token_id=[2, 6]), tokenizer)
    assert taught_to_stop(tokens, [6, 2]) is tokens and not caplog.messages
    written = taught_to_stop(tokens, [5, 2]).generation_config
    assert written.eos_token_id == [2, 6, 5] and tokens.generation_config.eos_token_id == [2, 6]
    assert "Answers in the data end with '<|user|>'" in caplog.messages[0] and "'</s>'" in caplog.messages[0]
    # A merge takes up what stands beside the adapter.
    assert TokenSetup.of(config, written, tokenizer).ends == [2, 6, 5]
    assert taught_to_stop(TokenSetup.of(config, None, tokenizer), [5]).ends == [2, 5]


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
    quantised = SimpleNamespace(weight=head.to(torch.uint8))
    ends = {"get_output_embeddings": lambda: quantised, "get_input_embeddings": lambda: None}
    other = SimpleNamespace(**ends, named_modules=lambda: [])
    warn_of_end_token(vocabulary, cast(Any, other), end, ())
    assert len(caplog.messages) == 2
