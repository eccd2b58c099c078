"""Masked against dense on trained models and real text, held against the noise floor of the same model and text.

`pytest -s` shows the figures. The floor is the merged model compared with itself, its channels merely permuted.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hardened import hardened
from peft import PeftModel
from tiny_training import attach, tuner_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pat.checkpoint.card import Cut
from pat.checkpoint.verification_text import verification_batches
from pat.checkpoint.verify import Parity, check, compare, permutation_floor
from pat.checkpoint.write import load_written, save_checkpoint

MAX_LOGIT_DIFF = 1e-3
MAX_FLOORS = 5
"""The merge may cost some roundings more than a permutation: the masked model has two operators a layer and a basis to
go through, the dense one has none."""

MOVED = 0.1
"""How far the adapter is moved from its start: the operators then change the residual stream by some percent."""

GAIN_TOLERANCE = 0.15
"""The method's default; the tiny models' helpers have another."""

MAX_SMOLLM2_PARAMETERS = 102_000_000
"""At 25 %, if tied stays tied; untied it would be 122 million."""


def batches_of(
    tokenizer: PreTrainedTokenizerBase, num: int, shared_data: Path | None = None
) -> list[dict[str, Tensor]]:
    """Return batches of the text that comes with the package or, for the large models, of Wikipedia articles."""
    return verification_batches(tokenizer, shared_data and shared_data / "text" / "wiki_demo.txt")[:num]


def measured(model: PeftModel, batches: list[dict[str, Tensor]], folder: Path) -> tuple[Parity, Parity, Cut]:
    """Write the dense model and return (parity, floor, cut), the dense model read back from disk; print all figures."""
    folder.mkdir()
    parity, cut = save_checkpoint(model, folder, batches=batches, provenance={})
    floor = permutation_floor(load_written(folder, model.dtype), batches)
    assert int(tuner_of(model).mask().keep.sum()) == cut.pruned_hidden_size
    print(
        f"\n{cut.hidden_size} -> {cut.pruned_hidden_size}, rotation {cut.rotation}, {cut.num_parameters:,} parameters: "
        f"max |Δlogit| {parity.max_abs_logit_diff:.2e} (floor {floor.max_abs_logit_diff:.2e}), KL {parity.mean_kl:.1e},"
        f" top-1 {parity.top1_agreement:.4f}, logit deviation {parity.logit_std:.2f}, {parity.num_tokens} tokens"
    )
    return parity, floor, cut


def trained(base: PreTrainedModel, batches: list[dict[str, Tensor]], *, num_steps: int, **fields: Any) -> PeftModel:
    """Attach, calibrate and tune for some real steps on single rows, the milestone at a third of them."""
    model = attach(base, gain_tolerance=GAIN_TOLERANCE, **fields)
    tuner = tuner_of(model)
    if tuner.needs_calibration():
        tuner.calibrate(batches)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for step in range(num_steps):
        tuner.set_step(step, num_steps // 3)
        ids = batches[step % len(batches)]["input_ids"][:, :128]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuner.set_step(num_steps, num_steps // 3)
    return model.eval()


def assert_rounding_only(parity: Parity, floor: Parity) -> None:
    assert parity.max_abs_logit_diff <= MAX_LOGIT_DIFF
    assert parity.max_abs_logit_diff <= MAX_FLOORS * floor.max_abs_logit_diff


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rotation", ["none", "pca"])
def test_stories260k(
    stories260k: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tmp_path: Path,
    rotation: str,
    dora: bool,
    untied: bool,
) -> None:
    base, tokenizer = stories260k
    batches = batches_of(tokenizer, 4)
    calibration = batches if rotation == "pca" else []
    fields = {"rotation": rotation, "use_dora": dora, "untie_word_embeddings": untied}
    model = hardened(base, calibration=calibration, scale=MOVED, gain_tolerance=GAIN_TOLERANCE, **fields)
    parity, floor, _ = measured(model, batches, tmp_path / "dense")
    assert_rounding_only(parity, floor)


@pytest.mark.parametrize("wrong", ["epsilon", "gain"])
def test_a_wrong_fold_is_far_above_the_floor(
    stories260k: tuple[PreTrainedModel, PreTrainedTokenizerBase], wrong: str
) -> None:
    """What the bounds are worth: leave one factor of the exact merge out and see."""
    base, tokenizer = stories260k
    batches = batches_of(tokenizer, 1)
    model = hardened(base, scale=MOVED, rotation="none")
    dense = model.merge_and_unload()
    floor = permutation_floor(dense, batches)
    for module in dense.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            if wrong == "epsilon":
                module.variance_epsilon *= 48 / 64
            else:
                module.weight.data *= (48 / 64) ** 0.5
    error = compare(model, dense, batches).max_abs_logit_diff
    print(f"\n{wrong} left as it was: {error:.2e}, floor {floor.max_abs_logit_diff:.2e}")
    assert error > MAX_FLOORS * floor.max_abs_logit_diff


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_stories260k_in_reduced_precision(stories260k_path: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    base = AutoModelForCausalLM.from_pretrained(stories260k_path, dtype=dtype)
    batches = batches_of(AutoTokenizer.from_pretrained(stories260k_path), 1)
    model = hardened(base, calibration=batches, scale=MOVED, gain_tolerance=GAIN_TOLERANCE)
    parity, _, _ = measured(model, batches, tmp_path / "dense")
    assert parity.dtype == str(dtype).removeprefix("torch.")
    check(parity)


@pytest.mark.slow
def test_smollm2(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    batches = batches_of(AutoTokenizer.from_pretrained(smollm2), 2, shared_data)
    model = trained(base, batches, num_steps=6)
    parity, floor, cut = measured(model, batches, tmp_path / "dense")
    assert_rounding_only(parity, floor)
    assert (cut.pruned_hidden_size, cut.rotation) == (432, "pca")
    assert cut.num_parameters <= MAX_SMOLLM2_PARAMETERS


@pytest.mark.slow
def test_smollm2_in_4_bit(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    """Computing in float32, the masked model adds no rounding of its own to the dequantised weights."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, quantization_config=quantization)
    batches = batches_of(AutoTokenizer.from_pretrained(smollm2), 1, shared_data)
    model = hardened(base, calibration=batches, scale=MOVED, gain_tolerance=GAIN_TOLERANCE)
    parity = compare(model, model.merge_and_unload(), batches)
    print(f"\nSmolLM2 in NF4: {parity.describe()}")
    assert parity.max_abs_logit_diff <= MAX_LOGIT_DIFF


@pytest.mark.slow
def test_gemma3_270m(gemma3_270m: Path, shared_data: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(gemma3_270m, dtype=torch.float32)
    batches = batches_of(AutoTokenizer.from_pretrained(gemma3_270m), 1, shared_data)
    model = trained(base, batches, num_steps=3)
    parity, floor, cut = measured(model, batches, tmp_path / "dense")
    assert_rounding_only(parity, floor)
    assert (cut.pruned_hidden_size, cut.rotation) == (480, "none")
    assert cut.num_parameters < 0.76 * cut.num_parameters_base, "tied stays tied"
