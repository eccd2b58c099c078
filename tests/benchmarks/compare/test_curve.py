"""What a training costs: the formula against a count by hand, tokens against the rows, a curve against its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compare.curve import CurveRecorder, flops_per_token, forward_parameters
from compare.scoring import Scorer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import build, tiny_tokenizer
from trl import SFTTrainer

from pat.training.arguments import build_arguments

ROWS = [{"prompt": f"say {i} ", "completion": "so " * (1 + i % 5)} for i in range(8)]


def test_the_formula_is_the_count_of_products_of_two_linear_layers() -> None:
    # y = (W + B A) x with W (5 x 3, frozen), A (2 x 3) and B (5 x 2): one multiply-add is two FLOPs.
    frozen, trained = 5 * 3, 2 * 3 + 5 * 2
    forward = 2 * frozen + 2 * trained
    to_the_input = 2 * frozen + 2 * trained  # Wᵀ dy, Bᵀ dy, Aᵀ (Bᵀ dy)
    to_the_weights = 2 * trained  # dy (A x)ᵀ, (Bᵀ dy) xᵀ
    assert flops_per_token(frozen, trained) == forward + to_the_input + to_the_weights
    assert flops_per_token(frozen, trained, 7) == flops_per_token(frozen, trained) + 2 * 7


def test_an_embedding_counts_where_it_is_multiplied() -> None:
    tied, untied = build("llama", tied=True), build("llama", tied=False)
    assert forward_parameters(tied) == forward_parameters(untied) == sum(p.numel() for p in tied.parameters())


@pytest.mark.parametrize("every", [None, 2])
def test_a_run_of_trainings_is_counted_as_one(every: int | None, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    scorer = Scorer(tmp_path / "rows.jsonl", tokenizer, 64)
    recorder = CurveRecorder(scorer, every=every, num_teacher=10)
    expected = 0
    for rank in (1, 2):  # as PAT's two stages train two models
        arguments = build_arguments(
            model_name_or_path="base",
            dataset_name="rows.jsonl",
            output_dir=str(tmp_path),
            num_train_epochs=1,
            per_device_train_batch_size=2,
            include_num_input_tokens_seen="non_padding",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        model = get_peft_model(build("llama", tied=True), LoraConfig(r=rank, task_type="CAUSAL_LM"))
        trainer = SFTTrainer(
            model,
            arguments.sft,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        trainer.train()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters()) - trained
        per_epoch = sum(len(row["input_ids"]) for row in scorer.examples(tokenizer))
        expected += per_epoch * (4 * frozen + 6 * trained + 2 * 10)
    assert recorder.tokens == 2 * per_epoch and recorder.flops == expected
    facts = recorder.facts()
    if every is None:
        assert facts == {"train_tokens": recorder.tokens, "train_flops": recorder.flops}
        return
    assert [point["step"] for point in facts["curve"]] == [2, 4, 2, 4]
    assert facts["curve"][-1]["nll"] == pytest.approx(scorer(model, tokenizer).nll)
    assert facts["curve"][-1]["flops"] == expected
