"""What is trained on is what SFTTrainer would make of the same rows; what is lost on the way is counted and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTTrainer

from pat.training.arguments import TuneArguments, build_arguments
from pat.training.data import load_training_data
from pat.training.prepare import Prepared, prepare

# Like ChatML: every turn ends with the end token and a line break, a generation prompt opens the answer.
CHAT_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}{{ style }}<eos>{% endif %}"
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('not\nthis') }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.reasoning_content }}{{ m.tool_calls | tojson if m.tool_calls }}{{ m.content }}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "a question and its answer", "Question: Answer:"] * 4
VOCABULARY = 320


def make_tokenizer(*, bos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, so that tokens merge across the prompt's end."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bos:
        ids = [("<bos>", inner.token_to_id("<bos>"))]
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=ids)
    inner.enable_truncation(7)  # as some are saved; a call turns it off
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a configuration and a tokenizer with a chat template: no weights are needed to look at data."""
    disable_progress_bars()
    return make_base(tmp_path / "base", make_tokenizer())


def make_base(path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(base: Path, data: Path, **flags: Any) -> TuneArguments:
    given = {"held_out": "0", "output_dir": str(base.parent / "out"), "use_cpu": True, "bf16": False} | flags
    return build_arguments(model_name_or_path=str(base), dataset_name=str(data), report_to="none", **given)


def prepared(base: Path, rows: list[Any], **flags: Any) -> Prepared:
    file = write(base.parent / "data.jsonl", rows)
    return prepare(arguments(base, file, **flags), AutoConfig.from_pretrained(base))


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = [{"type": "function", "function": {"name": "find", "arguments": {"what": "fox"}}}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "strings": [
        {"prompt": "Question: the fox?\n", "completion": "the dog"},
        {"prompt": "Question: the ", "completion": "quick fox"},  # the space merges with the completion
        {"prompt": "", "completion": "answer"},
        {"prompt": "lazy dog " * 60, "completion": "cut away"},
        {"prompt": "dog", "completion": "ends<eos>"},
        {"prompt": "the dog ", "completion": "a question and its answer " * 40},
    ],
    "chat": [
        {"prompt": [say("user", "the fox?")], "completion": [say("assistant", "the dog")]},
        {
            "prompt": [say("system", "a"), say("user", "b"), say("assistant", "c"), say("user", "d")],
            "completion": [say("assistant", "and its answer", reasoning_content="quick")],
        },
        {"prompt": [say("user", "lazy dog " * 60)], "completion": [say("assistant", "cut away")]},
        {"prompt": [say("user", "x")], "completion": [say("assistant", "", tool_calls=CALL), say("tool", "y")]},
    ],
    "tools": [
        {
            "prompt": [say("user", f"the fox {number}?")],
            "completion": [say("assistant", "dog")],
            "tools": [{"name": "find", "more": {"number": number}}],
            "chat_template_kwargs": {"style": "short"},
        }
        for number in range(3)
    ],
    "text": [{"text": "the quick brown fox"}, {"text": "over the lazy dog " * 40}, {"text": "a question"}],
}

CUTS: dict[str, dict[str, Any]] = {
    "uncut": {"max_length": None},
    "keep-start": {"max_length": 64},
    "keep-end": {"max_length": 64, "truncation_mode": "keep_end"},
    "bfd": {"max_length": 64, "packing": True},
    "bfd-split": {"max_length": 64, "packing": True, "packing_strategy": "bfd_split"},
    "wrapped": {"max_length": 64, "packing": True, "packing_strategy": "wrapped", "shuffle_dataset": True},
    "shuffled": {"max_length": 64, "shuffle_dataset": True},
    "whole": {"max_length": 64, "completion_only_loss": False},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("cut", list(CUTS))
@pytest.mark.parametrize("form", list(ROWS))
def test_what_is_trained_on_is_what_sft_trainer_makes(form: str, cut: str, tmp_path: Path) -> None:
    bos = cut in ("keep-start", "bfd", "whole")
    base = make_base(tmp_path / "base", make_tokenizer(bos=bos))
    file = write(tmp_path / "eval.jsonl", ROWS[form])
    flags = CUTS[cut] | {"eval_strategy": "steps", "eval_packing": False, "held_out": str(file)}

    ours = prepared(base, ROWS[form], **flags)

    data = load_training_data(file, tokenizer=make_tokenizer(bos=bos), held_out=0)
    trainer = SFTTrainer(
        LlamaForCausalLM(LlamaConfig.from_pretrained(base)),
        arguments(base, file, **flags).sft,
        train_dataset=data.train,
        eval_dataset=data.train,
        processing_class=make_tokenizer(bos=bos),
    )
    assert columns(ours.train) == columns(trainer.train_dataset)
    assert ours.evaluation is not None and columns(ours.evaluation) == columns(trainer.eval_dataset)
    learned = sum(label != -100 for labels in trainer.train_dataset["labels"] for label in labels)
    assert learned == ours.record.num_target_tokens - ours.record.num_cut_target_tokens


def columns(dataset: Dataset) -> list[dict[str, Any]]:
    names = ("input_ids", "labels", "seq_lengths")
    return [{name: row[name] for name in names if name in row} for row in dataset.to_list()]
