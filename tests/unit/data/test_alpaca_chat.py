"""Alpaca's words as a chat template: the tokens of the training prompt, whatever a tokenizer sets before a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tiny_models import tiny_tokenizer
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from pat.data.alpaca_chat import alpaca_chat, is_alpaca_chat
from pat.data.formats import ALPACA
from pat.data.tokens import Encoder

STORIES = Path(__file__).resolve().parents[2] / "data" / "stories260K"


def plain() -> Any:
    """A tokenizer that sets nothing before a text."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def with_bos() -> Any:
    """One that sets a BOS token before it, and a space before the first word wherever that stands."""
    return AutoTokenizer.from_pretrained(STORIES)


def with_bos_and_eos() -> Any:
    """One that ends every text with a token as well."""
    tokenizer = with_bos()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def with_a_space_at_the_start_alone() -> Any:
    """One that sets no space before a word behind a token that is written, as Llama's does in its newer form."""
    tokenizer = with_bos()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def with_other_tokens() -> Any:
    """One that sets other tokens than BOS before a text, as GLM's."""
    tokenizer = plain()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("[gMASK]", special=True)]})
    mask = tokenizer.convert_tokens_to_ids("[gMASK]")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <s> $A", special_tokens=[("[gMASK]", mask), ("<s>", 1)]
    )
    return tokenizer


KINDS = (plain, with_bos, with_bos_and_eos, with_a_space_at_the_start_alone, with_other_tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", ["Add 1 and 2.", "\n two\n\nlines ", "Say <b>{{ this }}</b>"])
def test_a_chat_has_the_tokens_of_the_training(kind: Callable[[], Any], asked: str, tmp_path: Path) -> None:
    tokenizer = kind()
    batch = {"prompt": [ALPACA.format(instruction=asked)], "completion": ["It is 3."]}
    trained = Encoder(tokenizer)(batch)
    num_prompt = trained["labels"][0].count(-100)
    template = alpaca_chat(tokenizer)
    assert template is not None and is_alpaca_chat(template)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == template
    chat = [{"role": "user", "content": asked}]
    made = loaded.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert made == trained["input_ids"][0][:num_prompt]
    whole = loaded.apply_chat_template([*chat, {"role": "assistant", "content": "It is 3."}], return_dict=True)
    end = [tokenizer.eos_token_id]
    assert whole["input_ids"] == trained["input_ids"][0][: len(whole["input_ids"])] and whole["input_ids"][-1:] == end


def test_the_bos_token_is_written_only_where_the_tokenizer_sets_it() -> None:
    assert "bos_token" not in str(alpaca_chat(plain()))
    assert str(alpaca_chat(with_bos())).startswith("{{- bos_token -}}")


def test_turns_follow_each_other_and_a_system_message_is_part_of_the_next_instruction() -> None:
    tokenizer = with_bos()
    tokenizer.chat_template = alpaca_chat(tokenizer)
    turns = [("system", "Be brief."), ("system", ""), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    first, second = ALPACA.format(instruction="Be brief.\n\nHi"), ALPACA.format(instruction="Bye")
    assert text == f"<s>{first}Yes?</s>{second}"
    for wrong in ([*messages, messages[0]], [{"role": "tool", "content": "3"}]):
        with pytest.raises(TemplateError, match="Alpaca's words"):
            tokenizer.apply_chat_template(wrong, tokenize=False)


def test_no_template_is_better_than_one_of_other_tokens() -> None:
    tokenizer = with_bos()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 0)]
    )
    tokenizer.add_tokens([AddedToken("<unk>", special=True, rstrip=True)])
    assert alpaca_chat(tokenizer) is None
