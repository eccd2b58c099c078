"""The forms of rows that PAT accepts, and how a row of each becomes examples in one of TRL's forms.

TRL's SFTTrainer computes the loss on the completion alone for rows with `prompt` and `completion`, and on every token
of rows with `text`. So whatever has a response ends as prompts and completions, one for each answer to learn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pat.data.messages import (
    Message,
    RowError,
    is_answer,
    is_null,
    message_list,
    parse_history,
    parse_json,
    parse_message,
    parse_messages,
    put_before,
    says_something,
    text_of,
)
from pat.errors import PatError
from pat.readers import separator_hint

Template = Literal["chat", "alpaca"]

# The wording of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), with a line break at its end as in
# alpaca-lora's templates/alpaca.json, which keeps the response's first token apart from the prompt.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("instruction", "prompt", "question", "query", "input", "inputs")
RESPONSES = ("output", "response", "completion", "answer", "target", "targets")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
HISTORY = "history"
OPTIONS = ("tools", "chat_template_kwargs")

ACCEPTED = (
    "instruction and output (also prompt, question, query or input with response or answer), prompt and completion, "
    "messages or conversations, or text"
)


class NoFormat(PatError):
    """Data has columns that make no format."""


@dataclass(frozen=True)
class Format:
    """A format found in data: its name and the columns that play its parts."""

    name: Literal["alpaca", "prompt-completion", "messages", "text"]
    prompt: str
    """Column of the instruction, prompt, conversation or text."""
    response: str = ""
    input: str = ""
    beside: tuple[str, ...] = ()
    """Columns that only a chat template can express: system, history, tools, chat_template_kwargs."""

    @property
    def title(self) -> str:
        """Name of the format in messages and records, made of its columns: `question/answer`, `messages`, `text`."""
        if self.response:
            return f"{self.prompt}/{self.response}"
        return self.prompt if self.name == "messages" else self.name

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return tuple(name for name in (self.prompt, self.response, self.input, *self.beside) if name)


def detect_format(columns: Collection[str], source: str, text_field: str = "text") -> Format:
    """Return the format of data with these columns, in capitals or not.

    Raises:
        NoFormat: no format fits, or there is no such text column; tells what was found and what is accepted.
    """
    found = listed(sorted(columns))
    if text_field != "text":
        if not text_field.strip() or text_field not in columns:
            raise NoFormat(f"{source}: got dataset_text_field={text_field!r}, expected one of the columns {found}.")
        return Format("text", text_field)
    known = {name.strip().lower(): name for name in columns if name.strip()}

    def first(names: Sequence[str], *taken: str) -> str:
        return next((known[name] for name in names if name in known and known[name] not in taken), "")

    beside = tuple(known[name] for name in (*SYSTEMS, HISTORY, *OPTIONS) if name in known)
    if conversation := first(CONVERSATIONS):
        return Format("messages", conversation, beside=tuple(name for name in beside if name != HISTORY))
    if {"prompt", "completion"} <= known.keys():
        return Format("prompt-completion", known["prompt"], known["completion"], beside=beside)
    prompt, response = first(PROMPTS), first(RESPONSES)
    if prompt and response:
        return Format("alpaca", prompt, response, first(CONTEXTS, prompt), beside)
    if "text" in known:
        return Format("text", known["text"])
    if "chosen" in known:
        raise NoFormat(
            f"{source}: got columns {found}, which tell preferences; only answers are learned here: rename 'chosen' to "
            "'completion' or 'messages', or use TRL's DPOTrainer on the small model (examples/sft_then_dpo.py)."
        )
    hint = separator_hint(list(columns), "rename them")
    raise NoFormat(f"{source}: got columns {found}; expected {ACCEPTED}; {hint}.")


def listed(columns: Iterable[str]) -> str:
    """Return the names of columns as a message shows them; a table that pandas writes has one without a name."""
    return ", ".join(name if name.strip() else f"{name!r} (unnamed)" for name in columns) or "none"


def convert_row(
    row: Mapping[str, Any],
    format: Format,
    template: Template | None,
    chat_template: str = "",
    *,
    learns_prompts: bool = False,
) -> list[dict[str, Any]]:
    """Return the examples of one row in TRL's form, none if there is no response to learn.

    Args:
        template: "chat" makes message lists for the tokenizer's chat template, "alpaca" strings in the Alpaca
            wording, None keeps prompt and completion strings as they are. Plain text takes no template.
        chat_template: the source of the chat template, to call things as it does.
        learns_prompts: whether the prompt of an example is learned as well. A conversation then is one example, up to
            its last answer, so that nothing is learned twice.

    Returns:
        `{"text"}`; or `{"prompt", "completion"}`, both strings or both message lists, with `tools` and
        `chat_template_kwargs` beside message lists if the row has them.

    Raises:
        RowError: a field is missing or of the wrong type, or the template cannot express the row.
    """
    row = {name: None if is_null(value) else value for name, value in row.items()}
    prompt = message_list(row.get(format.prompt))
    if format.name == "prompt-completion" and template is not None and isinstance(prompt, list):
        row |= {format.prompt: prompt, format.response: message_list(row.get(format.response))}
    if format.name == "text":
        text = text_of(row.get(format.prompt), f"field {format.prompt!r}", empty=True)
        return [{"text": text}] if text.strip() else []
    beside = {name: row[name] for name in format.beside if row.get(name)}
    if beside and template != "chat":
        raise RowError(
            f"field {min(beside)!r} has no place in {'the Alpaca wording' if template else 'plain strings'}; expected "
            "--template chat and a tokenizer with a chat template, or rows without that field."
        )
    if format.name == "messages":
        turns = parse_messages(
            _present(row, format.prompt, "a list of messages"), f"field {format.prompt!r}", chat_template
        )
        first = 0 if any(name in beside for name in SYSTEMS) else 1  # an answer needs something before it
        pairs = [(turns[:i], turns[i : i + 1]) for i, turn in enumerate(turns) if i >= first and is_answer(*turn)]
    elif format.name == "prompt-completion" and isinstance(row.get(format.prompt), list):
        if template is None:
            raise RowError(f"field {format.prompt!r} is a list, but a string in the first row; use one form.")
        if not row.get(format.response):
            return []
        columns = (format.prompt, format.response)
        prompt, completion = (parse_messages(row.get(name), f"field {name!r}", chat_template) for name in columns)
        if not all(learned for _, learned in completion):
            raise RowError(f"a message of {format.response!r} is not to be learned; expected it in {format.prompt!r}.")
        turns = prompt + completion
        pairs = [(prompt, completion)] if any(says_something(message) for message, _ in completion) else []
    else:
        response = text_of(_present(row, format.response), f"field {format.response!r}", empty=True)
        question = text_of(_present(row, format.prompt), f"field {format.prompt!r}")
        context = text_of(row.get(format.input), f"field {format.input!r}", empty=True) if format.input else ""
        if not response.strip():
            return []
        if template != "chat":
            return [_worded(question, context, response, template)]
        asked = "\n\n".join(part for part in (question, context) if part.strip()) or question
        turns = [({"role": "user", "content": asked}, True), ({"role": "assistant", "content": response}, True)]
        pairs = [(turns[:1], turns[1:])]
    if learns_prompts:
        if not all(learned for _, learned in turns):
            raise RowError(
                "a message is not to be learned (weight 0 or the like), but --completion_only_loss false learns all of "
                "a conversation; leave out either."
            )
        pairs = pairs[-1:]
    if template != "chat":
        return [_single_turn([message for message, _ in turns])] if pairs else []
    opening = [
        parse_message({"role": "system", "content": beside[name]}, f"field {name!r}")[0]
        for name in SYSTEMS
        if name in beside
    ]
    opening += parse_history(beside.get(HISTORY, []))
    options: dict[str, Any] = {name: parse_json(beside[name], name) for name in OPTIONS if name in beside}
    return [
        {"prompt": put_before(opening, prompt), "completion": [message for message, _ in completion], **options}
        for prompt, completion in pairs
    ]


def _worded(question: str, context: str, response: str, template: Template | None) -> dict[str, Any]:
    if template is None:
        return {"prompt": question, "completion": response}
    wording = ALPACA_WITH_INPUT if context.strip() else ALPACA
    return {"prompt": wording.format(instruction=question, input=context), "completion": response}


def _single_turn(messages: list[Message]) -> dict[str, Any]:
    roles = [message["role"] for message in messages]
    more = sorted({key for message in messages for key in message} - {"role", "content"})
    if roles != ["user", "assistant"] or more:
        raise RowError(
            f"got a conversation of {', '.join(roles)}{' with ' + ', '.join(more) if more else ''}, but the Alpaca "
            "template takes one user and one assistant message of text; use a tokenizer with a chat template."
        )
    return _worded(messages[0]["content"], "", messages[1]["content"], "alpaca")


def _present(row: Mapping[str, Any], field: str, expected: str = "a string") -> Any:
    if field not in row:
        raise RowError(f"field {field!r} is missing (found {listed(row)}); expected {expected}.")
    return row[field]
