"""Saving and loading with peft: bit-identical, here and in a new process, whatever the state of the mask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import batch, build
from tiny_training import StopAt, attach, largest_difference, logits, pat_config, train, tuner_of
from transformers import AutoModelForCausalLM, PreTrainedModel

REPO = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Variant:
    """An adapter as it is after `stop` of four optimizer steps with the milestone at the second; 0: just attached."""

    name: str
    family: str = "llama"
    tied: bool = True
    stop: int = 1
    fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


VARIANTS = [
    Variant("fresh", stop=0),
    Variant("soft-rotated-tied", fields={"rotation": "pca"}),
    Variant("soft-rotated-untied", tied=False, fields={"rotation": "pca"}),
    Variant("soft-importance", family="gemma3_text", fields={"rotation": "auto"}),
    Variant("soft-plain", fields={"rotation": "none"}),
    Variant("soft-frozen", fields={"rotation": "none", "mask": "frozen"}),
    Variant("hard-rotated-tied", stop=3, fields={"rotation": "pca"}),
    Variant("hard-rotated-untied", stop=3, tied=False, fields={"rotation": "pca", "use_dora": True}),
    Variant("hard-dense-operator", stop=3, fields={"rotation": "none", "operator_rank": "dense", "use_rslora": True}),
    Variant("hard-frozen", stop=3, fields={"rotation": "pca", "mask": "frozen"}),
    Variant("hard-experts", family="mixtral", stop=3, fields={"rotation": "auto"}),
    Variant(
        "hard-modules-to-save",
        tied=False,
        stop=3,
        fields={"rotation": "pca", "modules_to_save": ["norm", "lm_head", "embed_tokens"]},
    ),
    Variant("hard-untied", stop=3, fields={"rotation": "pca", "untie_word_embeddings": True}),
]


@dataclass(frozen=True)
class Saved:
    folder: Path
    model: PeftModel
    logits: torch.Tensor

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def base(self) -> PreTrainedModel:
        """The base from its file: weights in the same place of the same file lie alike in memory in every process."""
        return AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    result = {}
    for variant in VARIANTS:
        folder = tmp_path_factory.mktemp(variant.name)
        build(variant.family, tied=variant.tied).save_pretrained(folder / "base")
        base = Saved(folder, None, None).base()
        model = attach(base, milestone=0.5, **variant.fields)
        if variant.stop:
            train(model, max_steps=4, callbacks=[StopAt(variant.stop)])
        mask = tuner_of(model).mask()
        assert (mask.step, mask.hardened) == (min(variant.stop, 2), variant.stop >= 2)
        model.eval().save_pretrained(folder / "adapter")
        result[variant.name] = Saved(folder, model, logits(model))
    return result


def load(saved: Saved, **options: Any) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(saved.base(), saved.adapter, **options)


SCRIPT = """
import json, pickle, sys, warnings
from pathlib import Path
import torch
config = pickle.loads(Path(sys.argv[2]).read_bytes())  # nothing of pat was imported: the class brings it
assert type(config).__name__ == "PatConfig", config
import pat.tuner
from peft import PeftModel
from transformers import AutoModelForCausalLM
sys.path.insert(0, sys.argv[3])
from tiny_models import batch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
for folder in json.loads(sys.argv[1]):
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
    inputs = batch()
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    torch.save(logits, f"{folder}/new_process.pt")
"""


@pytest.fixture(scope="module")
def new_process(saved: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Logits of every variant as one new process computes them from the folders."""
    import pickle

    pickled = tmp_path_factory.mktemp("pickle") / "config.pkl"
    pickled.write_bytes(pickle.dumps(pat_config(rotation="none")))
    folders = {name: str(each.folder) for name, each in saved.items()}
    source = str(Path(sys.modules["pat"].__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(list(folders.values())), str(pickled), str(REPO / "tests")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(f"{folder}/new_process.pt") for name, folder in folders.items()}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_new_process_computes_the_same_bits(
    variant: Variant, saved: dict[str, Saved], new_process: dict[str, torch.Tensor]
) -> None:
    assert torch.equal(new_process[variant.name], saved[variant.name].logits)


@pytest.mark.parametrize(
    ("variant", "low_cpu_mem_usage"),
    [*((variant, True) for variant in VARIANTS), *((variant, False) for variant in VARIANTS[:3])],
    ids=str,
)
def test_loading_restores_everything(variant: Variant, saved: dict[str, Saved], low_cpu_mem_usage: bool) -> None:
    original = saved[variant.name]
    model = load(original, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    mask, expected = tuner_of(model).mask(), tuner_of(original.model).mask()
    for name in ("step", "milestone_step", "hardened", "calibrated", "has_prior", "lr_multiplier"):
        assert getattr(mask, name) == getattr(expected, name), name
    mine, theirs = model.state_dict(), original.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(logits(model), original.logits)
    if mask.hardened:
        assert largest_difference(logits(model.merge_and_unload()), original.logits) <= 1e-4


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.stop == 3][-3:], ids=str)
def test_the_folder_is_peft_s_own(variant: Variant, saved: dict[str, Saved]) -> None:
    adapter = saved[variant.name].adapter
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in adapter.iterdir()}
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert not any(".default" in name for name in tensors)
    assert any("pat_mask" in name for name in tensors)
    assert sum("pat_hsm" in name for name in tensors) >= 7
    base_keys = {f"base_model.model.{name}" for name in saved[variant.name].base().state_dict()}
    assert variant.fields.get("modules_to_save") or not base_keys & tensors.keys()


def test_loading_to_train_on(saved: dict[str, Saved]) -> None:
    model = load(saved["soft-rotated-tied"], is_trainable=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    original = saved["soft-rotated-tied"].model
    assert trainable == {name for name, parameter in original.named_parameters() if parameter.requires_grad}


def test_another_adapter_name_and_two_loaded_side_by_side(saved: dict[str, Saved]) -> None:
    one, other = saved["hard-rotated-tied"], saved["hard-frozen"]
    assert largest_difference(one.logits, other.logits) > 0.01
    model = load(one, adapter_name="one").eval()
    model.load_adapter(other.adapter, "other")
    assert torch.equal(logits(model), one.logits)
    model.set_adapter("other")
    assert torch.equal(logits(model), other.logits)


def test_saving_one_of_two_adapters_writes_that_one(saved: dict[str, Saved], tmp_path: Path) -> None:
    original = saved["hard-rotated-tied"]
    model = load(original)
    model.add_adapter("other", pat_config(rotation="none"))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"other"}
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, original.adapter))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_bfloat16_base_keeps_the_adapter_in_float32(tmp_path: Path) -> None:
    base = build("llama", tied=True, dtype=torch.bfloat16)
    model = attach(base, rotation="pca")
    tuner_of(model).calibrate([batch(seed=3, batch_size=8)] * 2)
    tuner_of(model).set_step(1, 1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert {t.dtype for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "pat_" in n} == {
        torch.float32,
        torch.int64,
        torch.bool,
    }
    again = PeftModel.from_pretrained(build("llama", tied=True, dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits(again), expected)
