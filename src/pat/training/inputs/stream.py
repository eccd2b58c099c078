"""Training data that is made while training goes on: tokens of rows as they are read, without an end."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from datasets import Features, IterableDataset

from pat.data.conversion import ROW, Conversion
from pat.data.counts import counts_of_batch
from pat.data.mixture import shares
from pat.data.record import DataRecord, combined, sums
from pat.data.streamed import StreamedSource
from pat.data.tokens import FEATURES, TRAINED_ON, Encoder
from pat.data.vocabulary import Vocabulary
from pat.errors import PatError, RunFailed

if TYPE_CHECKING:
    from pat.training.arguments import TuneArguments

logger = logging.getLogger(__name__)

SHUFFLED_ROWS = 1000
"""Examples among which the next one is drawn."""

BATCH = 100
"""Examples of which tokens are made at once: the first step waits for no more."""

COUNTED = [f.name for f in fields(DataRecord) if f.type == "int" and "held_out" not in f.name]

IS_FIRST = "is_first"
"""Key of an example with whether it is the first of its row."""


@dataclass
class Tally:
    """What one pass over a stream has come to, so far."""

    counts: list[Counter[str]]
    """Counts of each source, by their names in `DataRecord`; of the first time that it is read."""
    num_refused: list[int]
    """Number of examples of each that the chat template refuses."""
    drawn: list[int]
    """Number of examples that each source has given."""
    num_tokens: int = 0
    """Number of tokens of these examples."""

    @property
    def num_drawn(self) -> int:
        """Number of examples that the sources have given."""
        return sum(self.drawn)


@dataclass
class Stream:
    """Examples to train on of one source, or of several by weight, in an order that seed and rows alone decide.

    A source that is at its end begins again.
    """

    sources: Sequence[StreamedSource]
    weights: Sequence[float]
    encoder: Encoder
    vocabulary: Vocabulary
    seed: int
    shuffles: bool
    """Whether the next example is drawn among `SHUFFLED_ROWS`, or is the next one of the source."""
    known: Sequence[DataRecord]
    """Records of the sources, as their first rows were counted."""
    tally: Tally = field(init=False)
    """Of the pass that was begun last."""
    said: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        arguments: TuneArguments,
        sources: Sequence[StreamedSource],
        encoder: Encoder,
        vocabulary: Vocabulary,
        records: Sequence[DataRecord],
    ) -> Stream:
        """Return the stream that the arguments of a run ask for."""
        sft = arguments.sft
        weights = arguments.run.dataset_weights or [1.0]
        seed = sft.seed if sft.data_seed is None else sft.data_seed
        return cls(sources, weights, encoder, vocabulary, seed, sft.train_sampling_strategy == "random", records)

    def __post_init__(self) -> None:
        self.tally = self._new_tally()

    def dataset(self) -> IterableDataset:
        """Return the examples as SFTTrainer takes them: `input_ids` and `labels`."""
        return IterableDataset.from_generator(self.examples, Features({name: FEATURES[name] for name in TRAINED_ON}))

    def examples(self) -> Iterator[dict[str, list[int]]]:
        """Yield examples from the beginning, without an end.

        At every moment each source has given its share of them, to within one example.

        Raises:
            RunFailed: a row cannot be used, or a source has nothing to train on.
        """
        tally = self.tally = self._new_tally()
        wanted = shares(self.weights)
        given = [self._of_source(number, tally) for number in range(len(wanted))]
        while True:
            behind = [share * (tally.num_drawn + 1) - num for share, num in zip(wanted, tally.drawn, strict=True)]
            number = behind.index(max(behind))
            try:
                example = next(given[number])
            except RunFailed:
                raise
            except PatError as error:
                way_out = (
                    " The rows before were fine: with --on_bad_row skip, the same command goes on from its last "
                    "checkpoint, and leaves such rows out."
                )
                raise RunFailed(f"{error}{way_out if error.of_row else ''}") from error
            tally.drawn[number] += 1
            tally.num_tokens += len(example["input_ids"])
            yield example

    @property
    def record(self) -> DataRecord:
        """Record of the data as its first rows were counted."""
        return self._together(self.known, self.weights)

    def read(self, num_examples: int) -> tuple[DataRecord, int]:
        """Return the record of the data after a training, and about how many tokens that has seen.

        Args:
            num_examples: number of examples that were trained on. If this process has not read them, it does so now.
        """
        if self.tally.num_drawn < num_examples:
            for _ in islice(self.examples(), num_examples):
                pass
        tally = self.tally
        counts: list[Any] = tally.counts
        records = [replace(record, **found) for record, found in zip(self.known, counts, strict=True)]
        seen = round(tally.num_tokens * num_examples / max(1, tally.num_drawn))
        return self._together(records, tally.drawn if tally.num_drawn else self.weights), seen

    @staticmethod
    def _together(records: Sequence[DataRecord], weights: Sequence[float]) -> DataRecord:
        return records[0] if len(records) == 1 else combined(records, shares(weights), [None] * len(records))

    def _new_tally(self) -> Tally:
        num = len(self.sources)
        return Tally([Counter(dict.fromkeys(COUNTED, 0)) for _ in range(num)], [0] * num, [0] * num)

    def _of_source(self, number: int, tally: Tally) -> Iterator[dict[str, list[int]]]:
        source = self.sources[number]
        kept_by = "num_targets" if self.encoder.cut.max_length is None else "num_left"
        for time in count():
            conversion = source.conversion()
            examples = _marked(source.examples(conversion))
            if self.shuffles:
                examples = shuffled(examples, random.Random(f"{self.seed} {number} {time}"))
            num_given = 0
            while batch := list(islice(examples, BATCH)):
                columns = {name: [example[name] for example in batch] for name in batch[0]}
                encoded = {**self.encoder(columns), IS_FIRST: columns[IS_FIRST]}
                if time == 0:
                    self._count(tally, number, conversion, encoded)
                for ids, labels, left, refusal in zip(
                    *(encoded[name] for name in (*TRAINED_ON, kept_by, "refusal")), strict=True
                ):
                    if not refusal and left:
                        num_given += 1
                        yield {"input_ids": ids, "labels": labels}
            if not num_given:
                raise RunFailed(f"{source.name}: none of its {conversion.num_rows:,} rows has anything to learn.")
            if time == 0:
                self._count(tally, number, conversion, None)
                self._say(
                    f"{source.name} is at its end after {conversion.num_rows:,} rows, which gave {num_given:,} "
                    "examples, and begins again."
                )

    def _count(self, tally: Tally, number: int, conversion: Conversion, encoded: Mapping[str, Any] | None) -> None:
        """Add what was read, and what became of it."""
        counts, cut = tally.counts[number], self.encoder.cut
        first_refusal = ""
        if encoded is not None:
            found = counts_of_batch(encoded, encoded[IS_FIRST])
            self.vocabulary.check(found.largest_token)
            counts.update(sums(found, cut, conversion.format.name))
            tally.num_refused[number] += found.num_refused
            first_refusal = found.first_refusal
        counts["num_rows"] = conversion.num_rows
        counts["num_dropped"] = conversion.num_rows - conversion.num_usable - conversion.num_bad
        counts["num_skipped"] = conversion.num_bad + tally.num_refused[number]
        if not self.known[number].num_skipped and (first := conversion.first_bad or first_refusal):
            self._say(
                f"Rows of {conversion.name} cannot be used and are skipped, as --on_bad_row says", f"; one is {first}"
            )

    def _say(self, what: str, more: str = "") -> None:
        """Warn of a thing once, however often the data is read."""
        if what not in self.said:
            self.said.add(what)
            logger.warning("%s%s", what, more)


def _marked(examples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Note of each example whether it is the first of its row; a conversation gives several."""
    last = -1
    for example in examples:
        yield example | {IS_FIRST: example[ROW] != last}
        last = example[ROW]


def shuffled(examples: Iterable[dict[str, Any]], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield examples in a random order, each drawn among the next `SHUFFLED_ROWS`."""
    examples = iter(examples)
    waiting = list(islice(examples, SHUFFLED_ROWS))
    for example in examples:
        place = rng.randrange(SHUFFLED_ROWS)
        drawn, waiting[place] = waiting[place], example
        yield drawn
    rng.shuffle(waiting)
    yield from waiting
