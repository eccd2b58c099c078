"""Sample answers are greedy, to the first prompts that differ, and how many tokens are written is shown."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import build, tiny_tokenizer

from pat.report.progress import Phase
from pat.training.outcome import samples
from pat.training.outcome.samples import MAX_NEW_TOKENS, NUM_PROMPTS, greedy_answers, paired


def test_the_first_prompts_that_differ_are_answered_and_tokens_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[str] = []
    monkeypatch.setattr(samples, "phase", lambda *args, **options: _Recorded(states, *args, **options))
    torch.manual_seed(0)
    model, tokenizer = build("llama", tied=True), tiny_tokenizer()
    prompts = [[1, 5, 7], [1, 5, 7], [1, 9], [1, 11]]
    answers = [[13, 15, tokenizer.eos_token_id], [7], [12], [14]]
    held_out = [
        {"input_ids": [*prompt, *given], "labels": [-100] * len(prompt) + given}
        for prompt, given in zip(prompts, answers, strict=True)
    ]
    data: Any = SimpleNamespace(held_out=held_out, ends=[], vocabulary=SimpleNamespace(tokenizer=tokenizer))
    found = greedy_answers(model, data)
    assert [prompt for prompt, _ in found] == [tokenizer.decode(prompt) for prompt in ([1, 5, 7], [1, 9])]
    ids, answer = torch.tensor([[1, 9]]), []
    for _ in range(MAX_NEW_TOKENS):
        following = model(ids).logits[0, -1].argmax()
        if following == tokenizer.eos_token_id:
            break
        answer.append(int(following))
        ids = torch.cat([ids, following.view(1, 1)], dim=1)
    assert found[1][1] == tokenizer.decode(answer, skip_special_tokens=True).strip()
    given = [sample.reference for sample in paired(found, found, data)]
    assert given == [tokenizer.decode(ids) for ids in ([13, 15], [12])]  # of these prompts' rows, without end
    total = NUM_PROMPTS * MAX_NEW_TOKENS
    assert states[-1].startswith(f"Answering held-out prompts: {MAX_NEW_TOKENS + len(answer):,} of {total:,} tokens")


class _Recorded:
    """A phase whose text is noted when it ends."""

    def __init__(self, states: list[str], title: str, unit: str, *, total: int) -> None:
        self.states, self.phase = states, Phase(title, unit, total)

    def __enter__(self) -> Phase:
        return self.phase

    def __exit__(self, *_: object) -> None:
        self.states.append(self.phase.text())
