"""Logits of many sequences: batched, sorted by length, shared beginnings computed once.

A beginning is computed into a key-value cache, whose rows are then handed to the sequences that go on from it. Rows are
padded on the right, so that padding comes after every real token; the attention mask hides it from what follows, and
explicit position ids make up for the columns it takes. Where a model's cache cannot do that, every sequence is computed
from its first token, in batches all the same.

Shapes: B rows of a batch, T tokens of its longest row, C columns of the cache with T, K kept positions, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pat.evaluation.tasks.prefixes import Item, plan_prefixes, similar_batches
from pat.nll import Progress

UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Scored:
    """What to read off the last positions of a sequence: the likelihood of these tokens, one a position."""

    item: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class _State:
    """Computed beginnings, one a row."""

    cache: Any
    mask_BC: Tensor
    lengths: list[int]
    """Real tokens of each row."""

    def rows(self, indices: Sequence[int]) -> _State:
        """Return the state of these rows, each as often as it is named; the original can be used again."""
        index = torch.tensor(indices, device=self.mask_BC.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]  # updates replace tensors, never write to them
        cache.batch_select_indices(index)
        return _State(cache, self.mask_BC[index], [self.lengths[i] for i in indices])


@dataclass(frozen=True)
class _Leaves:
    """A computed batch: the last positions of some items."""

    indices: list[int]
    logits_BKV: Tensor
    columns: dict[int, int]
    """Where in K the position with this many tokens after the shared beginning is."""
    own: list[int]
    """Tokens of each row that this batch computed."""
    state: _State | None
    """To go on from; None where there is no cache to go on with."""


class BatchedModel:
    """Forward passes of one causal language model over many sequences.

    Args:
        model: takes `input_ids`, `attention_mask`, `position_ids`, `past_key_values` and `use_cache`, returns `.logits`
            and `.past_key_values`; in eval mode.
        batch_size: rows of a forward pass.
        share: False computes every sequence from its first token.
    """

    def __init__(self, model: nn.Module, *, pad_token_id: int, batch_size: int, share: bool = True) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        self._keeps_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self.max_columns = self._probe() if share else 0
        self.num_tokens = 0
        """Tokens computed so far, padding included."""

    @torch.no_grad()
    def score(
        self, items: Sequence[Item], requests: Sequence[Scored], progress: Progress | None = None
    ) -> list[tuple[float, bool]]:
        """Return for each request the log-likelihood of its targets, in nats, and whether greedy decoding gives them.

        The targets belong to the last positions of the item. Log-softmax in float32.
        """
        wanted: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            wanted.setdefault(request.item, []).append(number)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for leaves in self._leaves(items, reserve=0):
            rows, columns, targets, sizes = list[int](), list[int](), list[int](), list[int]()
            numbers = [(row, number) for row, index in enumerate(leaves.indices) for number in wanted.get(index, ())]
            for row, number in numbers:
                request = requests[number]
                size = len(request.targets)
                rows += [row] * size
                columns += [leaves.columns[leaves.own[row] - offset] for offset in range(size, 0, -1)]
                targets += request.targets
                sizes.append(size)
            logits_NV = leaves.logits_BKV[rows, columns].float()
            targets_N = torch.tensor(targets, device=self.device)
            likelihoods = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0].cpu()
            greedy = (logits_NV.argmax(-1) == targets_N).cpu()
            parts = zip(numbers, likelihoods.split(sizes), greedy.split(sizes), strict=True)
            for (_, number), likelihood, equal in parts:
                results[number] = (float(likelihood.sum()), bool(equal.all()))
            done += len(leaves.indices)
            if progress is not None:
                progress(done, len(items))
        return results

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        is_done: Callable[[int, list[int]], bool],
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """Continue prompts greedily; a row ends when `is_done(prompt index, new tokens)` or at `max_new_tokens`."""
        items = [Item(tuple(prompt), 1) for prompt in prompts]
        new: list[list[int]] = [[] for _ in prompts]
        finished = 0
        for leaves in self._leaves(items, reserve=max_new_tokens):
            columns = [leaves.columns[own - 1] for own in leaves.own]
            tokens = leaves.logits_BKV[list(range(len(columns))), columns].argmax(-1).tolist()
            live, state = leaves.indices, leaves.state
            while True:
                for index, token in zip(live, tokens, strict=True):
                    new[index].append(token)
                going = [
                    row
                    for row, index in enumerate(live)
                    if len(new[index]) < max_new_tokens and not is_done(index, new[index])
                ]
                live = [live[row] for row in going]
                if not live:
                    break
                if state is None:
                    grown = [Item((*prompts[index], *new[index]), 1) for index in live]
                    last = self._whole(grown, list(range(len(grown))))
                    columns = [last.columns[own - 1] for own in last.own]
                    tokens = last.logits_BKV[list(range(len(columns))), columns].argmax(-1).tolist()
                else:
                    logits_BKV, state = self._extend(state.rows(going), [[new[index][-1]] for index in live])
                    tokens = logits_BKV[:, -1].argmax(-1).tolist()
            finished += len(leaves.indices)
            if progress is not None:
                progress(finished, len(items))
        return new

    def _leaves(self, items: Sequence[Item], *, reserve: int) -> Iterator[_Leaves]:
        """Compute all items, shared beginnings first; `reserve` columns of the cache are kept free."""
        fits = [index for index, item in enumerate(items) if len(item.tokens) + reserve <= self.max_columns]
        small = set(fits)
        yield from self._batches_of_whole(items, [index for index in range(len(items)) if index not in small])
        plan = plan_prefixes([items[index] for index in fits])
        root = self._extend(None, [items[fits[0]].tokens[: plan.root]])[1] if plan.root else None
        alone = [fits[family.members[0]] for family in plan.families if len(family.members) == 1]
        yield from self._on(items, root, [(index, 0) for index in alone], reserve)
        families = [family for family in plan.families if len(family.members) > 1]
        for some in similar_batches(families, lambda family: family.length - plan.root, self.batch_size):
            start = None if root is None else root.rows([0] * len(some))
            stems = [items[fits[family.members[0]]].tokens[plan.root : family.length] for family in some]
            state = self._extend(start, stems, keep=torch.tensor([0]))[1]
            members = [(fits[member], row) for row, family in enumerate(some) for member in family.members]
            yield from self._on(items, state, members, reserve)

    def _on(
        self, items: Sequence[Item], state: _State | None, members: list[tuple[int, int]], reserve: int
    ) -> Iterator[_Leaves]:
        """Compute items, each on top of a row of a state, the longest first."""

        def own(member: tuple[int, int]) -> int:
            index, row = member
            return len(items[index].tokens) - (0 if state is None else state.lengths[row])

        for some in similar_batches(members, own, self.batch_size):
            indices = [index for index, _ in some]
            columns = (0 if state is None else state.mask_BC.shape[1]) + own(some[0]) + reserve
            if columns > self.max_columns:  # padding of the beginnings took what the window has
                yield self._whole(items, indices)
                continue
            start = None if state is None else state.rows([row for _, row in some])
            rows = [items[member[0]].tokens[-own(member) :] for member in some]
            kept, keep = _kept([items[index].num_scored for index in indices], [len(row) for row in rows])
            logits_BKV, after = self._extend(start, rows, keep=keep, reserve=reserve)
            yield _Leaves(indices, logits_BKV, kept, [len(row) for row in rows], after)

    def _batches_of_whole(self, items: Sequence[Item], indices: list[int]) -> Iterator[_Leaves]:
        for some in similar_batches(indices, lambda index: len(items[index].tokens), self.batch_size):
            yield self._whole(items, some)

    def _whole(self, items: Sequence[Item], indices: list[int]) -> _Leaves:
        """Compute items from their first tokens, without a cache."""
        rows = [items[index].tokens for index in indices]
        own = [len(row) for row in rows]
        kept, keep = _kept([items[index].num_scored for index in indices], own)
        input_ids, mask = self._pad(rows)
        logits_BKV, _ = self._forward(keep, input_ids=input_ids, attention_mask=mask, use_cache=False)
        return _Leaves(indices, logits_BKV, kept, own, None)

    def _extend(
        self, state: _State | None, rows: Sequence[Sequence[int]], *, keep: Tensor | None = None, reserve: int = 1
    ) -> tuple[Tensor, _State]:
        """Compute the next tokens of each row of a state, or first tokens; logits at `keep`, by default at the last."""
        input_ids, new_mask = self._pad(rows)
        past = [0] * len(rows) if state is None else state.lengths
        mask_BC = new_mask if state is None else torch.cat([state.mask_BC, new_mask], dim=1)
        # Padding repeats the row's last position: no model has to know more positions than the row has tokens.
        positions_BT = (new_mask.cumsum(1) - 1).clamp(min=0) + torch.tensor(past, device=self.device)[:, None]
        logits_BKV, cache = self._forward(
            torch.tensor([input_ids.shape[1] - 1]) if keep is None else keep,
            input_ids=input_ids,
            attention_mask=mask_BC,
            position_ids=positions_BT,
            past_key_values=None if state is None else state.cache,
            use_cache=state is not None or reserve > 0,
        )
        return logits_BKV, _State(cache, mask_BC, [a + len(b) for a, b in zip(past, rows, strict=True)])

    def _forward(self, keep: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        """Run the model; return its logits at the positions `keep` of the new tokens, and its cache."""
        self.num_tokens += inputs["input_ids"].numel()
        inputs = {name: value for name, value in inputs.items() if value is not None}
        keep = keep.to(self.device)
        if self._keeps_logits:  # most of the work of a small model lies in the logits that nobody asks for
            inputs["logits_to_keep"] = keep
        output = self.model(**inputs)
        logits: Tensor = output.logits if self._keeps_logits else output.logits[:, keep]
        return logits, getattr(output, "past_key_values", None)

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return tokens and mask, padded on the right."""
        width = max(len(row) for row in rows)
        ids = [[*row, *[self.pad_token_id] * (width - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    @torch.no_grad()
    def _probe(self) -> int:
        """Return how many columns the model's cache can hold and share: 0 for none, the window where it slides."""
        ids = torch.tensor([[self.pad_token_id]], device=self.device)
        output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        layers = getattr(getattr(output, "past_key_values", None), "layers", None)
        if not layers or not hasattr(output.past_key_values, "batch_select_indices"):
            return 0
        columns = UNLIMITED
        for layer in layers:
            if type(layer) is DynamicSlidingWindowLayer:
                columns = min(columns, layer.sliding_window - 1)
            elif type(layer) is not DynamicLayer:
                return 0
        return columns


def _kept(num_scored: Sequence[int], lengths: Sequence[int]) -> tuple[dict[int, int], Tensor]:
    """Return the positions that any row is read off at: where each lies among the kept ones, and the positions."""
    pairs = zip(num_scored, lengths, strict=True)
    positions = sorted({position for scored, length in pairs for position in range(length - scored, length)})
    return {position: column for column, position in enumerate(positions)}, torch.tensor(positions)
