"""Nats by tokens of the base: the plain mean for the base's tokenizer, the same text for any other."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compare.scoring import Scorer
from compare.tokens import tokenize_examples
from tiny_models import build, tiny_tokenizer

from pat.data.load import load_training_data
from pat.loading import load_tokenizer
from pat.nll import response_nll

ROWS = [{"prompt": f"say {i} ", "completion": "so much and more " * (1 + i % 4)} for i in range(12)]

MAX_LENGTH = 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return path


class Uniform(torch.nn.Module):
    """Gives every token the same chance, so that a score says how many tokens were scored."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(size))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return type("Output", (), {"logits": self.scale.expand(*input_ids.shape, -1)})


def test_for_the_bases_tokenizer_it_is_the_mean_over_tokens(path: Path) -> None:
    tokenizer, model = tiny_tokenizer(), build("llama", tied=True)
    rows = load_training_data(path, tokenizer=tokenizer, held_out=0).train
    examples = tokenize_examples(tokenizer, rows, MAX_LENGTH)
    assert any(len(example["input_ids"]) == MAX_LENGTH for example in examples)  # some are cut
    expected = response_nll(model, examples, batch_size=8, pad_token_id=tokenizer.pad_token_id)
    scorer = Scorer(path, tokenizer, MAX_LENGTH)
    assert scorer(model, tokenizer) == expected
    assert scorer(model, copy.deepcopy(tokenizer)) == expected  # as it comes back from a folder


def test_another_tokenizer_reads_the_same_text_and_its_nats_are_shared_out_among_the_bases_tokens(
    path: Path, tests_data: Path
) -> None:
    base, own = load_tokenizer(str(tests_data / "stories260K")), tiny_tokenizer()  # of pieces of words, of characters
    scorer = Scorer(path, base, 24)
    num_cut = 0
    for theirs, ours in zip(scorer.examples(base), scorer.examples(own), strict=True):
        read, also = (
            tokenizer.decode(row["input_ids"], skip_special_tokens=True)
            for tokenizer, row in ((base, theirs), (own, ours))
        )
        assert read == also
        is_cut = theirs["input_ids"][-1] != base.eos_token_id
        assert (ours["input_ids"][-1] != own.eos_token_id) == is_cut
        num_cut += is_cut
    assert 0 < num_cut < len(ROWS)
    found = scorer(Uniform(len(own)), own)
    num_scored = sum(label != -100 for row in scorer.examples(own) for label in row["labels"][1:])
    assert found.num_tokens == scorer.num_tokens < num_scored
    assert found.nll == pytest.approx(math.log(len(own)) * num_scored / scorer.num_tokens)
