"""Conversations as a chat template writes them, and what it leaves out: messages of a role, and parts of an answer."""

from __future__ import annotations

import copy
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from pat.data.messages import REASONING, reads

ANSWER = "answer"
"""Stands, beside roles of messages, for what is learned."""

MESSAGES = ("prompt", "completion")
"""Columns of an example that hold messages."""

_END_OF_THOUGHTS = re.compile(r"</(?:think|thinking|thought|reasoning)>")
_SWITCH = re.compile(r"(?<!\S)/\w+")
"""Word such as `/no_think`, which some templates take as an order to themselves."""
_TAG = re.compile(r"</?\w+>")


class Text:
    """A text of a template, in which something is found without regard to blanks, case and escapes."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def _bare(self) -> str:
        return _bare(self.text)

    def has_plainly(self, said: str) -> bool:
        """Tell whether something is there, blanks and case apart, and not escaped."""
        return said in self.text or _bare(said) in self._bare

    def __contains__(self, said: object) -> bool:
        said = str(said).strip()
        # The first is what nearly always is there, and costs next to nothing.
        return said in self.text or any(_bare(form) in self._bare for form in _forms(said))


@dataclass(frozen=True)
class Rendered:
    """A conversation as a chat template writes it."""

    row: Mapping[str, Any]
    """The conversation, with the arguments of its calls in the form that the template takes."""
    whole: str
    prompt: str
    """The text of its prompt alone."""
    refusal: str = ""
    """Why there is no text."""


def render(row: Mapping[str, Any], write: Callable[..., str], template: str) -> Rendered:
    """Write a conversation, with the arguments of its calls in the form in which their JSON stands in the text.

    Some templates serialise arguments, and escape those that are JSON text already, as OpenAI has them; some put text
    together, and write objects as Python does or not at all; some take both.

    Args:
        row: an example with the messages `prompt` and `completion`.
        write: makes text of messages; takes `add_generation_prompt`.
        template: source of the chat template.
    """
    found: list[tuple[int, Mapping[str, Any], str]] = []
    errors: list[Exception] = []
    for form in _forms_of_calls(row) if reads(template, "tool_calls") else [row]:
        try:
            whole = write(form["prompt"] + form["completion"])
        except Exception as error:  # whatever the expressions of a template raise
            errors.append(error)
            continue
        text, arguments = Text(whole), _arguments_of(form)
        all_stand = all(_stands(own, text) for own in arguments)
        found.append((2 if all_stand else int(all(_is_told(own, text) for own in arguments)), form, whole))
        if all_stand:
            break
    if not found:
        raise errors[0]
    _, form, whole = max(found, key=lambda one: one[0])  # of equals the first
    return Rendered(form, whole, write(form["prompt"], add_generation_prompt=True))


def _forms_of_calls(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a conversation as it is, with all arguments of calls as objects, and with all of them as JSON text."""
    yield row
    if _arguments_of(row):
        for change in (_as_object, _as_text):
            changed = copy.deepcopy({name: row[name] for name in MESSAGES})
            for function in _functions(changed, *MESSAGES):
                function["arguments"] = change(function["arguments"])
            if any(changed[name] != row[name] for name in MESSAGES):
                yield {**row, **changed}


def _functions(row: Mapping[str, Any], *names: str) -> Iterator[dict[str, Any]]:
    """Yield what the messages of a conversation call, so far as it has arguments."""
    for message in chain.from_iterable(row[name] for name in names):
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict) and "arguments" in function:
                yield function


def _arguments_of(row: Mapping[str, Any], *names: str) -> list[Any]:
    return [function["arguments"] for function in _functions(row, *(names or MESSAGES))]


def _as_object(arguments: Any) -> Any:
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _stands(arguments: Any, text: Text) -> bool:
    """Tell whether arguments stand in a text as JSON that is not escaped."""
    if isinstance(arguments, str):
        return text.has_plainly(arguments) and json.dumps(arguments) not in text.text
    return any(text.has_plainly(json.dumps(arguments, ensure_ascii=ascii_only)) for ascii_only in (False, True))


def _is_told(arguments: Any, text: Text) -> bool:
    """Tell whether arguments stand in a text as JSON, or those of an object one by one."""
    if isinstance(arguments, str):  # escaped, too: it may be no object, such as the empty text of a call without any
        return arguments in text or json.dumps(arguments) in text.text
    return _stands(arguments, text) or (
        isinstance(arguments, dict) and all(leaf in text for leaf in _leaves(arguments))
    )


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None:  # a template may leave out what is not given
        yield str(value)


def left_out(row: Mapping[str, Any], whole: str, prompt: str, template: str) -> set[str]:
    """Return the roles of messages that are not in a text, and `ANSWER` if a part of what is learned is not.

    Thoughts in front of earlier answers may be missing: they are context, and templates leave them out on purpose.

    Args:
        row: an example with the messages `prompt` and `completion`.
        whole: the text that the template made of it.
        prompt: the text of the prompt alone, with which the other one usually begins.
        template: source of the chat template.
    """
    text = Text(whole)
    missing: set[str] = {m["role"] for m in row["prompt"] if m["content"] not in text and not _is_thought_of(m, text)}
    tail = Text(whole.removeprefix(prompt))
    for message in row["completion"]:
        if message["role"] != "assistant":
            missing |= set() if message["content"] in text else {message["role"]}
        elif any(part not in tail for said in _said(message, template) for part in _parts(said, tail)):
            missing.add(ANSWER)
    if reads(template, "tool_calls"):
        for name, where, who in (("prompt", text, "assistant"), ("completion", tail, ANSWER)):
            if not all(_is_told(arguments, where) for arguments in _arguments_of(row, name)):
                missing.add(who)
    return missing


def _is_thought_of(message: Mapping[str, Any], text: Text) -> bool:
    """Tell whether only thoughts of an earlier answer are missing."""
    return message["role"] == "assistant" and _END_OF_THOUGHTS.split(message["content"])[-1] in text


def _said(message: Mapping[str, Any], template: str) -> Iterator[str]:
    """Yield what an answer says; fields that the template does not mention are counted elsewhere, as `unread`."""
    yield message["content"]
    for name in REASONING:
        if isinstance(thoughts := message.get(name), str) and reads(template, name):
            yield thoughts


def _parts(said: str, text: Text) -> list[str]:
    """Return what has to be there: a template may put tags, such as those around thoughts, elsewhere."""
    return [] if said.strip() in text.text else _TAG.split(said)


def _forms(said: str) -> Iterator[str]:
    yield said
    yield _SWITCH.sub("", said)
    yield html.escape(said)
    for ascii_only in (False, True):
        yield json.dumps(said, ensure_ascii=ascii_only)[1:-1]


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()
