"""What a run calibrates on: a seeded sample of the trainer's batches, its rows' texts or tokens, or a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny_models import BOS_ID, tiny_tokenizer
from tiny_training import Examples, pat_config
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, default_data_collator

from pat.errors import PatError
from pat.training.callbacks.calibration_data import calibration_batches
from pat.training.inputs.calibration_text import calibration_pieces

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def rows_read(dataset: Any, tokenizer: Any = None, collate: Any = list) -> list[list[int]]:
    """The real tokens of every row that a calibration is given, in order."""
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate)
    read = []
    for batch in calibration_batches(pat_config(), loader, tokenizer):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            read.append(ids[mask.bool()].tolist())
    return read


def test_batches_with_token_ids_are_taken_as_they_are_from_a_sample_seeded_by_itself() -> None:
    """Instruction files are often sorted: the first rows would all be alike."""
    data = Examples(20)
    orders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        orders.append(rows_read(data, collate=default_data_collator))
        assert torch.equal(torch.get_rng_state(), state)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    assert order != sorted(order)
    assert orders[0] == orders[1] == [data.ids[index].tolist() for index in order]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen_input_ids": [5, 6], "rejected_input_ids": [5, 7], "prompt_input_ids": [5]}, [5, 6]),
        ({"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}, [5, 6, 7]),
        ({"prompt_ids": [5, 6], "completion_ids": [9], "label": True}, [5, 6, 9]),
        ({"prompt_input_ids": [5, 6], "prompt": "no"}, [5, 6]),
        ({"input_ids": list(range(5, 100)) * 6, "prompt": "no"}, (list(range(5, 100)) * 6)[:512]),
    ],
    ids=str,
)
def test_tokens_under_other_names(row: dict[str, Any], expected: list[int]) -> None:
    assert rows_read(Dataset.from_list([row])) == [expected]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "say", "answer": "5"}, "say"),
        ({"prompt": "say", "chosen": " a", "rejected": " b"}, "say a"),
        ({"prompt": "say", "completion": " a", "label": False}, "say a"),
        ({"text": "all of it", "label": "x"}, "all of it"),
        # Beside a prompt, what rewards are reckoned by.
        ({"prompt": TALK[:1], "text": "m", "messages": TALK}, TALK[:1]),
        ({"prompt": TALK[:1], "completion": "a reference"}, TALK[:1]),
        ({"prompt": "say it", "completion": 5, "messages": 5, "text": 5}, "say it"),
        ({"chosen": "a", "rejected": "b"}, "a"),
        ({"messages": TALK}, TALK),
        ({"prompt": TALK[:1]}, TALK[:1]),
        ({"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]}, TALK),
    ],
    ids=str,
)
def test_texts_and_conversations(row: dict[str, Any], text: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    if isinstance(text, str):
        expected = tokenizer(text)["input_ids"]
    else:
        expected = tokenizer.apply_chat_template(text, return_dict=True)["input_ids"]
    assert rows_read(Dataset.from_list([row]), tokenizer) == [expected]


def test_rows_are_padded_sampled_and_streamed(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "x" * (1 + index)} for index in range(9)] + [{"prompt": ""}]
    expected = [tokenizer(row["prompt"])["input_ids"] for row in rows[:9]]
    sampled = rows_read(Dataset.from_list(rows), tokenizer)
    assert sampled != expected and sorted(sampled) == sorted(expected)  # the empty one is left out
    streamed: Any = IterableDataset.from_generator(lambda: iter(rows))
    assert rows_read(streamed.with_format("torch"), tokenizer) == expected


@pytest.mark.parametrize("columns", [["rejected"], ["question", "answer"]])
def test_rows_that_cannot_be_read_name_the_three_ways_out(
    columns: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    ways = r"PatConfig\.calibration.*model\.calibrate\(.*rotation='none'"
    with pytest.raises(PatError, match=f"{columns[0]}.*{ways}"):
        rows_read(Dataset.from_list([dict.fromkeys(columns, "x")]), tokenizer)
    with pytest.raises(PatError, match=f"'prompt'.*{ways}"):  # a text, and nothing to read it with
        rows_read(Dataset.from_list([{"prompt": "x"}]), None)
    without_template = tiny_tokenizer()
    without_template.chat_template = None
    with pytest.raises(PatError, match=f"tokenizer cannot read .*messages.*{ways}"):
        rows_read(Dataset.from_list([{"messages": TALK}]), without_template)
    with pytest.raises(PatError, match=f"no training data.*{ways}"):
        calibration_batches(pat_config(), None, tokenizer)


def test_every_piece_of_a_text_file_starts_as_the_tokenizer_starts_texts(tmp_path: Path) -> None:
    """Gemma's stream is another one without its first token."""
    file = tmp_path / "text.txt"
    file.write_text("abc" * 400, encoding="utf-8")
    config, plain = pat_config(calibration=str(file)), tiny_tokenizer()
    (batch,) = calibration_batches(config, None, plain)
    assert batch["input_ids"].shape == (2, 512) and BOS_ID not in batch["input_ids"]
    starting = tiny_tokenizer()
    starting.add_bos_token = True
    starting.update_post_processor()
    (batch,) = calibration_batches(config, None, starting)
    assert batch["input_ids"].shape == (2, 512)
    assert (batch["input_ids"][:, 0] == BOS_ID).all() and not (batch["input_ids"][:, 1:] == BOS_ID).any()
    assert batch["input_ids"][:, 1:].flatten().tolist() == plain("abc" * 400)["input_ids"][: 2 * 511]
    file.write_text("ab", encoding="utf-8")
    (batch,) = calibration_batches(config, None, starting)
    assert batch["input_ids"].tolist() == [[BOS_ID, *plain("ab")["input_ids"]]]


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    class Deaf:
        bos_token_id = 1

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [self.bos_token_id]}

    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(PatError, match="of which the tokenizer makes no token"):
        calibration_pieces(str(tmp_path / "text.txt"), Deaf())
