"""A trimmed vocabulary writes every text, and the texts it was made for in the same tokens."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pat.errors import PatError
from pat.loading.trimming import choose_tokens, kept_tokens, trim_embedding, trim_tokenizer
from tests.tiny_models import build

STORIES = Path(__file__).parents[2] / "data" / "stories260K"

TEXTS = ["Once upon a time there was a little red car.", "The cat and the dog are friends; they play together."]

STRANGE = "Größe 東京 zygomorphic — naïve\n\t café 🦊!"


def byte_level() -> PreTrainedTokenizerFast:
    """Train byte-level BPE, as Llama 3 and Qwen have it, with a template that adds a first token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f"{a}{b}{c}" for a in ("un", "re") for b in ("play", "friend", "time", "car") for c in ("ing", "s")]
    tokenizer.train_from_iterator([*TEXTS * 3, " ".join(words), Path(__file__).read_text(encoding="utf-8")], trainer)
    tokenizer.add_special_tokens(["<|end|>"])  # beyond the vocabulary of the model, as chat tokens are
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>")


def sentencepiece() -> PreTrainedTokenizerBase:
    """Load BPE of characters with single bytes to fall back on, as Llama 2 and Mistral have it."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(STORIES)
    return loaded


TOKENIZERS = pytest.mark.parametrize(("make", "size"), [(byte_level, 448), (sentencepiece, 384)])


def counted(tokenizer: PreTrainedTokenizerBase) -> Counter[int]:
    return Counter(token for text in TEXTS for token in tokenizer(text)["input_ids"])


@TOKENIZERS
def test_counted_texts_keep_their_tokens_and_others_come_back_as_they_were(make, size) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    kept = choose_tokens(tokenizer, counted(tokenizer), size)
    trimmed = trim_tokenizer(tokenizer, kept)
    assert len(trimmed) == size == len(kept) < len(tokenizer)
    for text in TEXTS:
        assert [kept[token] for token in trimmed(text)["input_ids"]] == tokenizer(text)["input_ids"]
    ids = trimmed(STRANGE)["input_ids"]
    assert len(ids) >= len(tokenizer(STRANGE)["input_ids"])
    assert trimmed.decode(ids, skip_special_tokens=True) == tokenizer.decode(
        tokenizer(STRANGE)["input_ids"], skip_special_tokens=True
    )
    assert kept_tokens(tokenizer, trimmed) == kept
    for name in ("bos_token", "eos_token"):
        assert getattr(trimmed, name) == getattr(tokenizer, name)
        assert kept[getattr(trimmed, f"{name}_id")] == getattr(tokenizer, f"{name}_id")


@TOKENIZERS
def test_a_written_tokenizer_is_the_trimmed_one(make, size, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    trimmed = trim_tokenizer(tokenizer, choose_tokens(tokenizer, counted(tokenizer), size))
    trimmed.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(STRANGE)["input_ids"] == trimmed(STRANGE)["input_ids"] and loaded.get_vocab() == trimmed.get_vocab()


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_logits_are_the_bases_for_the_tokens_that_stay(tied: bool) -> None:
    base, model = (build("llama", tied=tied, vocab_size=160, eos_token_id=[2, 7], bos_token_id=1) for _ in range(2))
    kept = [1, 2, *range(10, 72)]
    trim_embedding(model, kept)
    ids = torch.arange(64).view(4, 16)
    with torch.no_grad():
        expected = base(input_ids=torch.tensor(kept)[ids]).logits[..., kept]
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.config.vocab_size == 64 and model.config.eos_token_id == [1] and model.config.bos_token_id == 0
    assert model.config.tie_word_embeddings is tied


@pytest.mark.parametrize("size", [0, 100, 512, 1024])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(PatError, match=f"vocabulary_size={size}; expected a multiple of 64 below the tokenizer's 512"):
        choose_tokens(sentencepiece(), {}, size)


def test_too_few_places_and_other_tokenizers_are_refused() -> None:
    with pytest.raises(PatError, match="are special or single bytes"):
        choose_tokens(sentencepiece(), {}, 128)
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)])))
    with pytest.raises(PatError, match="Unigram; only byte-pair"):
        choose_tokens(unigram, {}, 64)


def test_templates_and_words_that_are_taken_whole_survive() -> None:
    """Llama 3 looks a whole word up before it merges (`ignore_merges`); some tokenizers have several chat templates."""
    tokenizer = byte_level()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["ignore_merges"] = True
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<|end|>")
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool": "{{ messages[0]['role'] }}"}
    kept = choose_tokens(tokenizer, counted(tokenizer), 448)
    trimmed = trim_tokenizer(tokenizer, kept)
    assert trimmed.chat_template == tokenizer.chat_template
    for text in TEXTS:
        assert [kept[token] for token in trimmed(text)["input_ids"]] == tokenizer(text)["input_ids"]
    assert trimmed.decode(trimmed(STRANGE)["input_ids"]) == tokenizer.decode(tokenizer(STRANGE)["input_ids"])


def test_an_end_token_stays_though_no_text_has_it_and_nothing_marks_it() -> None:
    spec = json.loads(byte_level().backend_tokenizer.to_str())
    rare = max(spec["model"]["vocab"], key=lambda token: (len(token), token))
    ending = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token=rare)
    named = spec["model"]["vocab"][rare]
    assert named not in choose_tokens(byte_level(), counted(byte_level()), 320)
    assert named in choose_tokens(byte_level(), counted(byte_level()), 320, needed=[named])
    assert ending.eos_token_id in choose_tokens(ending, counted(ending), 320)


def test_a_special_token_that_is_lost_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama", tied=True, vocab_size=160, eos_token_id=[2, 7], bos_token_id=1)
    trim_embedding(model, [1, 2, *range(10, 72)])
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["0, 7."]  # 0 is for padding


def test_what_generation_forbids_forces_and_favours_is_renumbered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Old numbers would name other tokens; a sequence is left out if one of its tokens is."""
    model = build("llama", tied=True, vocab_size=160, eos_token_id=2, bos_token_id=1)
    GenerationConfig(
        suppress_tokens=[2, 5, 12],
        forced_eos_token_id=11,
        bad_words_ids=[[10, 11], [12, 100]],
        sequence_bias=[[[13], -2], [[10, 101], 1]],
    ).save_pretrained(tmp_path)
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    trim_embedding(model, [1, 2, *range(10, 72)])
    generation = model.generation_config
    assert generation.suppress_tokens == [1, 4] and generation.forced_eos_token_id == 3
    assert "names in suppress_tokens, bad_words_ids, sequence_bias; what" in caplog.text
    assert generation.bad_words_ids == [[2, 3]] and generation.sequence_bias == [[[5], -2.0]]
    model.generation_config = GenerationConfig(sequence_bias={(13,): -2.0, (10, 101): 1.0}, bad_words_ids=[[100]])
    trim_embedding(model, [*range(10, 64)])
    assert model.generation_config.sequence_bias == {(3,): -2.0} and model.generation_config.bad_words_ids is None


def test_marked_subwords_are_refused() -> None:
    marked = Tokenizer(models.BPE(vocab={"a": 0, "##b": 1}, merges=[], continuing_subword_prefix="##"))
    with pytest.raises(PatError, match="continuing_subword_prefix, whose merges cannot be trimmed"):
        choose_tokens(PreTrainedTokenizerFast(tokenizer_object=marked), {}, 64)


def test_another_bases_tokenizer_is_refused() -> None:
    trimmed = trim_tokenizer(byte_level(), choose_tokens(byte_level(), {}, 448))
    with pytest.raises(PatError, match="expected the base that it was made of"):
        kept_tokens(sentencepiece(), trimmed)


def test_a_trimmed_base_is_a_stock_checkpoint(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    tokenizer = sentencepiece()
    kept = choose_tokens(tokenizer, counted(tokenizer), 384)
    trim_embedding(model, kept)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = trim_tokenizer(tokenizer, kept)(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
