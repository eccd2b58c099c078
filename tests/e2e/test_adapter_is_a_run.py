"""Every adapter that `pat tune` writes is a whole run: merged or evaluated by itself, it says what the run said."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB_SIZE, build, tiny_tokenizer
from tiny_runs import tune_flags
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import ModelConfig, get_quantization_config

import pat
from pat.checkpoint.merge import merge
from pat.evaluation.command import run_evaluate
from pat.evaluation.options import EvaluateOptions

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|user|>' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def rows(path: Path) -> Path:
    lines = [json.dumps({"instruction": f"Say {n}", "output": f"It is {n}."}) for n in range(40)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an end-of-text token and a template of its own, on a base whose tokenizer cannot pad."""
    folder = tmp_path_factory.mktemp("run")
    build("llama", tied=True).save_pretrained(folder / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "base")
    (folder / "template.jinja").write_text(TEMPLATE)
    flags = tune_flags(folder / "base", rows(folder / "data.jsonl"), folder / "out", eos_token="<|user|>")
    flags |= {"chat_template_path": str(folder / "template.jinja"), "milestone": 0.5}
    pat.tune(**flags | {"save_strategy": "steps", "save_steps": 3, "keep_checkpoints": True})
    return folder


def said(folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = {name: json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")}
    ids = {name: [file.get(f"{name}_token_id") for file in files.values()] for name in ("bos", "eos", "pad")}
    return ids | {
        "template": tokenizer.chat_template,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
    }


EXPECTED = {
    "bos": [1, 1],
    "eos": [5, [5, 2]],
    "pad": [0, 0],  # what the base's configuration says, whatever the trainer had to pad with
    "template": TEMPLATE,
    "eos_token": "<|user|>",
    "pad_token": None,
}


@pytest.mark.parametrize("folder", ["model", "compact/model"])
def test_models_say_it(folder: str, run: Path) -> None:
    assert said(run / "out" / folder) == EXPECTED


@pytest.mark.parametrize(
    "adapter", ["adapter", "compact/adapter", "checkpoints/checkpoint-3", "checkpoints/compact/checkpoint-6"]
)
def test_what_is_merged_of_an_adapter_says_it(adapter: str, run: Path, tmp_path: Path) -> None:
    merge(run / "out" / adapter, tmp_path / "out", progress=False)
    assert said(tmp_path / "out") == EXPECTED
    modes = {path.stat().st_mode for path in (run / "out" / adapter).glob("adapter_*")}
    assert len(modes) == 1, "weights can be read by whoever can read the rest"


def test_an_adapter_is_asked_as_its_model_is(run: Path) -> None:
    figures = [
        run_evaluate(
            EvaluateOptions(model=str(run / "out" / folder), dataset_name=str(run / "data.jsonl"), max_length=128)
        ).responses
        for folder in ("compact/adapter", "model")
    ]
    assert figures[0] is not None and figures[1] is not None
    assert figures[0].num_tokens == figures[1].num_tokens
    assert figures[0].nll == pytest.approx(figures[1].nll, abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_a_run_has_added_are_merged_into_the_base_without_them(tied: bool, tmp_path: Path) -> None:
    build("llama", tied=tied).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    other = tiny_tokenizer()
    other.add_tokens([AddedToken(f"<new{number}>", special=True) for number in range(VOCAB_SIZE - len(other) + 2)])
    other.eos_token, other.chat_template = other.convert_ids_to_tokens(VOCAB_SIZE + 1), TEMPLATE
    other.save_pretrained(tmp_path / "other")
    flags = tune_flags(tmp_path / "base", rows(tmp_path / "data.jsonl"), tmp_path / "out", no_compact=True)
    pat.tune(**flags | {"chat_template_path": str(tmp_path / "other"), "learning_rate": 1e-2})
    merge(tmp_path / "out" / "adapter", tmp_path / "merged", progress=False)
    own, merged = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out/model", "merged"))
    assert merged.get_input_embeddings().num_embeddings == 192 > VOCAB_SIZE
    for name, tensor in own.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    options = {"dataset_name": str(tmp_path / "data.jsonl"), "max_length": 128}
    records = [run_evaluate(EvaluateOptions(model=str(tmp_path / n), **options)) for n in ("out/adapter", "merged")]
    figures = [record.responses for record in records]
    assert figures[0] is not None and figures[1] is not None
    assert figures[0].nll == pytest.approx(figures[1].nll, abs=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_checkpoint_in_4_bits_is_tuned_as_one_that_is_quantised_while_loading(tmp_path: Path) -> None:
    build("llama", tied=True).save_pretrained(tmp_path / "base")
    quantization = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="float32"))
    assert isinstance(quantization, BitsAndBytesConfig)
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, dtype=torch.float32
    ).save_pretrained(tmp_path / "packed")
    for name in ("base", "packed"):
        tiny_tokenizer(tmp_path / name)
    data = rows(tmp_path / "data.jsonl")
    records = []
    for name, more in (("base", {"load_in_4bit": True}), ("packed", {})):
        pat.tune(**tune_flags(tmp_path / name, data, tmp_path / f"out-{name}", dtype="float32", **more))
        records.append(json.loads((tmp_path / f"out-{name}" / "results.json").read_text()))
    flagged, packed = records
    losses = [[entry["loss"] for entry in record["log_history"] if "loss" in entry] for record in records]
    assert losses[0] == losses[1]
    assert flagged["figures"]["dense"]["held_out_nll"] == packed["figures"]["dense"]["held_out_nll"]
    assert flagged["cut"] == packed["cut"]
    assert packed["pat_config"]["base_quantization"]["load_in_4bit"]
