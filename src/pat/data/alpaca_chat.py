"""Alpaca's words as a chat template, so that servers and transformers ask a model as it was tuned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from pat.data.formats import ALPACA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEFORE, _AFTER = ALPACA.split("{instruction}")
_GAP, _RESPONSE = _AFTER[:2], _AFTER[2:]

# A system message stands before the next instruction, as a paragraph of it: the words around it stay those that were
# learned. Each turn of a user is asked in all the words, and each answer ends as in training.
_TURNS = f"""\
{{%- set ns = namespace(system='') -%}}
{{%- for message in messages -%}}
{{%- if message['role'] in ['system', 'developer'] -%}}
{{%- set ns.system = ns.system + (message['content'] + '\\n\\n' if message['content'] else '') -%}}
{{%- elif message['role'] == 'user' -%}}
{{{{- {json.dumps(_BEFORE)} + ns.system + message['content'] + {json.dumps(_GAP)} -}}}}
{{%- set ns.system = '' -%}}
{{%- elif message['role'] == 'assistant' -%}}
{{{{- {json.dumps(_RESPONSE)} + message['content'] + eos_token -}}}}
{{%- else -%}}
{{{{- raise_exception("Alpaca's words have no place for a message with the role " + message['role']) -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if ns.system -%}}
{{{{- raise_exception("Alpaca's words need a user's message behind that of the system") -}}}}
{{%- endif -%}}
{{%- if add_generation_prompt -%}}
{{{{- {json.dumps(_RESPONSE)} -}}}}
{{%- endif -%}}"""

_PROBES = ("Add 1 and 2.", " ", "\n\nä")
"""Instructions whose tokens are compared."""


def is_alpaca_chat(template: str) -> bool:
    """Tell whether the source of a chat template is one of `alpaca_chat`."""
    return template.endswith(_TURNS)


def alpaca_chat(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a chat template with which one message of a user has the tokens of the training prompt.

    The text that a template makes is tokenised without special tokens, so what the tokenizer sets before a text by
    itself, such as a BOS token, is written into the template.

    Returns:
        Its source in Jinja; None if no template of ours makes the same tokens.
    """
    call = cast(Any, tokenizer)
    expected = []
    lead: list[int] = []
    for probe in _PROBES:
        prompt = ALPACA.format(instruction=probe)
        whole, bare = (list(call(prompt, add_special_tokens=special)["input_ids"]) for special in (True, False))
        starts = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
        if not starts:
            return None
        lead = whole[: starts[0]]
        expected.append(whole[: starts[0] + len(bare)])
    for template in _candidates(tokenizer, lead):
        found = []
        for probe in _PROBES:
            chat = [{"role": "user", "content": probe}]
            made = call.apply_chat_template(
                chat, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            found.append(list(made["input_ids"]))
        if found == expected:
            return template
    return None


def _candidates(tokenizer: PreTrainedTokenizerBase, lead: list[int]) -> Iterator[str]:
    """Yield the template behind what the tokenizer sets before a text; and with a space between them.

    Tokenizers that put a space before the first word of a text do not do so behind a special token that is written.
    """
    if not lead:
        yield _TURNS
        return
    text = "bos_token"
    if lead != [tokenizer.bos_token_id]:
        text = json.dumps("".join(cast(list[str], tokenizer.convert_ids_to_tokens(lead))), ensure_ascii=False)
    yield f"{{{{- {text} -}}}}\n{_TURNS}"
    yield f"{{{{- {text} + ' ' -}}}}\n{_TURNS}"
