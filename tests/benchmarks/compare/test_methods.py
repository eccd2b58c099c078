"""Every method of a comparison: its flags are understood, its scale and its recipe are what they are said to be."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from compare.budget import lora_parameters_per_rank, lora_targets, pat_rank
from compare.cells import Cell
from compare.config import CompareConfig
from compare.data import prepare_data
from compare.methods import METHODS, PAPER
from compare.run_cell import _Run
from datasets import Dataset
from tiny_models import build, tiny_tokenizer
from trl import SFTTrainer

from pat.loading import load_tokenizer
from pat.recipes import recipe_defaults

ROWS = Dataset.from_list([{"prompt": "say ", "completion": "so"}])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    root = tmp_path_factory.mktemp("methods")
    build("llama", tied=True).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    rows = [{"prompt": f"say {i} ", "completion": f"it is {i * i}"} for i in range(40)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings: dict[str, Any] = {
        "models": [str(root / "base")],
        "data": str(root / "rows.jsonl"),
        "methods": ["lora"],
        "output_dir": root / "out",
        "steps": 30,
        "rank": 16,
        "lora_alpha": 8,
        "mask_lr_multiplier": 7,  # no recipe's
        "held_out": 4,
        "validation": 4,
        "max_length": 64,
        "template": "auto",
    }
    made = CompareConfig(**settings)
    prepare_data(made, load_tokenizer(str(root / "base")), root / "out" / "data" / "base")
    return made


@pytest.mark.parametrize("name", METHODS)
def test_flags_are_understood(config: CompareConfig, name: str) -> None:
    arguments = _Run(config, Cell("base", name, 0.25, 3, 1e-3), None)._arguments()
    assert arguments.sft.seed == 3 and arguments.sft.max_steps == 30
    if METHODS[name].order == "PAT":
        pat_config = arguments.pat_config()
        assert pat_config.pruning_ratio == 0.25
        if METHODS[name].of_paper:
            assert pat_config.mask_lr_multiplier == 7.0
        assert pat_config.use_dora == (name == "pat_dora")


@pytest.mark.parametrize("bf16", [None, True])
@pytest.mark.parametrize("name", ["lora", "minitron", "pat"])
def test_autocast_reaches_every_trainer(config: CompareConfig, name: str, bf16: bool | None) -> None:
    run = _Run(dataclasses.replace(config, bf16=bf16), Cell("base", name, 0.25, 0, 1e-3), None)
    arguments = run._arguments()
    assert arguments.sft.bf16 == (bf16 or torch.cuda.is_available()) and arguments.model.dtype != "bfloat16"
    trainer = SFTTrainer(
        build("llama", tied=True), arguments.sft, train_dataset=ROWS, processing_class=tiny_tokenizer()
    )
    assert trainer.accelerator.mixed_precision == ("bf16" if arguments.sft.bf16 else "no")


def test_the_papers_recipe_is_the_papers() -> None:
    recipe = recipe_defaults("paper")
    assert {name: recipe[name] for name in ("rotation", "milestone")} == {
        name: PAPER[name] for name in ("rotation", "milestone")
    }


@pytest.mark.parametrize("use_rslora", [True, False])
def test_the_scale_of_loras_product_is_the_same_at_every_rank(config: CompareConfig, use_rslora: bool) -> None:
    run = _Run(dataclasses.replace(config, use_rslora=use_rslora), Cell("base", "pat", 0.25, 0, 1e-3), None)
    scales = [run.alpha(rank) / (rank**0.5 if use_rslora else rank) for rank in (1, 5, 16, 64)]
    assert scales == pytest.approx([8 / (4 if use_rslora else 16)] * 4)


def test_pats_rank_meets_the_budget(config: CompareConfig) -> None:
    base = build("llama", tied=True)
    budget = config.rank * lora_parameters_per_rank(base, lora_targets(base))
    arguments = _Run(config, Cell("base", "pat", 0.25, 0, 1e-3), None)._arguments()
    rank, num_trainable = pat_rank(arguments, budget)
    below, above = (
        abs(num_trainable + step * lora_parameters_per_rank(base, lora_targets(base)) - budget) for step in (-1, 1)
    )
    assert rank >= 1 and abs(num_trainable - budget) <= min(below, above)
