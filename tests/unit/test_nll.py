"""NLL of responses and text."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pat.errors import PatError
from pat.nll import (
    batches_from_examples,
    paired_standard_error,
    read_text,
    response_nll,
    response_nll_by_row,
    split_text,
    text_perplexity,
)

# float32 model and log-softmax against float64 of both: 1e-7 relative per operation, averaged over tokens.
FLOAT32_TOLERANCE = 2e-6

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "a question and its answer", "Question: Answer:"] * 4


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def make_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    values = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "initializer_range": 0.2,  # far from uniform predictions, so that a wrong position shows
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**values)).eval()


def make_examples(count: int = 7, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        length = 5 + 9 * index % 31
        ids = torch.randint(6, 320, (length,), generator=generator).tolist()
        num_prompt = index % 4
        examples.append({"input_ids": ids, "labels": [-100] * num_prompt + ids[num_prompt:]})
    return examples


def reference_nll(model: LlamaForCausalLM, examples: list[dict[str, list[int]]]) -> tuple[float, int]:
    """Row by row without padding, model and log-softmax in float64, one token at a time."""
    exact = LlamaForCausalLM(model.config).double().eval()
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            ids = example["input_ids"]
            logits = exact(input_ids=torch.tensor([ids])).logits[0]
            for position in range(1, len(ids)):
                if example["labels"][position] != -100:
                    row = logits[position - 1]
                    total += (torch.logsumexp(row, 0) - row[ids[position]]).item()
                    count += 1
    return total / count, count


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_response_nll_equals_float64_unbatched(batch_size: int) -> None:
    model, examples = make_model(), make_examples()
    expected, count = reference_nll(model, examples)
    result = response_nll(model, examples, batch_size=batch_size, pad_token_id=0)
    assert result.num_tokens == count
    assert result.nll == pytest.approx(expected, abs=FLOAT32_TOLERANCE)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_the_standard_error_is_that_of_rows_drawn_at_random() -> None:
    """By the formula in float64, and about what drawing the rows again and again gives."""
    model, examples = make_model(), make_examples(count=60)
    parts = [reference_nll(model, [example]) for example in examples]
    sums = torch.tensor([nll * num for nll, num in parts], dtype=torch.float64)
    nums = torch.tensor([num for _, num in parts], dtype=torch.float64)
    result = response_nll(model, examples, batch_size=8, pad_token_id=0)
    residuals = sums - sums.sum() / nums.sum() * nums
    expected = (60 / 59 * residuals.square().sum()).sqrt() / nums.sum()
    assert result.standard_error == pytest.approx(float(expected), rel=1e-4)
    draws = torch.randint(60, (4000, 60), generator=torch.Generator().manual_seed(0))
    spread = (sums[draws].sum(1) / nums[draws].sum(1)).std()
    assert result.standard_error == pytest.approx(float(spread), rel=0.1)
    assert response_nll(model, examples[:1], batch_size=8, pad_token_id=0).standard_error is None

    other = reference_nll(base := make_model(initializer_range=0.21), examples)[0]
    base_rows = torch.stack([torch.tensor([reference_nll(base, [e])[0] for e in examples]).double() * nums, nums], 1)
    losses, rows = response_nll_by_row(model, examples, batch_size=8, pad_token_id=0)
    assert torch.allclose(rows, torch.stack([sums, nums], 1), atol=1e-3)
    differences = rows[:, 0] - base_rows[:, 0]
    spread = (differences[draws].sum(1) / nums[draws].sum(1)).std()
    assert losses.nll - other == pytest.approx(float(differences.sum() / nums.sum()), abs=1e-4)
    assert paired_standard_error(rows, base_rows) == pytest.approx(float(spread), rel=0.1)
    assert paired_standard_error(rows, rows) == 0


def test_many_scored_tokens_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = make_model(), make_examples()
    expected, count = reference_nll(model, examples)
    monkeypatch.setattr("pat.nll.LOGIT_ROWS", 5)  # pieces that do not divide the rows
    result = response_nll(model, examples, batch_size=4, pad_token_id=0)
    assert (result.nll, result.num_tokens) == (pytest.approx(expected, abs=FLOAT32_TOLERANCE), count)


def test_padding_and_order_do_not_matter() -> None:
    model, examples = make_model(), make_examples()
    expected = response_nll(model, examples, batch_size=1, pad_token_id=0).nll
    for variant, pad_token_id in ((examples, 0), (examples, 77), (examples[::-1], 5)):
        result = response_nll(model, variant, batch_size=len(examples), pad_token_id=pad_token_id)
        assert result.nll == pytest.approx(expected, abs=FLOAT32_TOLERANCE)


def test_modes_and_gradients_are_left_alone() -> None:
    model = make_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    examples = make_examples(3)
    first = response_nll(model, examples, batch_size=2, pad_token_id=0)
    assert first == response_nll(model, examples, batch_size=2, pad_token_id=0)  # no dropout while scoring
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, **inputs: Tensor) -> Tensor:
            assert not torch.is_grad_enabled() and not self.training
            raise RuntimeError("out of memory")

    broken = Broken().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        response_nll(broken, examples, batch_size=2, pad_token_id=0)
    assert broken.training


def test_progress_counts_batches() -> None:
    seen: list[tuple[int, int]] = []
    response_nll(make_model(), make_examples(7), batch_size=3, pad_token_id=0, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_nothing_to_score_is_an_error() -> None:
    # A first token has nothing to condition on.
    for examples in (
        [],
        [{"input_ids": [9], "labels": [9]}],
        [{"input_ids": [9, 8], "labels": [-100] * 2}],
    ):
        with pytest.raises(PatError, match="without a response token"):
            response_nll(make_model(), examples, batch_size=2, pad_token_id=0)


def test_perplexity_of_a_hopeless_model() -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    result = response_nll(model, make_examples(3), batch_size=3, pad_token_id=0)
    assert 710 < result.nll < math.inf and result.perplexity == math.inf


def test_batches_are_padded_on_the_right() -> None:
    examples = [
        {"input_ids": [5, 6], "labels": [-100, 6]},
        {"input_ids": [7, 8, 9], "labels": [-100, 8, -100]},
        {"input_ids": [4], "labels": [4]},
    ]
    first, second = batches_from_examples(examples, batch_size=2, pad_token_id=3)
    assert {key: value.tolist() for key, value in first.items()} == {
        "input_ids": [[5, 6, 3], [7, 8, 9]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [[-100, 6, -100], [-100, 8, -100]],
    }
    assert second["input_ids"].tolist() == [[4]] and second["labels"].dtype == torch.int64
    by_length = batches_from_examples(examples, batch_size=1, pad_token_id=3, sort_by_length=True)
    assert [batch["input_ids"].tolist() for batch in by_length] == [[[7, 8, 9]], [[5, 6]], [[4]]]


TEXT = "the quick brown fox jumps over the lazy dog. a question and its answer! " * 3


def reference_text_nll(
    model: LlamaForCausalLM, ids: list[int], *, context: int, prefix: list[int]
) -> tuple[float, int]:
    """The plain loop: each token under the window that its position falls into."""
    room = context - len(prefix)
    stride = room - 1
    total, count = 0.0, 0
    with torch.no_grad():
        for position in range(len(ids)):
            beyond = max(0, position + 1 - room)
            end = min(len(ids), room + math.ceil(beyond / stride) * stride)
            start = max(0, end - room)
            inputs = prefix + ids[start:position]
            if inputs:
                logits = model(input_ids=torch.tensor([inputs])).logits[0, -1].double()
                total += (torch.logsumexp(logits, 0) - logits[ids[position]]).item()
                count += 1
    return total / count, count


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("context", [16, 250])
def test_text_perplexity_equals_the_plain_loop(bos: bool, context: int) -> None:
    model, tokenizer = make_model(), make_tokenizer(bos=bos)
    ids = tokenizer(TEXT)["input_ids"]
    prefix, body = (ids[:1], ids[1:]) if bos else ([], ids)
    expected, count = reference_text_nll(model, body, context=context, prefix=prefix)

    result = text_perplexity(model, tokenizer, TEXT, context=context, batch_size=3)

    assert count == result.num_tokens == len(ids) - 1
    assert result.nll == pytest.approx(expected, abs=FLOAT32_TOLERANCE)


def test_text_from_a_file_and_its_first_tokens(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert read_text(path) == TEXT
    path.write_text(TEXT, encoding="utf-8-sig")  # with a byte-order mark
    assert read_text(path) == TEXT
    head = tokenizer.decode(tokenizer(TEXT)["input_ids"][:20])
    expected = text_perplexity(model, tokenizer, head, context=8)
    assert text_perplexity(model, tokenizer, TEXT, context=8, max_tokens=20) == expected
    assert expected.num_tokens == 19


def test_pieces_of_a_text_begin_as_the_tokenizer_begins_texts() -> None:
    for bos in (False, True):
        tokenizer = make_tokenizer(bos=bos)
        ids = tokenizer(TEXT)["input_ids"]
        prefix, body = (ids[:1], ids[1:]) if bos else ([], ids)
        pieces = split_text(tokenizer, TEXT, 16)
        assert all(piece[: len(prefix)] == prefix and len(piece) <= 16 for piece in pieces)
        assert [token for piece in pieces for token in piece[len(prefix) :]] == body
        assert sum(map(len, split_text(tokenizer, TEXT, 100, max_tokens=20))) == 20


def test_windows_stay_within_the_models_positions() -> None:
    seen: list[int] = []
    model = make_model(max_position_embeddings=16)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    text_perplexity(model, make_tokenizer(), TEXT)
    assert max(seen) == 16


def test_text_errors(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    for path, match in (
        (tmp_path / "none.txt", "none.txt: no such file"),
        (tmp_path, "no such file"),
        (tmp_path / "empty.txt", "empty.txt is empty"),
        (tmp_path / "binary.txt", "not readable as UTF-8"),
    ):
        with pytest.raises(PatError, match=match):
            read_text(path)
    with pytest.raises(PatError, match="Got a text of 1 tokens"):
        text_perplexity(model, tokenizer, "a")
    with pytest.raises(PatError, match="context of 1 tokens"):
        text_perplexity(model, tokenizer, TEXT, context=1)
