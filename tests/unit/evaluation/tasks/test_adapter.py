"""Requests of lm-evaluation-harness, as its own model would read them: stop sequences, stop tokens, defaults."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny_models import BOS_ID, VOCAB_SIZE, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from pat.errors import PatError
from pat.evaluation.tasks.adapter import BatchedLM
from pat.evaluation.tasks.protocols import first_letter, is_decided

MAX_POSITIONS = 300


class Scripted(nn.Module):
    """What follows a character is always the same, as a text says it."""

    def __init__(self, text: str, *, stops: list[str] | None = None, max_positions: int = MAX_POSITIONS) -> None:
        super().__init__()
        ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
        self.logits = nn.Parameter(torch.zeros(VOCAB_SIZE, VOCAB_SIZE))
        with torch.no_grad():
            self.logits[ids[:-1], ids[1:]] = 9.0
        self.config = SimpleNamespace(max_position_embeddings=max_positions)
        stop_ids = [tiny_tokenizer().convert_tokens_to_ids(stop) for stop in stops or []]
        self.generation_config = SimpleNamespace(eos_token_id=stop_ids or None)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


def language_model(text: str, **options: Any) -> BatchedLM:
    return BatchedLM(Scripted(text, **options).eval(), tiny_tokenizer(), batch_size=2)


def answer(lm: BatchedLM, prompt: str, **options: Any) -> str:
    request = Instance("generate_until", {"choices": ["a"] * 4}, (prompt, options), 0)
    return str(lm.generate_until([request])[0])


def test_stop_sequences_come_alone_or_in_a_list() -> None:
    lm = language_model("?xy\nABc")
    assert answer(lm, "q?", max_gen_toks=5) == "xy\nAB"
    for until in ("\n", ["\n"], ["B", "\n"], ["", "y\nA", "\n"]):
        assert answer(lm, "q?", max_gen_toks=5, until=until) == "xy"
    assert answer(lm, "q?", max_gen_toks=5, until="y\n") == "x"
    assert answer(lm, "q?", max_gen_toks=5, until="B\n") == "xy\nAB"  # not one of its letters
    assert answer(lm, "q?", max_gen_toks=5, until=None) == "xy\nAB"


def test_a_stop_token_is_no_answer_even_if_it_reads_like_one() -> None:
    lm = language_model("?xDyA", stops=["D"])
    lm.is_decided = is_decided
    text = answer(lm, "q?", max_gen_toks=5)
    assert text == "x" and first_letter(text, 4) is None
    assert answer(language_model("?xDyA"), "q?", max_gen_toks=4) == "xDyA"
    assert answer(language_model("?D", stops=["D"]), "q?", max_gen_toks=4) == ""


def test_a_decided_answer_ends() -> None:
    lm = language_model("?xBzzz")
    seen: list[str] = []

    def decided(row: Mapping[str, Any], text: str) -> bool:
        seen.append(text)
        return is_decided(row, text)

    lm.is_decided = decided
    assert answer(lm, "q?", max_gen_toks=5) == "xB" and seen == ["x", "xB"]


def test_defaults_are_the_harnesss() -> None:
    lm = language_model("aaa")
    assert answer(lm, "a") == "a" * 256
    assert answer(lm, "a", max_new_tokens=3) == "aaa"


def test_each_request_has_its_own_options() -> None:
    lm = language_model("?xyz")
    options: list[dict[str, Any]] = [{"max_gen_toks": 1}, {"max_gen_toks": 3}, {"max_gen_toks": 3, "until": "z"}]
    requests = [Instance("generate_until", {}, ("q?", each), 0) for each in options]
    assert lm.generate_until(requests) == ["x", "xyz", "xy"]


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"temperature": 0.7}, {"do_sample": True, "temperature": 1.0}]
)
def test_sampling_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PatError, match="expected greedy ones"):
        answer(language_model("aaa"), "a", max_gen_toks=3, **options)


@pytest.mark.parametrize("count", [8, 9])
def test_an_answer_must_leave_room_for_the_question(count: int) -> None:
    lm = language_model("aaa", max_positions=8)
    assert answer(lm, "aaaaaaaaaa", max_gen_toks=7) == "a" * 7
    with pytest.raises(PatError, match=f"answers of up to {count} tokens; expected fewer than the 8"):
        answer(lm, "a", max_gen_toks=count)


def test_a_text_that_begins_with_the_token_of_beginnings_gets_no_second_one() -> None:
    lm = language_model("ab")
    plain = lm.tok_encode("ab")
    assert len(plain) == 2  # this tokenizer adds none
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS_ID)]
    )
    assert lm.tok_encode("ab") == lm.tok_encode("<s>ab") == [BOS_ID, *plain]
    assert lm.tok_encode("ab", add_special_tokens=False) == plain


def test_an_empty_context_is_the_token_of_beginnings() -> None:
    lm = language_model("<s>a")
    requests = [Instance("loglikelihood", {}, ("", text), index) for index, text in enumerate("ab")]
    likely, unlikely = lm.loglikelihood(requests)
    assert likely[1] and not unlikely[1]
    assert likely[0] - unlikely[0] == pytest.approx(9.0)
