"""What is trained on is what SFTTrainer would make of the same rows; what is lost on the way is counted and said."""

from __future__ import annotations

import copy
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTTrainer, clone_chat_template

from pat.data.examples import prepare_examples
from pat.data.load import load_training_data
from pat.data.rendered import left_out
from pat.data.vocabulary import Vocabulary, load_vocabulary
from pat.errors import PatError
from pat.training.arguments import TuneArguments, build_arguments
from pat.training.inputs.prepare import Prepared, prepare
from pat.training.outcome.held_out import write_held_out
from pat.tuner.config import PatConfig

# Like ChatML: every turn ends with the end token and a line break, a generation prompt opens the answer.
CHAT_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}{{ style }}<eos>{% endif %}"
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('not\nthis') }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.reasoning_content }}{{ m.tool_calls | tojson if m.tool_calls }}{{ m.content }}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "a question and its answer", "Question: Answer:"] * 4


def make_tokenizer(*, bos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, so that tokens merge across the prompt's end."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        ids = [("<bos>", inner.token_to_id("<bos>"))]
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=ids)
    inner.enable_truncation(7)  # as some are saved; a call turns it off
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


VOCABULARY = len(make_tokenizer())
STORIES = Path(__file__).parents[3] / "data" / "stories260K"


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
    num_learned = sum(label != -100 for labels in trainer.train_dataset["labels"] for label in labels)
    assert num_learned == ours.record.num_target_tokens - ours.record.num_cut_target_tokens


def columns(dataset: Dataset) -> list[dict[str, Any]]:
    names = ("input_ids", "labels", "seq_lengths")
    return [{name: row[name] for name in names if name in row} for row in dataset.to_list()]


def learned(data: Prepared) -> list[int]:
    return [label for example in data.held_out for label in example["labels"] if label != -100]


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "pat.training.inputs.parts"]
    caplog.clear()
    return found


LONG = "the dog " * 40
PAIR = {"prompt": "the fox?\n", "completion": "the dog"}


def test_what_is_lost_is_counted_and_said(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [PAIR, PAIR | {"completion": LONG}, PAIR | {"prompt": LONG + "\n"}, PAIR | {"completion": " ", "id": 3}]
    prepared(base, [PAIR])
    assert lines_of(caplog) == []

    data = prepared(base, rows, max_length=32)
    record = data.record
    assert (record.num_rows, record.num_dropped, record.num_examples) == (4, 1, 3)
    assert (record.num_truncated, record.num_cut_away, len(data.train)) == (2, 1, 2)
    dropped, columns, cut, endless, away = lines_of(caplog)
    assert dropped == "1 of 4 rows has no response and is left out." and columns == "These columns are not read: id."
    assert "2 of 3 examples are cut at --max_length 32" in cut and f"{record.num_cut_tokens:,} of" in cut
    _, prompt, longest = sorted(len(row) for row in prepared(base, rows, max_length=None).train["input_ids"])
    caplog.clear()
    assert cut.endswith(f"raise it to {longest}.") and f"raise it to {prompt}, or keep" in away
    assert "2 of 3 examples lose the end of their response" in endless
    assert "1 of 3 examples have no response left within --max_length 32" in away and "keep_end" in away
    said = record.describe(data.num_tokens)
    there, learnt = (sum(len(row) for row in data.train[name]) for name in ("input_ids", "labels"))
    learnt -= sum(row.count(-100) for row in data.train["labels"])
    assert f"4 rows; 3 examples, 1 of them left out, with {there} tokens to train on (of {record.num_tokens} t" in said
    assert f" that were read), {learnt} of them to learn, 2 truncated; 0 held out" in said
    assert f" {record.num_tokens - record.num_cut_tokens} tokens to train on (" in record.describe()

    record = prepared(base, rows[:3], max_length=32, truncation_mode="keep_end").record
    assert (record.num_truncated, record.num_cut_away) == (1, 0) and record.num_cut_tokens > 0
    assert len(lines_of(caplog)) == 1  # tokens are lost, but every response ends

    with pytest.raises(
        PatError,
        match=r"All 1 responses are truncated away: got max_length 8, .* takes \d+; raise --max_length to \d+\.",
    ):
        prepared(base, rows[2:3], max_length=8)
    prepared(base, [PAIR | {"completion": "a" * num} for num in range(10, 211)], max_length=30)
    # Of 201 examples, each a token longer than the last, 99 % are the first 199.
    most, longest = map(
        int, re.search(r"raise it to (\d+) for 99 % of the examples or to (\d+) for", caplog.text).groups()
    )
    assert longest == most + 2


def test_rows_without_a_response_are_counted_in_held_out_files_as_well(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    apart = write(tmp_path / "apart.jsonl", [PAIR, PAIR | {"completion": " "}, PAIR | {"completion": ""}])
    assert prepared(base, [PAIR | {"prompt": "dog\n"}], held_out=str(apart)).record.num_held_out_dropped == 2
    assert lines_of(caplog) == ["2 held-out rows have no response and are left out."]


def test_an_answer_to_nothing_is_said_not_to_be_learned(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = [say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", "d")]
    rows = [{"messages": [*opening, *asked]} for opening in ([], [say("assistant", "hello")])]
    systems = [{"messages": [say("system", "s"), *rows[1]["messages"]]}, rows[1] | {"system": "s"}]
    record = prepared(base, [*rows, rows[1], *systems]).record
    assert (record.num_unlearned_openings, record.num_examples) == (2, 3 * 2 + 2 * 3)
    [line] = lines_of(caplog)
    assert line.startswith("In 2 rows the conversation opens with a message of the assistant")
    whole = prepared(base, rows, completion_only_loss=False)
    assert lines_of(caplog) == [] and whole.record.num_examples == 2
    assert whole.train["labels"][:] == whole.train["input_ids"][:]


def test_texts_are_told_how_to_lose_nothing(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared(base, [{"text": LONG}] * 2, max_length=32)
    [cut] = lines_of(caplog)
    assert "2 of 2 examples are cut" in cut and "--packing_strategy wrapped" in cut
    record = prepared(base, [{"text": LONG}] * 2, max_length=32, packing=True, packing_strategy="wrapped").record
    assert lines_of(caplog) == [] and record.num_cut_tokens == record.num_truncated == 0


def test_held_out_examples_are_cut_like_those_that_are_trained_on(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    apart = str(write(tmp_path / "apart.jsonl", [PAIR | {"prompt": LONG + "\n"}, PAIR, PAIR | {"completion": LONG}]))
    rows = [PAIR | {"prompt": "dog\n"}] * 3
    cut = prepared(base, rows, max_length=32, held_out=apart)
    assert cut.record.num_held_out == len(cut.held_out) == 2
    assert [len(example["input_ids"]) for example in cut.held_out][1] == 32
    assert lines_of(caplog) == ["2 of 3 held-out examples are cut likewise; 2 have a response left to be measured."]

    split = prepared(base, rows, max_length=32, held_out=apart, packing=True, packing_strategy="bfd_split")
    assert split.record.num_held_out == 3 and max(len(example["input_ids"]) for example in split.held_out) == 32
    whole = prepared(base, rows, max_length=None, held_out=apart)
    learned = [
        [label for example in data.held_out for label in example["labels"] if label > 0] for data in (split, whole)
    ]
    assert learned[0] == learned[1]


def test_what_does_not_reach_the_model_is_said(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared(base, [{"messages": [say("user", "a", name="Ann"), say("assistant", "b", reasoning="c")]}, PAIR][:1])
    assert "does not mention name, so what 1 of 1 examples say there is left out" in lines_of(caplog)[0]
    prepared(base, [{"prompt": "the fox", "completion": "dog"}] * 2 + [PAIR])
    assert "In 2 of 3 examples the completion follows its prompt without a space" in lines_of(caplog)[0]
    prepared(base, [{"prompt": "the fox<|assistant|>", "completion": "dog"}, PAIR])
    assert lines_of(caplog) == []


@pytest.mark.parametrize("flags", [{}, {"packing": True}, {"streaming": True, "max_steps": 1, "held_out": "1"}])
def test_ends_of_answers_are_known_however_rows_are_cut(
    flags: Any, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chats = [{"messages": [say("user", "fox"), say("assistant", f"the dog {number}")]} for number in range(8)]
    tokenizer = make_tokenizer()
    for end, ends in (("<|tool|>\n", [SPECIAL.index("<|tool|>")]), ("", [])):
        tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>\n", end)
        tokenizer.save_pretrained(base)
        assert prepared(base, chats, **({"max_length": 10} | flags)).ends == ends
        assert any("do not teach the model to stop" in line for line in lines_of(caplog)) == (not ends)


def test_a_template_that_asks_otherwise_than_it_writes_is_said(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    chats = [{"messages": [say("user", "fox"), say("assistant", text)]} for text in ("dog", "<think>dog")]
    tokenizer = make_tokenizer()
    for opened, num in (("", 0), ("<think>", 1)):
        tokenizer.chat_template = CHAT_TEMPLATE + "{% if add_generation_prompt %}" + opened + "{% endif %}"
        tokenizer.save_pretrained(base)
        prepared(base, chats)
        said = [line for line in lines_of(caplog) if "is not what it writes before that answer" in line]
        assert len(said) == num and all(line.startswith("In 1 of 2 examples the prompt") for line in said)


TURN = "{{ '[' + m.role + ']' + TEXT + '<eos>' }}"
ALL_BUT_TOOLS = "{% if m.role not in ['tool', 'system'] %}" + TURN.replace("TEXT", "m.content") + "{% endif %}"


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (TURN.replace("TEXT", "m.content | trim | tojson"), ""),
        (TURN.replace("TEXT", "m.content | upper"), ""),
        (ALL_BUT_TOOLS, "what messages of role system say in 1 and what messages of role tool say in 2 of 3 examples;"),
        (TURN.replace("TEXT", "m.content.split('</think>')[-1]"), "parts of the answer in 1 of 3 examples;"),
        (TURN.replace("TEXT", "m.content.replace('think>', 'reason>\n')"), ""),
    ],
)
def test_what_a_template_leaves_out_is_counted_and_said(
    turn: str, said: str, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(base)
    asked, thought = say("user", ' a "b" <c>\n\n d '), "<think>\nfox & dog</think>\nover"
    rows = [
        [say("system", "brown"), asked, say("tool", '{"sun": 1}'), say("assistant", thought)],
        [asked, say("assistant", thought, weight=0), say("tool", "lazy"), say("assistant", "x")],
        [asked, say("assistant", "jumps")],
    ]
    record = prepared(base, [{"messages": messages} for messages in rows]).record
    lines = lines_of(caplog)
    assert len(lines) == bool(said) and all(f"leaves out {said}" in line for line in lines)
    assert record.num_prompts_in_part == 2 * ("role" in said) and record.num_answers_in_part == ("parts" in said)


def test_an_answer_that_is_left_out_is_looked_through_once() -> None:
    """Each of its places was once the beginning of a search to its end, which took minutes."""
    asked, said = say("user", "a"), say("assistant", "b")
    started = time.process_time()
    for earlier, missing in (("x" * 400_000, {"assistant"}), ("</think>" * 50_000 + "a", set())):
        row = {"prompt": [asked, say("assistant", earlier), asked], "completion": [said]}
        assert left_out(row, "aab", "aa", "") == missing
    assert time.process_time() - started < 5


ARGUMENTS = {"what": 'a "fox"', "of": {"num": 1.5}}
PLAIN = json.dumps(ARGUMENTS)
EACH = "{% for name, value in f.arguments.items() %}<{{ name }}>{{ value }}{% endfor %}"


@pytest.mark.parametrize("form", [ARGUMENTS, PLAIN, {}, "{}"], ids=["object", "text", "none", "none as text"])
@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("{{ f.arguments | tojson }}", "{arguments}"),
        ("{{ f | tojson }}", '{{"name": "find", "arguments": {arguments}}}'),
        ("{{ '>' + f.arguments }}", ">{arguments}"),
        ("{{ f.arguments }}", "{arguments}"),
        ("{{ f.arguments if f.arguments is string else f.arguments | tojson }}", "{arguments}"),
        (EACH, """<what>a "fox"<of>{{'num': 1.5}}"""),
        ("{{ f.name }}", None),
    ],
)
def test_arguments_of_calls_are_written_once_in_either_form(
    expression: str, expected: str | None, form: Any, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + m.content }}{% for c in m.tool_calls or [] %}{% set f = c.function %}["
        + expression
        + "]{% endfor %}<eos>{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    tokenizer.save_pretrained(base)
    call = [{"type": "function", "function": {"name": "find", "arguments": form}}]
    turns = [say("user", "a"), say("assistant", "", tool_calls=call), say("tool", "b"), say("assistant", "c")]
    data = prepared(base, [{"messages": turns}])
    lines = lines_of(caplog)
    is_empty = form in ({}, "{}")
    if expected is None:
        said = "what messages of role assistant say in 1 and parts of the answer in 1 of 2 examples"
        assert is_empty or [said in line for line in lines] == [True]
        return
    whole = expected.format(arguments="{}" if is_empty else PLAIN) if expression != EACH or not is_empty else ""
    found = [tokenizer.decode(ids) for ids in data.train["input_ids"]]
    assert lines == [] and found == [
        f"usera<eos>assistant[{whole}]<eos>" + "toolb<eos>assistantc<eos>" * n for n in (0, 1)
    ]


def test_the_empty_text_of_a_call_without_arguments_is_not_missed() -> None:
    call = [{"function": {"name": "find", "arguments": ""}}]
    row = {"prompt": [say("user", "a")], "completion": [say("assistant", "", tool_calls=call)]}
    assert left_out(row, 'a{"name": "find", "arguments": ""}', "a", "tool_calls") == set()


@pytest.mark.parametrize("max_length", [None, 64])
def test_an_answer_of_which_nothing_is_rendered_is_not_called_truncated(
    max_length: int | None, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages if 'no' not in m.content %}{{ m.content }}<eos>{% endfor %}"
    tokenizer.save_pretrained(base)
    chats = [{"messages": [say("user", "fox"), say("assistant", answer)]} for answer in ("no", "dog")]
    data = prepared(base, chats, max_length=max_length)
    [line] = lines_of(caplog)
    assert "1 of 2 examples have nothing to learn, since the chat template leaves out their answer" in line
    record = data.record
    assert (record.num_without_targets, record.num_cut_away, record.num_answers_in_part) == (1, 0, 0)
    assert len(data.train) == 1 and data.num_tokens == len(data.train[0]["input_ids"])
    with pytest.raises(PatError, match="None of 2 examples has anything to learn: the chat template leaves out"):
        prepared(base, chats[:1] * 2, max_length=max_length)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"max_length": 16}, ""),
        ({"max_length": 32}, "1 of 3 examples are longer than the 16 positions"),
        ({"max_length": None}, "1 of 3 examples are longer than the 16 positions"),
        ({"max_length": 32, "packing": True}, "1 of 3 examples are longer than the 16 positions"),
        (
            {"max_length": 24, "packing": True, "packing_strategy": "wrapped"},
            "Packed rows are longer than the 16 positions",
        ),
    ],
)
def test_sequences_longer_than_the_base_reads_are_said(
    flags: Any, said: str, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(**values: Any) -> None:
        config = AutoConfig.from_pretrained(base)
        config.update(values)
        config.save_pretrained(base)

    change(max_position_embeddings=16)
    texts = [{"text": "fox"}, {"text": LONG}, {"text": "fox"}]
    prepared(base, texts, **flags)
    lines = [line for line in lines_of(caplog) if "positions" in line]
    assert len(lines) == bool(said) and all(said in line and "--max_length of at most 16" in line for line in lines)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 64.0, "original_max_position_embeddings": 16}
    change(rope_parameters=yarn)
    prepared(base, texts, **flags)
    assert not [line for line in lines_of(caplog) if "positions" in line]


def test_held_out_rows_that_are_trained_on_are_said(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [PAIR | {"completion": f"the {word}"} for word in ("dog", "fox", "lazy", "quick")]
    for apart, flags, said in (
        (rows, {}, "4 of 4 held-out examples are trained on as well, so that held-out figures are those of"),
        ([rows[3], PAIR | {"completion": "over"}], {}, "1 of 2 held-out examples are trained on as well"),
        ([{"text": "jumps"}], {}, ""),
        ([rows[0] | {"completion": LONG}], {"max_length": 32}, ""),
        # Nothing is left of what is learned, so that the one is not measured and the other not trained on.
        (
            [PAIR | {"prompt": LONG, "completion": "over"}, PAIR | {"completion": "over"}],
            {"max_length": 32, "more": LONG},
            "",
        ),
        (rows, {"streaming": True, "max_steps": 1}, "4 of 4 held-out examples"),
    ):
        also = [PAIR | {"prompt": flags.pop("more")}] if "more" in flags else []
        prepared(base, rows + also, held_out=str(write(tmp_path / "apart.jsonl", apart)), **flags)
        lines = [line for line in lines_of(caplog) if "trained on" in line]
        assert len(lines) == bool(said) and all(said in line for line in lines)
    prepared(base, [PAIR] * 4, held_out="2")
    assert lines_of(caplog) == []


def test_special_tokens_that_come_twice_are_counted_and_said(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(bos=True)
    texts = [{"text": "<bos>the fox<eos>"}, {"text": "<bos>dog"}, {"text": "dog"}]
    tokenizer.save_pretrained(base)
    record = prepared(base, texts).record
    [line] = lines_of(caplog)
    assert "2 of 3 examples begin with two" in line and (record.num_double_bos, record.num_double_eos) == (2, 0)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    adding = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = adding
    tokenizer.save_pretrained(base)
    record = prepared(base, [PAIR]).record
    [line] = lines_of(caplog)
    assert "1 of 1 examples end with two" in line and (record.num_double_bos, record.num_double_eos) == (0, 1)
    assert "the tokenizer adds one" in line
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(base)
    assert (
        prepared(base, [{"text": text} for text in ("fox<eos>\n \n", "fox<eos>", "fox\n")]).record.num_double_eos == 1
    )
    assert "1 of 3 examples end with two" in lines_of(caplog)[0]
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>\n", "<eos>")
    tokenizer.save_pretrained(base)
    prepared(base, [{"messages": [say("user", "a"), say("assistant", "b<eos>")]}])
    assert "the chat template adds one" in lines_of(caplog)[0]


def test_a_row_that_the_template_refuses_is_named(base: Path) -> None:
    rows = [{"messages": [say("user", text), say("assistant", "b")]} for text in ("a", "b", "refuse")]
    with pytest.raises(PatError, match=r"data\.jsonl, line 3: the tokenizer's chat template refuses it \(not this\)"):
        prepared(base, rows)


def test_rows_that_cannot_be_used_are_skipped_counted_and_said_once(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": [say("user", text), say("assistant", "b")]} for text in ("a", "refuse", "b")]
    apart = str(write(tmp_path / "apart.jsonl", [*rows, 3]))
    rows = [{"messages": [*row["messages"][:1], say("assistant", "c")]} for row in rows]
    data = prepared(base, [{"messages": 3}, *rows], on_bad_row="skip", held_out=apart, max_length=None)
    record = data.record
    assert (record.num_rows, record.num_skipped, record.num_examples, len(data.train)) == (4, 2, 2, 2)
    assert record.num_held_out == 2 and "0 truncated, 2 skipped;" in record.describe()
    said, of_held_out = lines_of(caplog)
    assert "2 rows cannot be used" in said and "line 1: field 'messages' is of type int" in said
    assert of_held_out.startswith("2 held-out rows cannot be used")
    with pytest.raises(PatError, match=r"All examples are refused, as .*line 1: the tokenizer's chat template"):
        prepared(base, rows[1:2], on_bad_row="skip")


@pytest.mark.parametrize("row", [3, {"messages": 3}, {"messages": [say("user", "refuse"), say("assistant", "b")]}])
@pytest.mark.parametrize("streaming", [False, True])
def test_who_has_a_bad_row_is_told_how_to_leave_it_out(base: Path, row: Any, streaming: bool) -> None:
    rows = [{"messages": [say("user", "a"), say("assistant", "b")]}] * 8
    flags: dict[str, Any] = {"held_out": "2"} | ({"streaming": True, "max_steps": 1} if streaming else {})
    with pytest.raises(PatError, match=r"line 9: .*\. Such rows are left out with --on_bad_row skip\.$"):
        prepared(base, [*rows, row], **flags)
    assert prepared(base, [*rows, row], on_bad_row="skip", **flags).record.num_skipped == 1


@pytest.mark.parametrize(
    ("flags", "rows", "message"),
    [
        ({"packing": True, "max_length": None}, [PAIR], "packing with --max_length None"),
        ({"packing": True, "max_length": 1, "packing_strategy": "wrapped"}, [PAIR], "--max_length 1; .* at least 2"),
        ({"max_length": 1, "truncation_mode": "keep_end"}, [PAIR], "max_length 1, .* take 2; raise --max_length to"),
        ({"max_length": 1}, [{"text": "fox"}], "max_length 1, .* take 2; raise --max_length to"),
        ({}, [{"text": "<eos>"}], "Each of 1 examples is a single token"),
        ({"completion_only_loss": True}, [{"text": "a"}], "--completion_only_loss true with plain text"),
        ({"template": "chat"}, [{"text": "a"}], "template=chat with plain text"),
        ({"template": "alpaca"}, [{"text": "a"}], "template=alpaca with plain text"),
        ({"assistant_only_loss": True}, [PAIR], "--assistant_only_loss true"),
        ({"eos_token": "<none>"}, [PAIR], "'<none>', which the tokenizer does not know"),
        ({"chat_template_path": "none.jinja"}, [PAIR], r"none\.jinja, which is not readable .* expected a Jinja file"),
    ],
)
def test_arguments_that_do_not_fit_the_data(base: Path, flags: Any, rows: list[Any], message: str) -> None:
    with pytest.raises(PatError, match=message):
        prepared(base, rows, **flags)


@pytest.mark.parametrize(("name", "message"), [("t.jinja", "is empty; expected a Jinja"), ("t.txt", "no Jinja file")])
def test_a_template_that_is_none_is_named_by_its_flag(base: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(PatError, match=f"--chat_template_path .*{name}, which .*{message}"):
        prepared(base, [PAIR], chat_template_path=str(tmp_path / name))


@pytest.mark.parametrize("form", ["file", "folder"])
def test_the_template_is_taken_over_before_anything_is_tokenised(form: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", make_tokenizer(chat=False))
    other = make_tokenizer()
    other.add_tokens([AddedToken("<end>", special=True)])
    other.eos_token = "<end>"
    path = make_base(tmp_path / "other", other) if form == "folder" else tmp_path / "template.jinja"
    if form == "file":
        path.write_text(CHAT_TEMPLATE, encoding="utf-8-sig")  # whose mark is none of the template
    rows = [{"messages": [say("user", "a"), say("assistant", "b")]}]

    data = prepared(base, rows, chat_template_path=str(path))

    vocabulary = data.vocabulary
    assert data.record.template == "chat" and vocabulary.tokenizer.chat_template == CHAT_TEMPLATE
    ids = make_tokenizer().apply_chat_template(rows[0]["messages"])["input_ids"]
    assert data.train[0]["input_ids"] == ids
    if form == "file":
        assert (list(vocabulary.added), vocabulary.num_embeddings) == ([], VOCABULARY)
        return
    # As `trl.clone_chat_template` does it.
    theirs = LlamaForCausalLM(LlamaConfig.from_pretrained(base))
    ours = copy.deepcopy(theirs)
    _, tokenizer, added = clone_chat_template(theirs, make_tokenizer(chat=False), str(path))
    vocabulary.fit(ours)
    assert list(vocabulary.added) == added[:1] and vocabulary.tokenizer.eos_token == tokenizer.eos_token
    assert ours.get_input_embeddings().weight.shape == theirs.get_input_embeddings().weight.shape
    assert ours.config.eos_token_id == theirs.config.eos_token_id == ours.generation_config.eos_token_id
    for tied, saved in ((True, None), (False, ["lm_head"])):
        base_config = LlamaConfig(tie_word_embeddings=tied)
        config = vocabulary.note(PatConfig(trainable_token_indices=[5]), base_config)
        assert (config.trainable_token_indices, config.modules_to_save) == ([5, added[0]], saved)


def test_tokens_without_an_embedding_are_refused_where_they_occur(base: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    assert prepared(base, [PAIR]).vocabulary.num_embeddings == VOCABULARY  # the token is known, and not used
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("a <new> text", encoding="utf-8")
    new = PAIR | {"completion": "a <new> dog"}
    apart = str(write(tmp_path / "apart.jsonl", [new]))
    for rows, flags in (([new], {}), ([PAIR], {"held_out": apart}), ([PAIR], {"calibration": str(calibration)})):
        with pytest.raises(PatError, match=rf"'<new>' \(id {VOCABULARY}\), but the model has embeddings"):
            prepared(base, rows, **flags)
    with pytest.raises(PatError, match="'<new>'"):
        prepare_examples(apart, Vocabulary(tokenizer, VOCABULARY), template="auto", max_length=32)
    tokenizer.pad_token = "<new>"
    tokenizer.save_pretrained(base)
    with pytest.raises(PatError, match="'<new>'"):
        prepared(base, [PAIR])


def test_examples_to_measure_are_evenly_spaced(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", [PAIR | {"prompt": f"{index}\n"} for index in range(10)])
    vocabulary = load_vocabulary(str(base), AutoConfig.from_pretrained(base))
    examples, record = prepare_examples(str(file), vocabulary, template="auto", max_length=32, limit=4)
    firsts = [vocabulary.tokenizer.decode(example["input_ids"][:1]) for example in examples]
    assert firsts == ["0", "2", "5", "7"] and record.num_examples == 4


def test_a_trimmed_vocabulary_is_measured_on_the_rows_that_the_base_is_measured_on(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(STORIES, folder, ignore=shutil.ignore_patterns("*.safetensors"))

    def turn(answer: str) -> dict[str, Any]:
        return {"messages": [say("user", "a question"), say("assistant", answer)]}

    template = tmp_path / "strips.jinja"
    inside = "{{ '[' + m.role + ']' + m.content.split('</think>')[-1] }}{{ '<eos>' if m.role == 'user' else '' }}"
    template.write_text("{% for m in messages %}" + inside + "{% endfor %}{{ '[assistant]' if add_generation_prompt }}")
    turns = [turn("<think>why</think>its answer") for _ in range(8)]
    held_out = [turns[0], turn("<think>all of it</think>"), turns[1]]
    data = prepared(
        folder,
        turns,
        held_out=str(write(tmp_path / "held_out.jsonl", held_out)),
        chat_template_path=str(template),
        vocabulary_size=448,
    )
    assert data.held_out_of_base is not None
    assert len(data.held_out) == len(data.held_out_of_base) == 2


@pytest.mark.parametrize("kind", [*ROWS, "alpaca", "conversations"])
def test_held_out_rows_are_written_so_that_their_tokens_come_again(kind: str, base: Path, tmp_path: Path) -> None:
    more: dict[str, list[Any]] = {
        "alpaca": [{"instruction": "the fox?", "input": "dog", "output": f"answer {number}"} for number in range(6)],
        "conversations": [
            {
                "messages": [
                    say("user", "fox"),
                    say("assistant", "dog", weight=0),
                    say("user", "a"),
                    say("assistant", "b"),
                ]
            },
            {"messages": [say("system", "lazy"), say("user", "fox"), say("assistant", "dog")]},
        ],
    }
    data = prepared(base, (more | ROWS)[kind] * 3, held_out="0.8")
    write_held_out(tmp_path / "out", data.held_out_rows)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["held_out.jsonl"]
    vocabulary = load_vocabulary(str(base), AutoConfig.from_pretrained(base))
    file = str(tmp_path / "out" / "held_out.jsonl")
    examples, _ = prepare_examples(file, vocabulary, template="auto", max_length=512)
    assert examples and examples == [dict(row) for row in data.held_out]


def test_held_out_rows_of_several_forms_lie_in_as_many_files(base: Path, tmp_path: Path) -> None:
    rows = [{"text": "fox"}, PAIR, {"prompt": [say("user", "a")], "completion": [say("assistant", "b")], "tools": None}]
    write_held_out(tmp_path, [*rows, PAIR])
    first, second, third = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("held_out.jsonl", "held_out_2.jsonl", "held_out_3.jsonl")
    )
    assert (first, second) == ([rows[0]], [PAIR, PAIR]) and "tools" not in third[0]


def test_rows_of_a_file_of_their_own_are_not_copied(base: Path, tmp_path: Path) -> None:
    apart = write(tmp_path / "apart.jsonl", [PAIR])
    data = prepared(base, [PAIR] * 3, held_out=str(apart))
    assert data.held_out and not data.held_out_rows
