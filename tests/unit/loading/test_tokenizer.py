"""Tokenizers: padding that is not written, special tokens that have no row, and what a run writes of its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build, tiny_tokenizer
from transformers import AutoTokenizer, GenerationConfig

from pat.errors import PatError
from pat.loading import TokenSetup, check_special_ids, load_tokenizer, padded

CONFIG = build("llama", tied=True, num_hidden_layers=1).config


def unpadded(**fields: Any) -> Any:
    tokenizer = tiny_tokenizer()
    for name, value in ({"pad_token": None} | fields).items():
        setattr(tokenizer, name, value)
    return tokenizer


def config(**fields: Any) -> Any:
    changed = type(CONFIG).from_dict(CONFIG.to_dict())
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


@pytest.mark.parametrize(
    ("tokenizer", "config_id", "expected"),
    [
        (tiny_tokenizer(), 2, "<pad>"),
        (unpadded(), 1, "<s>"),
        (unpadded(), None, "</s>"),
        (unpadded(), -1, "</s>"),
        (unpadded(eos_token=None), None, "<s>"),
        (unpadded(eos_token=None, bos_token=None, unk_token=None), None, "<pad>"),
    ],
)
def test_there_is_always_a_token_to_pad_with(tokenizer: Any, config_id: int | None, expected: str) -> None:
    before = tokenizer.pad_token
    assert padded(tokenizer, config(pad_token_id=config_id)).pad_token == expected
    assert tokenizer.pad_token == before


def test_special_tokens_need_a_row(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    check_special_ids(tokenizer, len(tokenizer))
    tokenizer.add_tokens(["<unused>"])  # other added tokens are judged by the data
    check_special_ids(tokenizer, len(tokenizer) - 1)
    num_rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    message = rf"knows {num_rows + 1} tokens, the model {num_rows}: its pad_token '\[PAD\]' is token {num_rows}; resize"
    with pytest.raises(PatError, match=message):
        load_tokenizer(str(tmp_path), config=config(vocab_size=num_rows))


def setup(
    tokenizer: Any, *, eos: Any = 2, pad: int | None = 0, generation: dict[str, Any] | None = None, base: Any = None
) -> TokenSetup:
    given = None if generation is None else GenerationConfig(**generation)
    return TokenSetup.of(
        config(eos_token_id=eos, pad_token_id=pad), given, tokenizer, base_tokenizer=base or tiny_tokenizer()
    )


def ids(tokens: TokenSetup) -> tuple[Any, Any, Any, Any]:
    """Return end of text and padding, each as `config.json` and as the generation config has it."""
    own, generation = tokens.token_ids, tokens.generation_config
    return own["eos_token_id"], generation.eos_token_id, own["pad_token_id"], generation.pad_token_id


def test_a_run_that_changes_no_token_says_what_the_base_says() -> None:
    generation = {"eos_token_id": [2, 5], "pad_token_id": 3, "bos_token_id": 1}
    assert ids(setup(tiny_tokenizer(), generation=generation)) == (2, [2, 5], 0, 3)
    # Not even where the base contradicts itself, or has no padding token at all.
    assert ids(setup(tiny_tokenizer(), pad=1, generation=generation)) == (2, [2, 5], 1, 3)
    assert ids(setup(unpadded(), pad=None, generation={"eos_token_id": 2}, base=unpadded())) == (2, 2, None, None)


def test_the_runs_own_end_of_text_comes_first() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|user|>"
    assert ids(setup(tokenizer, generation={"eos_token_id": 2, "pad_token_id": 0})) == (5, [5, 2], 0, 0)
    assert ids(setup(tokenizer, eos=[2, 6], generation={"eos_token_id": [2, 6]})) == ([5, 2, 6], [5, 2, 6], 0, None)
    assert ids(setup(tokenizer, eos=None, generation={})) == (5, 5, 0, None)


def test_the_runs_own_padding_is_written() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    assert ids(setup(tokenizer, generation={"eos_token_id": 2, "pad_token_id": 0})) == (2, 2, 3, 3)


def test_saved_tokens_are_the_same_tokens(tmp_path: Path) -> None:
    """Under names that transformers 4 knows: it cannot load a TokenizersBackend, nor special tokens in a list."""
    tokenizer = unpadded()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<more>"]})
    setup(tokenizer, base=tokenizer).save(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in written
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.pad_token is None
    assert loaded.all_special_tokens == tokenizer.all_special_tokens
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("a<more>b<|user|>é").input_ids == tokenizer("a<more>b<|user|>é").input_ids
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2


def test_an_unknown_token_that_is_no_token_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"unk_token": ""}))
    with pytest.raises(PatError, match="Could not load a tokenizer"):
        load_tokenizer(str(tmp_path))
