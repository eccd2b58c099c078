"""A run with a trimmed vocabulary: one unit for its losses, one budget, and adapters that find their rows again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pat
from pat.checkpoint.merge import merge
from pat.data.examples import prepare_examples
from pat.data.vocabulary import Vocabulary
from pat.errors import PatError
from pat.nll import response_nll, text_perplexity
from pat.surgery.describe import count_parameters
from pat.training.tune import TuneResult
from tests.tiny_runs import tune_flags

TESTS = Path(__file__).parents[1]
STORIES, DATA = TESTS / "data" / "stories260K", TESTS / "data" / "instructions.jsonl"
SIZE = 384


def flags(out: Path, **more: Any) -> dict[str, Any]:
    return tune_flags(STORIES, DATA, out, axes="auto", max_length=384, vocabulary_size=SIZE, milestone=0.34, **more)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    return pat.tune(**flags(tmp_path_factory.mktemp("trimmed") / "out"))


def test_the_vocabulary_counts_towards_the_budget(run: TuneResult) -> None:
    cut = run.record.cut
    assert cut.vocab_size == 512 and cut.pruned_vocab_size == SIZE
    assert cut.num_parameters_base == count_parameters(AutoModelForCausalLM.from_pretrained(STORIES).config)
    assert cut.num_parameters == pytest.approx(0.75 * cut.num_parameters_base, rel=0.01)
    assert "| vocabulary | 512 | 384 (" in (run.model_dir / "README.md").read_text(encoding="utf-8")


def test_losses_are_those_of_the_text_in_the_bases_tokens(run: TuneResult) -> None:
    """Recomputed with the written files alone: total nats of a text over the base's count of its tokens."""
    held_out = run.output_dir.parent / "held_out.jsonl"
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()[:8]]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    again = pat.tune(**flags(run.output_dir.parent / "again", held_out=str(held_out), general_text=str(DATA)))
    totals, of_text = {}, {}
    for name in (STORIES, again.model_dir):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        vocabulary = Vocabulary(tokenizer, model.config.vocab_size)
        examples, _ = prepare_examples(str(held_out), vocabulary, template="auto", max_length=None)
        totals[name] = response_nll(model, examples, batch_size=8, pad_token_id=0)
        of_text[name] = text_perplexity(model, tokenizer, DATA.read_text(encoding="utf-8")[:20_000], context=256)
    base, dense = totals[STORIES], totals[again.model_dir]
    assert dense.num_tokens > base.num_tokens
    found = again.figures["dense"]
    assert found.num_held_out_tokens == base.num_tokens
    assert found.held_out_nll == pytest.approx(dense.nll * dense.num_tokens / base.num_tokens, abs=1e-5)
    assert again.figures["base"].held_out_nll == pytest.approx(base.nll, abs=1e-5)
    base, dense = of_text[STORIES], of_text[again.model_dir]
    assert dense.num_tokens > base.num_tokens == found.num_general_tokens
    assert found.general_nll == pytest.approx(dense.nll * dense.num_tokens / base.num_tokens, abs=1e-5)
    assert again.figures["base"].general_nll == pytest.approx(base.nll, abs=1e-5)


@pytest.mark.parametrize("adapter", ["adapter", "compact/adapter"])
def test_either_adapter_merges_and_the_last_is_the_model(run: TuneResult, adapter: str, tmp_path: Path) -> None:
    result = merge(run.output_dir / adapter, tmp_path / "merged", progress=False)
    model, tokenizer = (kind.from_pretrained(result.model_dir) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == SIZE == len(tokenizer) and result.record.cut.pruned_vocab_size == SIZE
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    if adapter != "adapter":
        ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
        dense = AutoModelForCausalLM.from_pretrained(run.model_dir)
        assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-5)


def test_a_run_goes_on_as_if_it_had_not_stopped(run: TuneResult, tmp_path: Path) -> None:
    more = {"save_strategy": "steps", "save_steps": 1, "keep_checkpoints": True}
    whole = pat.tune(**flags(tmp_path / "whole", **more))
    for stage, step in (("", 1), ("compact", 4)):
        out = tmp_path / f"from-{step}"
        for folder in ("compact", "adapter"):  # what stage two goes on from
            shutil.copytree(tmp_path / "whole" / folder, out / folder)
        found = tmp_path / "whole" / "checkpoints" / stage / f"checkpoint-{step}"
        again = pat.tune(**flags(out, **more, resume_from_checkpoint=str(found)))
        assert again.figures["dense"].held_out_nll == whole.figures["dense"].held_out_nll


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"vocabulary_size": 512}, "vocabulary_size=512; expected a multiple of 64 below the base's 512"),
        ({"vocabulary_size": 100}, "vocabulary_size=100; expected a multiple of 64"),
        ({"vocabulary_size": 320, "pruning_ratio": 0.02}, "the vocabulary alone saves"),
    ],
)
def test_impossible_sizes_leave_nothing_behind(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PatError, match=message):
        pat.tune(**(flags(tmp_path / "out") | more))
    assert not (tmp_path / "out").exists()
