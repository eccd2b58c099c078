"""Finds what a chat template leaves out of a conversation: messages of a role, and parts of an answer."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from pat.training.messages import REASONING, reads

ANSWER = "answer"
"""Stands, beside roles of messages, for what is learned."""

_THOUGHTS = re.compile(r".*</(think|thinking|thought|reasoning)>", re.DOTALL)
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

    def __contains__(self, said: object) -> bool:
        said = str(said).strip()
        # The first is what nearly always is there, and costs next to nothing.
        return said in self.text or any(_bare(form) in self._bare for form in _forms(said))


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
    return missing


def _is_thought_of(message: Mapping[str, Any], text: Text) -> bool:
    """Tell whether only thoughts of an earlier answer are missing."""
    return message["role"] == "assistant" and _THOUGHTS.sub("", message["content"]) in text


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
