"""The page of a run, made of a record alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from pat.report.page import Changed, render_report
from pat.report.svg import MAX_POINTS, thinned, ticks

HOSTILE = "<script>alert(1)</script><img src=http://example.org/x onerror=alert(2)>\"'"
VOID = {"meta", "br", "img", "input", "link", "hr"}


def record(**more: Any) -> dict[str, Any]:
    """Return a record of 20 steps as `pat tune` writes it."""
    figures = {
        "base": model(1_234_567, 2.5, 0.25),
        "tuned": model(1_300_000, 2.25, 0.2),
        "dense": model(987_654, 2.251, 0.21),
    }
    log = [{"step": step, "loss": 3.0 - step / 20, "learning_rate": 5e-4 - step * 1e-5} for step in range(1, 21)]
    return {
        "command": "tune",
        "model_name_or_path": "tiny",
        "dataset": "rows.jsonl",
        "num_steps": 20,
        "warnings": ["Read /home/somebody/data/rows.jsonl twice."],
        "cut": {"hidden_size": 64, "pruned_hidden_size": 48, "milestone_step": 5, "rotation": "pca"},
        "figures": figures,
        "parity": {
            "max_abs_logit_diff": 2.4e-3,
            "permutation_floor": 1.7e-3,
            "top1_agreement": 1.0,
            "num_tokens": 5100,
            "dtype": "float32",
        },
        "data": {"num_rows": 390, "num_truncated": 12},
        "timings": {"train_seconds": 61.0},
        "teacher": None,
        "samples": [{"prompt": "say", "base": "one", "small": "two", "reference": "three"}],
        "versions": {"torch": "2.13.0"},
        "log_history": [
            {"step": 0, "pat/energy_kept": 0.9375},
            *log,
            {"step": 3, "pat/active_channels": 56},
            {"step": 4, "pat/active_channels": 48},
        ],
    } | more


def model(num_parameters: int, nll: float, error: float) -> dict[str, Any]:
    """Return the figures of one model."""
    sizes = {"num_parameters": num_parameters, "num_bytes": 2 * num_parameters, "flops_per_token": 2.5e9}
    sizes["gguf_bytes"] = {"Q8_0": num_parameters, "Q4_K_M": num_parameters // 2}
    nlls = {"held_out_nll": nll, "held_out_standard_error": error, "held_out_difference_error": error / 100}
    return sizes | nlls | {"num_held_out_tokens": 777, "general_nll": nll + 1}


class Page(HTMLParser):
    """Tags and text of a page; what is not closed in turn is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += f"{data} "


def hostile(value: Any) -> Any:
    """Return a record in which every text is one that would run if it were not escaped."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_the_headline_says_where_the_models_are_not_told_apart() -> None:
    figures = record()["figures"]
    figures["dense"] |= {"held_out_difference_error": 0.2}
    page = render_report(record(figures=figures), None)
    assert "0.249 ± 0.200 below that of the untuned base (2.500); the two are not told apart. On general text" in page


def test_the_page_tells_what_the_record_holds() -> None:
    words = " ".join(Page(render_report(record(), [Changed("max_steps", "-1", "20")])).words.split())
    for fact in (
        "has 20.0 % fewer parameters than tiny (987,654 instead of 1,234,567), and its held-out loss is 2.251 nats per "
        "token, 0.249 ± 0.002 below that of the untuned base (2.500). On general text, which shows what was forgotten, "
        "it has 3.251, the base 3.500.",
        "2.500 ± 0.250",
        "64 → 48 (−25.0 %)",
        "milestone, step 5",
        "56 at step 3",
        "93.8 %",
        "the same next token as the tuned one in 100.00 % of 5,100 places",
        "the largest difference of a logit is 2.4e-03",
        "Rounding alone explains 1.7e-03 of that",
        "say the data three base one written two",
        "Read rows.jsonl twice.",
        "max_steps -1 20",
        "seconds of choosing, cutting and training 61 (other work on the machine changes them)",
        "speed is not shown, since other work on the machine changes it (tokens_per_second in results.json, too)",
        "torch 2.13.0",
    ):
        assert fact in words, fact


@pytest.mark.parametrize(
    ("prompts", "asks", "not_asks"),
    [
        ("the chat template of the tokenizer", "apply_chat_template(", 'tokenizer("…"'),
        ("the Alpaca template", "### Response:", "apply_chat_template("),
        ("the Alpaca template, written as the chat template", "apply_chat_template(", 'tokenizer("…"'),
        ("none, texts as they are", 'tokenizer("…"', "apply_chat_template("),
        (None, 'tokenizer("…"', "apply_chat_template("),
    ],
)
def test_the_written_model_is_asked_in_the_form_of_the_training(prompts: Any, asks: str, not_asks: str) -> None:
    words = Page(render_report(record(prompt_format=prompts, training_arguments={"output_dir": "my"}), [])).words
    code = words[words.index("from transformers import") :]
    assert 'from_pretrained("my/model")' in code and asks in code and not_asks not in code


def test_the_page_asks_for_nothing_and_runs_nothing() -> None:
    page = render_report(record(), [])
    found = Page(page)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "base"}
    assert not found.attributes & {"src", "href", "xlink:href", "srcset", "data"}
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page


def test_every_text_of_a_record_is_escaped() -> None:
    page = render_report(hostile(record(teacher={"name": "a"})), [Changed(HOSTILE, HOSTILE, HOSTILE)])
    found = Page(page)
    assert not found.tags & {"script", "img"} and "onerror" not in found.attributes
    assert found.words.count("<script>alert(1)</script>") > 10


def test_a_record_may_lack_anything_or_hold_anything() -> None:
    whole = record()
    odd = ({}, [], None, "text", -1, 1e300, True, {"base": {"num_parameters": 0}}, [{"step": "x"}, 3])
    for key in whole:
        Page(render_report({name: value for name, value in whole.items() if name != key}, None))
        for value in odd:
            Page(render_report(whole | {key: value}, None))
    words = " ".join(Page(render_report({"command": "tune"}, None)).words.split())
    for part in ("no figures of the models", "no logged losses", "no comparison", "keeps no warnings", "not known"):
        assert part in words


def test_the_page_of_a_record_is_always_the_same() -> None:
    assert render_report(record(), None) == render_report(record(), None)


def test_a_long_run_makes_no_long_page() -> None:
    log = [{"step": step, "loss": 1.0, "pat/active_channels": 60} for step in range(50_000)]
    page = render_report(record(log_history=log), None)
    assert len(page) < 100_000 and "mean of 167 logged values" in page


def test_points_are_thinned_to_means() -> None:
    few, group = thinned([(float(x), float(x % 2)) for x in range(2 * MAX_POINTS)])
    assert group == 2 and len(few) == MAX_POINTS and few[0] == (1.0, 0.5)


def test_ticks_are_round_numbers_within_the_axis() -> None:
    assert ticks(0, 150) == [0, 50, 100, 150]
    assert ticks(1.93, 2.11) == pytest.approx([1.95, 2.0, 2.05, 2.1])
    assert ticks(3, 3) == [3]


def test_drawings_say_in_words_what_they_show() -> None:
    page = render_report(record(), None)
    drawings = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"><title>', page)
    assert len(drawings) == page.count("<svg") == 12
    assert page.count('class="halo"') == page.count('class="whisker"') > 0  # else no bar of either scheme shows it
    assert any("base: 1,234,567; tuned: 1,300,000; written: 987,654" in said for said in drawings)


def test_a_model_that_is_made_small_before_its_first_step_has_no_gates() -> None:
    cut = record()["cut"] | {"milestone_step": 0}
    log = [row for row in record()["log_history"] if "pat/active_channels" not in row]
    page = render_report(record(cut=cut, compaction={"parity": None}, log_history=log), None)
    assert "every step trained the small model" in page and "milestone, step" not in page
    assert "at which step" not in page
    at_full_width = render_report(record(cut=cut, compaction=None, log_history=log), None)
    assert "every step trained the small model" not in at_full_width and "at which step" in at_full_width


def test_a_ratio_that_was_rounded_far_is_told_of_the_model_that_is_there() -> None:
    cut = {"num_parameters_base": 1000, "num_parameters": 850}
    for asked, said in ((0.125, "12.5 %"), (None, "25.0 %")):
        page = render_report(record(cut=cut, pat_config={"pruning_ratio": asked}), None)
        assert f"15.0 % of the parameters were cut where {said} were asked for" in page
    for request, more in (
        ({"pruning_ratio": 0.145}, {}),
        ({"pruning_ratio": 0.125}, {"vocab_size": 512, "pruned_vocab_size": 256}),
        ({"pruning_ratio": None, "pruned_hidden_size": 48}, {}),
        ({"pruning_ratio": None, "target_latency": 0.8}, {}),
        ({}, {}),  # of which nothing is known
    ):
        assert "were asked for" not in render_report(record(cut=cut | more, pat_config=request), None)
