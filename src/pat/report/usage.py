"""How a tuned model is loaded and asked: Python that puts a prompt into the form of the training."""

from __future__ import annotations

import json
from shlex import quote

LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({folder}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({folder})
"""
"""Python that loads a checkpoint; `folder` is a string in quotes."""

_CHAT = """\
messages = [{"role": "user", "content": "…"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=100, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""

_ALPACA = r"""prompt = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
).format(instruction="…")
prompt_with_input = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
).format(instruction="…", input="…")
inputs = tokenizer(prompt, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=100, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""

_PLAIN = """\
inputs = tokenizer("…", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=False)[0]))
"""

_FORMS = (
    ("chat template of", "It was tuned on prompts in its chat template:", _CHAT),
    ("Alpaca", "It was tuned on prompts of these two forms, line breaks included:", _ALPACA),
    (
        "Alpaca template, written as",
        "The chat template of its tokenizer makes the first of them, so that a server with a chat API asks in this "
        "form, too:",
        _CHAT,
    ),
    ("as they are", "It was tuned on texts as they are:", _PLAIN),
)
"""Words of the prompt format of a record, what is said of it, and the Python that asks in it."""


def ways_to_ask(prompt_format: str | None) -> list[tuple[str, str]]:
    """Return a sentence on each form of the training's prompts, with Python that asks in it; none if it is not known.

    Args:
        prompt_format: as the record of a run says it, of several sources joined by "or".
    """
    return [(sentence, code) for words, sentence, code in _FORMS if words in (prompt_format or "")]


def command_to_ask(prompt_format: str | None, folder: str, num_threads: int | None = None) -> str | None:
    """Return a command that asks a model greedily in the form of the training; None where no short one does.

    Args:
        prompt_format: see `ways_to_ask`.
        folder: of the model.
        num_threads: number of threads to answer with; None leaves it to torch.
    """
    if "chat template" in (prompt_format or ""):
        asked, answer = '[{"role": "user", "content": "Hello"}]', '["generated_text"][-1]["content"]'
    elif "as they are" in (prompt_format or ""):
        asked, answer = '"Hello"', '["generated_text"]'
    else:
        return None
    model = f'pipeline("text-generation", {json.dumps(folder)})'
    threads = "" if num_threads is None else f"import torch; torch.set_num_threads({num_threads}); "
    options = "max_new_tokens=100, do_sample=False"
    code = f"{threads}from transformers import pipeline; print({model}({asked}, {options})[0]{answer})"
    return f"python -c {quote(code)}"


def plain_way() -> tuple[str, str]:
    """Return how a model is asked of which no form of prompts is known."""
    return "A text is gone on with like this:", _PLAIN
