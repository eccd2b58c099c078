"""Cut a base model without training, and score it: each axis alone, and the shapes that look best under a budget.

Each axis is cut alone at a few sizes, calibrated and refitted as `pat tune` does it, and scored. Two axes at once are
taken to cost the sum of what each costs alone; the pairs for which that is least are then cut and scored themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model

from pat.checkpoint.card import shown_name
from pat.data.examples import prepare_examples
from pat.data.vocabulary import Vocabulary
from pat.errors import PatError
from pat.families import Family
from pat.loading import load_base, load_tokenizer
from pat.nll import Example, batches_from_examples, paired_standard_error, response_nll_by_row
from pat.plan.curves import Measured, Point, flags, interpolated
from pat.plan.target import check_of_target
from pat.plan.work import num_read
from pat.report.progress import Phase
from pat.shape import AXES, Shape
from pat.training.preflight.precision import bf16_pays_on_cpu
from pat.training.preflight.threads import Threads, threads_for
from pat.tuner.config import PatConfig
from pat.tuner.model import PatModel, find_tuner
from pat.tuner.prepare import check_config

SHARES = (1 / 3, 2 / 3, 1.0)
"""Points of a curve, as shares of the budget."""

SPLITS = (1 / 3, 1 / 2, 2 / 3)
"""Shares of the budget that the first axis of a pair takes."""

NUM_PAIRS = 3
"""Number of pairs of axes that are scored themselves."""

SLACK = 0.02
"""Furthest that a shape may lie from the budget, as a share of all parameters; heads and layers go in large steps.
Where the budget is that of a target, what exceeds the target is no candidate."""

NUM_TOKENS = 8192
"""Tokens to calibrate on, at most; `pat tune` reads more."""

NUM_SCORED_ROWS = 64
NUM_ROWS = 512
MAX_LENGTH = 512
BATCH_SIZE = 8

_BISECTIONS = 7


class ShapeScorer:
    """Cuts a base model to shapes and scores them, with the rows to calibrate and to score on."""

    def __init__(
        self, name: str, dataset: str, base_config: Any, family: Family, target: Mapping[str, Any] | None = None
    ) -> None:
        self.base_config, self.family, self.dataset = base_config, family, shown_name(dataset)
        self.target = dict(target or {})
        """Target that the budget was found for, by the name of its option; empty where a share was asked for."""
        self.is_met = check_of_target(self.target, base_config)
        self.losses: list[float] = []
        """Losses in the order in which they were measured, the base's first."""
        self.rows_of: dict[str, torch.Tensor] = {}
        """Losses of the scored rows by the flags of the shape, see `response_nll_by_row`; the base has no flags."""
        self.default: dict[str, int] = {}
        """Sizes that `pat tune` takes for the budget by itself; none before they are measured."""
        self.curves: dict[str, tuple[Point, ...]] = {}
        self.candidates: list[Point] = []
        tokenizer = load_tokenizer(name, config=base_config)
        vocabulary = Vocabulary(tokenizer, base_config.vocab_size)
        examples, _ = prepare_examples(
            dataset, vocabulary, template="auto", max_length=MAX_LENGTH, limit=NUM_ROWS + NUM_SCORED_ROWS
        )
        step = max(2, len(examples) // NUM_SCORED_ROWS)
        self.scored = examples[::step][:NUM_SCORED_ROWS]
        rest = [example for index, example in enumerate(examples) if index % step]
        if not rest:
            raise PatError(
                f"Got {len(examples)} rows in {dataset}; expected two or more, to calibrate and to score on."
            )
        self.pad_token_id = cast(int, tokenizer.pad_token_id)
        self.rows = list(_first(rest, NUM_TOKENS))
        self.model: Any = load_base(name)
        sizes = getattr(base_config, family.hidden_size_field), getattr(base_config, "intermediate_size", 0)
        pays = self.model.dtype == torch.float32 and bf16_pays_on_cpu(sizes[0], sizes[1] or sizes[0])
        self.threads: Threads | None = None
        """Threads that are fastest on this CPU; None on an accelerator, and where the user has chosen them."""
        if torch.accelerator.is_available():
            self.model, pays = self.model.to(cast(Any, torch.accelerator.current_accelerator())), False
        else:
            self.threads = threads_for(base_config, family, bf16=pays)
        self.num_threads: int | None = None
        """Number of threads that shapes were scored with; None before, and on an accelerator."""
        self.autocast = torch.autocast(self.model.device.type, torch.bfloat16, enabled=pays)

    def run(self, ratio: float, state: Phase, say: Callable[..., float] | None = None) -> None:
        """Score the base, the curve of each axis, and the pairs of axes that look best; say before how long it takes.

        Args:
            ratio: budget, as a share of all parameters.
            state: is told of each shape that is scored, and of how long all of them are expected to take.
            say: says so, and returns the seconds; see `say_expected_time`.
        """
        if self.model.device.type == "cpu":
            self.num_threads = torch.get_num_threads()
        shapes = {axis: self.curve(axis, ratio) for axis in AXES}
        shapes = {axis: found for axis, found in shapes.items() if found}
        rule = self.sizes_of(PatConfig(task_type="CAUSAL_LM", **(self.target or {"pruning_ratio": ratio})))
        curves = [{AXES[axis].option: size} for axis, found in shapes.items() for size in found]
        # Which pairs is not known yet; these take longest, so that the time that is left never grows.
        dearest = sorted(({AXES[a].option: 0, AXES[b].option: 0} for a, b in combinations(shapes, 2)), key=self.work)
        todo = [{}, *curves, *dearest[-1:] * NUM_PAIRS, rule]
        if say is not None:
            with self.autocast:
                seconds = say(self.model, self.scored[:BATCH_SIZE], sum(map(self.work, todo)), len(todo) - 1)
            state.expect(seconds)

        def scored(sizes: Mapping[str, int], share: float, predicted: float | None = None) -> Point:
            self.losses.append(self.nll(sizes))
            state.done += 1
            done, left = (sum(map(self.work, part)) for part in (todo[: state.done], todo[state.done :]))
            state.share = done / (done + left)
            return Point(dict(sizes), share, self.losses[-1], predicted, self.difference_error(sizes, {}))

        state.total = len(todo)
        base_nll = scored({}, 0.0).nll
        for axis, found in shapes.items():
            for size, share in found.items():
                self.curves[axis] = (*self.curves.get(axis, ()), scored({AXES[axis].option: size}, share))
        self.candidates += [points[-1] for points in self.curves.values() if self.is_candidate(points[-1].sizes, ratio)]
        pairs = sorted(self.pairs(base_nll, ratio), key=lambda pair: pair[1])[:NUM_PAIRS]
        todo[state.done :] = [sizes for sizes, _ in pairs]
        if rule not in [*(point.sizes for point in self.candidates), *todo[state.done :]]:
            todo.append(rule)
        state.total = len(todo)
        for sizes in todo[state.done :]:
            self.candidates.append(scored(sizes, self.ratio(sizes), self.predicted(sizes, base_nll)))
        self.default = rule

    def work(self, sizes: Mapping[str, int]) -> float:
        """Return about how long some sizes take to be cut and scored, in tokens that the base reads."""
        return num_read(
            sizes,
            num_layers=int(self.base_config.num_hidden_layers),
            num_calibrated=sum(map(_length, self.rows)),
            num_scored=sum(map(_length, self.scored)),
        )

    def measured(self) -> Measured:
        """Return what was measured so far, the best of the candidates first."""
        candidates = sorted(self.candidates, key=lambda point: point.nll)
        behind = [
            replace(point, best_error=self.difference_error(point.sizes, candidates[0].sizes))
            for point in candidates[1:]
        ]
        return Measured(
            dataset=self.dataset,
            num_calibration_tokens=sum(map(_length, self.rows)),
            num_scored_tokens=self.num_scored,
            base_nll=self.losses[0],
            curves=dict(self.curves),
            candidates=(*candidates[:1], *behind),
            default=self.default,
            num_threads=self.num_threads,
        )

    def curve(self, axis: str, ratio: float) -> dict[int, float]:
        """Return the sizes of an axis that come to shares of the budget, each with its share of all parameters."""
        found: dict[int, float] = {}
        for share in SHARES:
            try:
                shape = self.shape(PatConfig(task_type="CAUSAL_LM", axes=[axis], pruning_ratio=share * ratio))
            except PatError:  # cannot be cut, or not so far
                continue
            found[shape.pruned(axis)] = shape.pruning_ratio
        return found

    def pairs(self, base_nll: float, ratio: float) -> Iterator[tuple[dict[str, int], float]]:
        """Yield the sizes of pairs of axes that meet the budget together, and the loss that their curves predict."""
        for a, b in combinations(self.curves, 2):
            seen: list[dict[str, int]] = []
            for split in SPLITS:
                try:
                    sizes = self.meet(a, b, split * ratio, ratio)
                except PatError:  # not a shape that transformers loads
                    continue
                if sizes in seen or not self.is_candidate(sizes, ratio):
                    continue
                seen.append(sizes)
                yield sizes, cast(float, self.predicted(sizes, base_nll))

    def is_candidate(self, sizes: Mapping[str, int], ratio: float) -> bool:
        """Tell whether some sizes come near enough to the budget, and have no more than its target allows."""
        shape = self.shape_of(sizes)
        return abs(shape.pruning_ratio - ratio) <= SLACK and self.is_met(shape)

    def predicted(self, sizes: Mapping[str, int], base_nll: float) -> float | None:
        """Return the loss if axes at once cost what each does by its curve; None for one axis, or without a curve."""
        ratios = {axis: self.ratio({option: sizes[option]}) for axis in AXES if (option := AXES[axis].option) in sizes}
        if len(ratios) < 2 or not ratios.keys() <= self.curves.keys():
            return None
        return base_nll + sum(interpolated(self.curves[axis], base_nll, ratio) for axis, ratio in ratios.items())

    def difference_error(self, sizes: Mapping[str, int], other: Mapping[str, int]) -> float | None:
        """Return the standard error of how far the losses of two shapes are apart, over the same rows."""
        rows, others = (self.rows_of.get(flags(found)) for found in (sizes, other))
        return None if rows is None or others is None else paired_standard_error(rows, others)

    def meet(self, a: str, b: str, share: float, ratio: float) -> dict[str, int]:
        """Return sizes of two axes that come to a ratio, and meet the target; the first takes a share of all."""
        first = self.sizes_of(PatConfig(task_type="CAUSAL_LM", axes=[a], pruning_ratio=share))
        low, high, best = 0.0, ratio, dict[str, int]()
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            try:
                sizes = first | self.sizes_of(PatConfig(task_type="CAUSAL_LM", axes=[b], pruning_ratio=middle))
                shape = self.shape_of(sizes)
            except PatError:  # so little that nothing is cut of the second
                low = middle
                continue
            found = shape.pruning_ratio
            if (not best or abs(found - ratio) < abs(self.ratio(best) - ratio)) and self.is_met(shape):
                best = sizes
            low, high = (middle, high) if found < ratio else (low, middle)
        if not best:
            raise PatError(f"Got axes {a} and {b}, which cannot come to {ratio:g} together.")
        return best

    def shape(self, config: PatConfig) -> Shape:
        """Return the shape that a configuration comes to."""
        return check_config(self.base_config, self.family, config)

    def shape_of(self, sizes: Mapping[str, int]) -> Shape:
        """Return the shape that some sizes come to."""
        return self.shape(PatConfig(task_type="CAUSAL_LM", **cast(Any, sizes)))

    def ratio(self, sizes: Mapping[str, int]) -> float:
        """Return the share of all parameters that some sizes cut."""
        return self.shape_of(sizes).pruning_ratio

    def sizes_of(self, config: PatConfig) -> dict[str, int]:
        """Return the sizes that a configuration cuts, by their options."""
        shape = self.shape(config)
        return {AXES[axis].option: shape.pruned(axis) for axis in AXES if shape.cuts(axis)}

    def nll(self, sizes: Mapping[str, int]) -> float:
        """Cut the base model to some sizes, without training, and return the loss of the scored rows."""
        if not sizes:
            return self._score(self.model, sizes)
        refits = not sizes.keys().isdisjoint({AXES["mlp"].option, AXES["heads"].option})
        refit: dict[str, Any] = {"refit_tokens": NUM_TOKENS} if refits else {}
        config = PatConfig(task_type="CAUSAL_LM", r=1, milestone=0.0, **refit, **cast(Any, dict(sizes)))
        model = cast(PeftModel, get_peft_model(self.model, config))
        tuner = cast(PatModel, find_tuner(model))
        try:
            with self.autocast:
                tuner.calibrate(self._batches())
                tuner.set_step(0, 0)
                if any(gate.awaits_refit for gate in tuner.gates().values()):
                    tuner.refit(self._batches())
            return self._score(model, sizes)
        finally:
            self.model = model.unload()

    def _score(self, model: Any, sizes: Mapping[str, int]) -> float:
        with self.autocast:
            found, rows = response_nll_by_row(model, self.scored, batch_size=BATCH_SIZE, pad_token_id=self.pad_token_id)
        self.num_scored = found.num_tokens
        self.rows_of[flags(sizes)] = rows
        return found.nll

    def _batches(self) -> Iterator[dict[str, Any]]:
        return batches_from_examples(
            self.rows, batch_size=BATCH_SIZE, pad_token_id=self.pad_token_id, sort_by_length=True
        )


def _length(row: Example) -> int:
    return len(row["input_ids"])


def _first(rows: list[Example], num_tokens: int) -> Iterator[Example]:
    """Yield rows until there are enough tokens."""
    for row in rows:
        if num_tokens <= 0:
            return
        num_tokens -= _length(row)
        yield row
