"""The model card: valid front matter, the figures, and no trace of this machine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny_models import build, tiny_tokenizer

from pat.checkpoint.card import Cut, base_license, render_card, shown_name
from pat.checkpoint.verify import Parity
from pat.data.formats import ALPACA, ALPACA_WITH_INPUT

CUT = Cut(
    hidden_size=576,
    pruned_hidden_size=432,
    num_parameters_base=134_515_008,
    num_parameters=100_886_256,
    num_bytes=403_559_000,
    rotation="pca",
    mask="trainable",
    milestone_step=40,
)
PARITY = Parity(8.6e-5, 5.4e-10, 0.999, 1024, 3.1, "float32")


def card(**provenance: Any) -> str:
    return render_card(CUT, PARITY, {"model_name_or_path": "org/base"} | provenance)


def test_front_matter_is_what_the_hub_reads() -> None:
    data = ModelCard(card()).data.to_dict()
    assert data == {
        "base_model": "org/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "pruning-aware-tuning", "pat-llm"],
    }


def test_sizes_method_and_parity_are_told() -> None:
    text = card(recipe="default", dataset="org/data", seed=3, num_steps=120, held_out_nll={"base": 1.8, "tuned": 2.1})
    for fact in (
        "| hidden size | 576 | 432 (−25.0 %) |",
        "| parameters | 134,515,008 | 100,886,256 (−25.0 %) |",
        "403.6 MB",
        "recipe: default",
        "data: org/data",
        "seed: 3",
        "optimizer steps: 120",
        "the mask is 0/1 from step 40 on",
        "rotation of the residual stream: pca",
        "transformers 5.",
        "8.6e-05",
        "99.90 %",
        "1,024 tokens",
        "| tuned | 2.100 | +0.300 |",
        "arXiv:2408.14721",
        "AAAI 2025",
    ):
        assert fact in text, fact


def test_a_model_that_is_cut_before_its_first_step_has_had_no_mask() -> None:
    cut = replace(CUT, milestone_step=0)
    text = render_card(cut, PARITY, {"is_compacted": True})
    assert "milestone: what goes is cut before the first step" in text and "- mask:" not in text
    assert "milestone: the mask is 0/1 from step 0 on" in render_card(cut, PARITY, {"is_compacted": False})


def test_the_run_is_told_where_it_is_known() -> None:
    text = card(
        prompt_format="the tokenizer's chat template",
        num_tokens_seen=1_234_567,
        learning_rates={"adapter": 2e-4, "mask": 8e-3},
        max_length=2048,
        held_out_nll={"base": 1.8, "dense": 2.1},
        held_out_standard_error={"dense": 0.01234},
        num_held_out_tokens=29_571,
    )
    for fact in (
        "- prompt format: the tokenizer's chat template",
        "- tokens seen: 1,234,567",
        "- learning rates: adapter 0.0002, mask 0.008",
        "nats per response token, on 29,571 tokens",
        "| base | 1.800 | – |",
        "| dense | 2.100 ± 0.012 | +0.300 |",
        "- It was tuned on prompts of one form: the tokenizer's chat template.",
        "longer than 2,048 tokens",
    ):
        assert fact in text, fact


def test_what_is_not_known_is_not_mentioned() -> None:
    text = card()
    for absent in ("recipe", "data:", "seed", "Held-out", "None", "prompt", "longer", "learning", "±"):
        assert absent not in text, absent


@pytest.mark.parametrize(
    "prompts",
    [
        "the Alpaca template",
        "the Alpaca template, written as the chat template",
        "the chat template of the tokenizer",
    ],
)
def test_the_prompt_is_that_of_the_training(prompts: str, tmp_path: Path) -> None:
    blocks = card(prompt_format=prompts).split("```python\n")[1:]
    code = "".join(block.partition("```")[0] for block in blocks)
    build("llama", tied=True).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    known: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(tmp_path)), known)
    assert ("messages" in known) == ("chat template" in prompts)
    if "Alpaca" in prompts:
        assert known["prompt"] == ALPACA.format(instruction="…")
        assert known["prompt_with_input"] == ALPACA_WITH_INPUT.format(instruction="…", input="…")


@pytest.mark.parametrize("engines", [None, "vLLM cannot load it."])
@pytest.mark.parametrize("prompts", [None, "none, texts as they are", "the Alpaca template or the chat template of it"])
@pytest.mark.parametrize("losses", [{}, {"base": 2.5, "tuned": 2.25}])
@pytest.mark.parametrize("work", [{}, {"base": 3e8, "dense": 2.4e8}])
def test_blocks_stand_apart_by_one_empty_line(prompts: Any, engines: Any, losses: Any, work: Any) -> None:
    facts = {"prompt_format": prompts, "engines": engines, "held_out_nll": losses, "flops_per_token": work}
    lines = card(**facts, max_length=8).splitlines()
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        assert not line.startswith("## ") or (before == after == ""), line
        assert not line.startswith("| ") or before == "" or before.startswith("|"), line
        assert not before.startswith("|") or line == "" or line.startswith("|"), line
        assert line or before, after
    assert "|  |" not in "\n".join(lines[4:]).replace("|  | base |", "")


def test_sizes_and_losses_stand_beside_the_bases() -> None:
    assert "| size of the weights | 538.1 MB | 403.6 MB |" in card()  # as many bytes for each parameter
    text = card(base_bytes=269e6, held_out_nll={"base": 1.8, "tuned": 1.75}, held_out_difference_error={"tuned": 0.01})
    assert "| size of the weights | 269.0 MB | 403.6 MB |" in text
    assert "| base | 1.800 | – |" in text and "| tuned | 1.750 | −0.050 ± 0.010 |" in text


def test_the_work_for_a_token_stands_beside_the_bases() -> None:
    row = "| FLOPs per token of a text of 2,048, or of what the model can read |"
    assert f"{row} 300.0 MFLOP | 240.0 MFLOP (−20.0 %) |" in card(flops_per_token={"base": 3e8, "dense": 2.4e8})
    assert f"{row} – | 240.0 MFLOP |" in card(flops_per_token={"base": None, "dense": 2.4e8})  # a merge without a run
    assert "FLOP" not in card(flops_per_token={"base": 3e8})


def test_the_three_lines_are_python() -> None:
    code = card().partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) == 3
    compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("org/model-1.5", "org/model-1.5"),
        ("model", "model"),
        ("/home/someone/models/base", "base"),
        ("/home/someone/models/base/", "base"),
        ("./models/base", "base"),
        ("../base", "base"),
        ("models/sub/base", "base"),
        ("~/base", "base"),
        (r"C:\models\base", "base"),
    ],
)
def test_of_a_path_only_the_last_component_is_shown(name: str, shown: str) -> None:
    assert shown_name(name) == shown


def test_an_existing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert shown_name("private/base") == "base"


def test_no_path_of_base_or_data_gets_into_the_card(tmp_path: Path) -> None:
    text = card(model_name_or_path=str(tmp_path / "base"), dataset=str(tmp_path / "data.jsonl"))
    assert str(tmp_path) not in text
    assert "data: data.jsonl" in text
    assert "base_model" not in ModelCard(text).data.to_dict()  # which the hub takes for an id
    assert "`base` names no model of the Hub" in text


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("org/first", "org/first"),
        ("[org/first]", "org/first"),
        ("[org/a, org/b]", None),
        ("local", None),
        ("/a/b", None),
    ],
)
def test_what_the_base_was_made_of_is_said_and_is_not_taken_for_the_base(
    tmp_path: Path, named: str, expected: str | None
) -> None:
    (tmp_path / "README.md").write_text(f"---\nbase_model: {named}\n---\n# Base\n")
    text = card(model_name_or_path=str(tmp_path))
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert (f"Its own card says that it was made of `{expected}`" in text) == (expected is not None)


def test_a_folder_of_the_hubs_cache_is_known_by_its_place(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--base-1.5" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert ModelCard(card(model_name_or_path=str(snapshot))).data.to_dict()["base_model"] == "org/base-1.5"


def test_the_licence_is_that_of_the_base(tmp_path: Path) -> None:
    front = "---\nlicense: other\nlicense_name: terms\nlicense_link: https://example.org/terms\n---\n# Base\n"
    (tmp_path / "README.md").write_text(front)
    expected = {"license": "other", "license_name": "terms", "license_link": "https://example.org/terms"}
    assert base_license(str(tmp_path)) == expected
    data = ModelCard(card(model_name_or_path=str(tmp_path))).data.to_dict()
    assert expected.items() <= data.items()


@pytest.mark.parametrize(
    "content", [None, "# no front matter\n", "---\nlicense: [broken\n---\n", "---\ntags: [a]\n---\n"]
)
def test_no_usable_card_means_no_licence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "README.md").write_text(content)
    assert base_license(str(tmp_path)) == {}


def test_an_unknown_hub_id_has_no_licence() -> None:
    assert base_license("no-such-org/no-such-model") == {}
    assert base_license("not a hub id: at all") == {}


def test_names_are_text_and_no_markup() -> None:
    hostile = "data/<script>alert(1)</script>|[x](http://example.com)\n# heading"
    card = render_card(CUT, PARITY, {"dataset": hostile, "model_name_or_path": "a\n# b<img src=x>"})
    body = card.split("---", 2)[2]
    assert "<script>" not in body and "<img" not in body and "\n# heading" not in body and "\n# b" not in body
