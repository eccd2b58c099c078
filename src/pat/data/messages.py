"""Messages of conversations as chat templates take them, whatever they are called in the data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", "ai", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
"""Roles of messages by the names that they have elsewhere (ShareGPT, OpenAI, Llama)."""

CALLS = ("function_call", "tool_call")
"""Roles of an assistant whose content is a call in JSON."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names that templates give the thoughts before an answer."""

FLAGS = ("weight", "train", "training", "loss", "train_on_turn", "trainable")
"""Fields that say whether a message is to be learned: 0 or false makes an answer part of the context only."""

MASKS = ("mask", "masked", "loss_mask", "train_detail", "training_detail")
"""Fields by which other tools say that in ways of their own, which do not agree."""


class RowError(ValueError):
    """One row does not fit its format; the caller knows where the row stands."""


@cache
def reads(chat_template: str, name: str) -> bool:
    """Tell whether a chat template mentions a name: what it does not mention, it cannot express."""
    return re.search(rf"\b{re.escape(name)}\b", chat_template) is not None


def put_before(opening: list[Message], prompt: list[tuple[Message, bool]]) -> list[Message]:
    """Put the system and history columns of a row before its messages."""
    messages = [message for message, _ in prompt]
    if opening and messages and messages[0]["role"] == opening[0]["role"] == "system":
        if opening[0]["content"] != messages[0]["content"]:
            raise RowError("got a system column and another system message; expected one of them.")
        opening = opening[1:]
    return opening + messages


def parse_history(value: Any) -> list[Message]:
    """Return earlier turns, given as [question, answer] pairs; they are context, and not learned."""
    messages: list[Message] = []
    for pair in parse_json(value, "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("field 'history' is not a list of [question, answer] pairs.")
        texts = [text_of(text, "a turn of 'history'") for text in pair]
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    return messages


def is_null(value: Any) -> bool:
    """Tell whether a value stands for none: null, or the NaN that a table has in an empty cell."""
    return value is None or (isinstance(value, float) and value != value)


def message_list(value: Any) -> Any:
    """Return the messages that a cell is the JSON text of, as in a CSV file; any other cell as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_one = found and all(isinstance(item, dict) and not item.keys().isdisjoint(("role", "from")) for item in found)
    return found if is_one else value


def parse_messages(value: Any, what: str, chat_template: str) -> list[tuple[Message, bool]]:
    """Return the messages of a conversation, and whether each is to be learned if it is an answer."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = _from_json(value, what)
    if not isinstance(value, list) or not value:
        raise RowError(f"{what} is {_kind(value)}, expected a list of messages (role, content).")
    return [parse_message(item, f"message {i} of {what}", chat_template) for i, item in enumerate(value, start=1)]


def parse_message(item: Any, what: str, chat_template: str = "") -> tuple[Message, bool]:
    """Return a message with the role, the text and the further fields that a chat template knows; and its flag."""
    if not isinstance(item, Mapping):
        raise RowError(f"{what} is {_kind(item)}, expected an object with role and content.")
    item = {key: value for key, value in item.items() if not is_null(value)}
    name, content = (
        next((item[key] for key in keys if key in item), None) for keys in (("role", "from"), ("content", "value"))
    )
    given, name = name, name.strip().lower() if isinstance(name, str) else None
    if name not in ROLES:
        raise RowError(f"{what} has role {given!r}, expected one of {', '.join(ROLES)}.")
    role = name if name == "developer" and reads(chat_template, name) else ROLES[name]
    if mask := next((key for key in MASKS if key in item), None):
        raise RowError(
            f"{what} has {mask!r}, which tools mean in different ways; give it weight 0 if it is not learned, else 1."
        )
    own = {"role", "from", "content", "value", *FLAGS}
    more = {key: value for key, value in item.items() if key not in own}
    if "function_call" in more:  # OpenAI's older form
        more["tool_calls"] = [{"type": "function", "function": more.pop("function_call")}]
    if name in CALLS and reads(chat_template, "tool_calls") and (calls := _calls(content)):
        content, more["tool_calls"] = "", calls
    for key in REASONING:
        known = next((other for other in REASONING if reads(chat_template, other)), key)
        if key in more and not reads(chat_template, key):
            more[known] = more.pop(key)
    message = {"role": role, "content": content, **more}
    text = text_of(content, f"content of {what}", empty=says_something(message | {"content": ""}))
    flags = {flag: item[flag] for flag in FLAGS if flag in item}
    for flag, value in flags.items():
        if value not in (0, 1):
            raise RowError(f"{flag} of {what} is {value!r}, expected 0 or 1 (false or true).")
    return message | {"content": text}, all(flags.values())


def is_answer(message: Message, learned: bool) -> bool:
    """Tell whether a message is one to learn."""
    return message["role"] == "assistant" and learned and says_something(message)


def says_something(message: Message) -> bool:
    """Tell whether a message holds text, thoughts or calls of tools."""
    return bool(message["content"].strip()) or any(message.get(key) for key in ("tool_calls", *REASONING))


def _calls(content: Any) -> list[Any] | None:
    """Return the tool calls that a text spells in JSON, if it does."""
    try:
        calls = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        return None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return None
    return [{"type": "function", "function": call} for call in calls]


def parse_json(value: Any, field: str) -> Any:
    """Return a field that is a list or an object, or one of these as JSON text."""
    if isinstance(value, str):
        value = _from_json(value, f"field {field!r}")
    if not isinstance(value, dict if field == "chat_template_kwargs" else list):
        raise RowError(f"field {field!r} is {_kind(value)}, expected a list or, for chat_template_kwargs, an object.")
    return value


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not valid JSON ({error}); write it with json.dumps.") from error


def text_of(value: Any, what: str, *, empty: bool = False) -> str:
    """Return text, a number as text, or the text of content parts. `empty`: null (an empty cell) is empty text."""
    if is_null(value):
        value = "" if empty else None
    if isinstance(value, list) and value:
        return "".join(_part(part, what) for part in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise RowError(f"{what} is {_kind(value)}, expected a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{what} is not valid Unicode text ({error.reason}).") from error
    return value


def _part(part: Any, what: str) -> str:
    """Return the text of one of OpenAI's content parts."""
    if not isinstance(part, Mapping):
        raise RowError(f"{what} is a list with a part {_kind(part)}, expected a string; of several texts choose one.")
    if "role" in part or "from" in part:
        raise RowError(f"{what} is a list of messages, expected a string; give prompt and completion in the same form.")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise RowError(f"{what} has a part of type {kind!r}; expected text alone, images and sounds are not learned.")
    return text_of(part.get("text"), f"a part of {what}")


def _kind(value: Any) -> str:
    if is_null(value):
        return "missing or null"
    return "an empty list" if value == [] else f"of type {type(value).__name__}"
