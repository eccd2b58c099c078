"""Batches with shared beginnings give what one plain forward pass a sequence gives, in every family."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import KINDS, SLIDING_WINDOW, build
from torch import Tensor, nn

from pat.evaluation.tasks.batched import UNLIMITED, BatchedModel, Scored
from pat.evaluation.tasks.prefixes import Item

SHARED_TOLERANCE = 1e-4
"""Float32 sums in another order; logits here are near 1, a wrong mask or position moves them by 0.1 and more."""

SLIDING = {"mistral", "gemma2", "gemma3_text"}


def sequences(num: int = 9) -> list[Item]:
    """Sequences of 20 to 45 tokens: a root of 12, families with 8 more, and strangers to the families."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(4, 128) for _ in range(count)]

    root = tokens(12)
    stems = [root + tokens(draw.randint(9, 14)) for _ in range(3)]
    return [Item((*(stems[i % 3] if i % 4 else root), *tokens(draw.randint(4, 19))), 1 + i % 3) for i in range(num)]


def plain_logits(model: nn.Module, tokens: tuple[int, ...]) -> Tensor:
    """Logits (T, V) of one sequence, nothing clever."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def plain_score(model: nn.Module, item: Item, targets: tuple[int, ...]) -> tuple[float, bool]:
    logits = plain_logits(model, item.tokens)[-len(targets) :]
    picked = logits.log_softmax(-1)[torch.arange(len(targets)), list(targets)]
    return float(picked.sum()), logits.argmax(-1).tolist() == list(targets)


def plain_greedy(model: nn.Module, prompt: tuple[int, ...], count: int) -> list[int]:
    new: list[int] = []
    for _ in range(count):
        new.append(int(plain_logits(model, (*prompt, *new))[-1].argmax()))
    return new


def make_requests(model: nn.Module, items: list[Item]) -> list[Scored]:
    """Two requests for the last positions of each item: some tokens, and the greedy ones."""
    greedy = [plain_logits(model, item.tokens)[-item.num_scored :].argmax(-1).tolist() for item in items]
    random_targets = [Scored(i, tuple(range(5, 5 + item.num_scored))) for i, item in enumerate(items)]
    return random_targets + [Scored(i, tuple(tokens)) for i, tokens in enumerate(greedy)] + [Scored(2, (9,))]


def assert_like_plain(model: nn.Module, batched: BatchedModel, items: list[Item]) -> None:
    requests = make_requests(model, items)
    for request, (likelihood, greedy) in zip(requests, batched.score(items, requests), strict=True):
        expected, expected_greedy = plain_score(model, items[request.item], request.targets)
        assert likelihood == pytest.approx(expected, abs=SHARED_TOLERANCE)
        assert greedy == expected_greedy
    prompts = [item.tokens for item in items]
    stops = [index % 4 + 1 for index in range(len(prompts))]  # rows leave at different steps
    made = batched.generate(prompts, max_new_tokens=4, is_done=lambda index, new: len(new) >= stops[index])
    assert made == [plain_greedy(model, prompt, stop) for prompt, stop in zip(prompts, stops, strict=True)]


@pytest.mark.parametrize("family", KINDS)
def test_shared_batches_equal_plain_passes(family: str) -> None:
    window = {"sliding_window": 128} if family in SLIDING else {}  # nothing slides out: these share, too
    model, items = build(family, tied=True, **window), sequences()
    batched = BatchedModel(model, pad_token_id=0, batch_size=3)
    assert batched.max_columns == (127 if family in SLIDING else UNLIMITED)
    assert_like_plain(model, batched, items)


@pytest.mark.parametrize("family", sorted(SLIDING))
@pytest.mark.parametrize("window", [SLIDING_WINDOW, 30, 50])
def test_what_a_sliding_window_would_cut_is_not_shared(family: str, window: int) -> None:
    """8: nothing fits; 30: some sequences do; 50: all do, but not every padded batch of them."""
    model, items = build(family, tied=True, sliding_window=window), sequences()
    batched = BatchedModel(model, pad_token_id=0, batch_size=3)
    assert batched.max_columns == window - 1
    assert_like_plain(model, batched, items)


def test_sharing_computes_fewer_tokens_and_the_same() -> None:
    model, items = build("llama", tied=True), sequences(12)
    requests = make_requests(model, items)
    shared, plain = (BatchedModel(model, pad_token_id=0, batch_size=4, share=share) for share in (True, False))
    assert plain.max_columns == 0
    pairs = zip(shared.score(items, requests), plain.score(items, requests), strict=True)
    assert all(a[0] == pytest.approx(b[0], abs=SHARED_TOLERANCE) and a[1] == b[1] for a, b in pairs)
    assert shared.num_tokens < 0.7 * plain.num_tokens


def test_padding_reads_no_position_that_the_model_does_not_have() -> None:
    """Two families in one batch; a row ends where the model's positions end, another is longer after its beginning."""
    model = build("llama", tied=True, max_position_embeddings=46)
    long, short = tuple(range(4, 44)), tuple(range(60, 96))  # what each family shares: 40 and 36 tokens
    items = [Item((*stem, *[100 + i] * own), 1) for stem, own in ((long, 6), (short, 10)) for i in range(2)]
    positions, widths = list[Tensor](), list[int]()

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])
        widths.append(positions[-1].shape[1])

    batched = BatchedModel(model, pad_token_id=0, batch_size=4)
    hook = model.get_submodule("model.rotary_emb").register_forward_pre_hook(look, with_kwargs=True)
    results = batched.score(items, [Scored(index, (7,)) for index in range(4)])
    hook.remove()
    assert widths == [40, 10] and positions[-1].shape[0] == 4  # all four on their beginnings, at once
    assert max(int(seen.max()) for seen in positions) == 45
    for item, (likelihood, _) in zip(items, results, strict=True):
        assert likelihood == pytest.approx(plain_score(model, item, (7,))[0], abs=SHARED_TOLERANCE)


def test_a_row_that_is_done_is_not_computed_on() -> None:
    model, items = build("llama", tied=True), sequences(4)
    costs = []
    for stop in (1, 4):
        batched = BatchedModel(model, pad_token_id=0, batch_size=4)
        before = batched.num_tokens
        prompts = [item.tokens for item in items]
        batched.generate(prompts, max_new_tokens=4, is_done=lambda _, new, stop=stop: len(new) >= stop)
        costs.append(batched.num_tokens - before)
    assert costs[1] - costs[0] == 3 * len(items)


class Custom(nn.Module):
    """Not a transformers model: takes what the contract names, keeps the cache to itself or hands it out."""

    def __init__(self, model: Any, hands_out: bool) -> None:
        super().__init__()
        self.model, self.config, self.hands_out = model, model.config, hands_out

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        assert self.hands_out or past_key_values is None
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return SimpleNamespace(logits=output.logits, past_key_values=output.past_key_values if self.hands_out else None)


@pytest.mark.parametrize("hands_out", [True, False])
def test_a_module_of_any_class_will_do(hands_out: bool) -> None:
    model = Custom(build("llama", tied=False), hands_out).eval()
    batched = BatchedModel(model, pad_token_id=0, batch_size=4)
    assert (batched.max_columns > 0) == hands_out
    assert_like_plain(model, batched, sequences())
