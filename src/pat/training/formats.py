"""The row formats PAT accepts, and how a row of each becomes one of TRL's.

TRL's SFTTrainer computes the loss on the completion alone for rows with `prompt` and `completion`, and on
every token for rows with `messages` or `text`. So whatever has a response ends as prompt and completion.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pat.errors import PatError

Template = Literal["chat", "alpaca"]
Message = dict[str, str]

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

# ShareGPT's names for the keys and roles of a message.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}

ACCEPTED = (
    "alpaca (instruction, optional input or context, output or response), prompt and completion, messages or "
    "conversations, or text"
)


@dataclass(frozen=True)
class Format:
    """A format found in data: its name and the columns that play its parts."""

    name: Literal["alpaca", "prompt-completion", "messages", "text"]
    prompt: str  # column of the instruction, prompt, conversation or text
    response: str = ""
    input: str = ""


class RowError(ValueError):
    """One row does not fit its format; the caller knows where the row stands."""


def detect_format(columns: Collection[str], source: str) -> Format:
    """The format of data with these columns; further columns are ignored.

    Raises:
        PatError: no format fits; tells what was found and what is accepted.
    """
    for name in ("messages", "conversations"):
        if name in columns:
            return Format("messages", name)
    if {"prompt", "completion"} <= set(columns):
        return Format("prompt-completion", "prompt", "completion")
    response = next((name for name in ("output", "response") if name in columns), "")
    if "instruction" in columns and response:
        context = next((name for name in ("input", "context") if name in columns), "")
        return Format("alpaca", "instruction", response, context)
    if "text" in columns:
        return Format("text", "text")
    found = ", ".join(sorted(columns)) or "none"
    raise PatError(f"{source}: got columns {found}; expected {ACCEPTED}.")


def convert_row(row: Mapping[str, Any], format: Format, template: Template | None) -> dict[str, Any] | None:
    """One row in TRL's form, or None if its response is empty.

    Args:
        template: "chat" makes message lists for the tokenizer's chat template, "alpaca" strings in the Alpaca
            wording, None keeps prompt and completion strings as they are. Plain text takes no template.

    Returns:
        `{"prompt", "completion"}`, both strings or both message lists; `{"text"}`; or, for conversations
        under "chat", `{"messages"}`, which `split_turns` takes apart.

    Raises:
        RowError: a field is missing or of the wrong type, or the template cannot express the row.
    """
    if format.name == "text":
        text = _string(row, format.prompt, empty=True)
        return {"text": text} if text.strip() else None
    if format.name == "messages":
        return _convert_messages(_messages(row, format.prompt), template)
    if format.name == "prompt-completion" and isinstance(row.get(format.prompt), list):
        if template is None:
            raise RowError(f"field {format.prompt!r} is a list, but a string in the first row; use one form.")
        return _convert_message_pair(_messages(row, "prompt"), _messages(row, "completion", empty=True), template)
    prompt, response = _string(row, format.prompt), _string(row, format.response, empty=True)
    if not response.strip():
        return None
    context = _string(row, format.input, optional=True, empty=True) if format.input else ""
    return _pair(prompt, context, response, template)


def split_turns(messages: list[Message]) -> list[dict[str, list[Message]]]:
    """One prompt/completion row per non-empty assistant turn: every answer is learned, and nothing else."""
    return [
        {"prompt": messages[:index], "completion": [message]}
        for index, message in enumerate(messages)
        if index > 0 and message["role"] == "assistant" and message["content"].strip()
    ]


def _pair(prompt: str, context: str, response: str, template: Template | None) -> dict[str, Any]:
    if template is None:
        return {"prompt": prompt, "completion": response}
    if template == "alpaca":
        wording = ALPACA_WITH_INPUT if context.strip() else ALPACA
        return {"prompt": wording.format(instruction=prompt, input=context), "completion": response}
    content = f"{prompt}\n\n{context}" if context.strip() else prompt
    return {
        "prompt": [{"role": "user", "content": content}],
        "completion": [{"role": "assistant", "content": response}],
    }


def _convert_messages(messages: list[Message], template: Template | None) -> dict[str, Any] | None:
    if not split_turns(messages):
        return None
    return {"messages": messages} if template == "chat" else _single_turn(messages)


def _convert_message_pair(
    prompt: list[Message], completion: list[Message], template: Template | None
) -> dict[str, Any] | None:
    if not any(message["content"].strip() for message in completion):
        return None
    return {"prompt": prompt, "completion": completion} if template == "chat" else _single_turn(prompt + completion)


def _single_turn(messages: list[Message]) -> dict[str, Any]:
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"]:
        raise RowError(
            f"got a conversation of {', '.join(roles)}, but the Alpaca "
            "template takes one user and one assistant message; use a tokenizer with a chat template."
        )
    return _pair(messages[0]["content"], "", messages[1]["content"], "alpaca")


def _string(row: Mapping[str, Any], field: str, *, optional: bool = False, empty: bool = False) -> str:
    """A field's text. `optional`: it may be absent; `empty`: null (an empty cell) counts as empty text."""
    if field not in row and not optional:
        raise RowError(f"field {field!r} is missing (found {', '.join(row) or 'none'}); expected a string.")
    value = row.get(field)
    if value is None and empty:
        return ""
    return _text(value, f"field {field!r}")


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{what} is {_kind(value)}, expected a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{what} is not valid Unicode text ({error.reason}).") from error
    return value


def _messages(row: Mapping[str, Any], field: str, *, empty: bool = False) -> list[Message]:
    value = row.get(field)
    if not isinstance(value, list) or not (value or empty):
        raise RowError(f"field {field!r} is {_kind(value)}, expected a list of messages (role, content).")
    return [_message(item, f"message {number} of {field!r}") for number, item in enumerate(value, start=1)]


def _message(item: object, what: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"{what} is {_kind(item)}, expected an object with role and content.")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{what} has role {role!r}, expected one of {', '.join(ROLES)}.")
    return {"role": ROLES[role], "content": _text(content, f"content of {what}")}


def _kind(value: object) -> str:
    if value is None:
        return "missing or null"
    return "an empty list" if value == [] else f"of type {type(value).__name__}"
