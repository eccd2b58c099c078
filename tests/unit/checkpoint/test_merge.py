"""`pat merge`: from a saved adapter to a checkpoint, and one clear line for everything that can be wrong."""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hardened import hardened
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import batch, build, tiny_tokenizer
from tiny_training import attach, largest_difference, logits, tuner_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat.checkpoint.adapter import load_adapted
from pat.checkpoint.merge import merge
from pat.checkpoint.verification_text import CONTEXT, MAX_TOKENS, verification_batches
from pat.errors import PatError
from pat.loading import keep_plain_layout

ROUNDING = 2e-5
"""Float32 rounding on the tiny models' logits, see test_verify.py."""


def make_base(folder: Path, *, family: str = "llama", tied: bool = True, **fields: Any) -> Path:
    build(family, tied=tied, **fields).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def make_adapter(base: Path, folder: Path, **fields: Any) -> torch.Tensor:
    """Save a hardened adapter on a base; return the masked model's logits."""
    model = hardened(AutoModelForCausalLM.from_pretrained(base), **fields)
    model.save_pretrained(folder)
    return logits(model)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and `adapter`, not to be changed."""
    folder = tmp_path_factory.mktemp("origin")
    torch.manual_seed(0)
    make_adapter(make_base(folder / "base"), folder / "adapter")
    return folder


@pytest.fixture
def work(origin: Path, tmp_path: Path) -> Path:
    """A copy of `origin` whose adapter belongs to its own base."""
    shutil.copytree(origin, tmp_path / "work")
    edit_config(tmp_path / "work" / "adapter", base_model_name_or_path=str(tmp_path / "work" / "base"))
    return tmp_path / "work"


def edit_config(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(work: Path, **options: Any) -> str:
    """Merge, expect a refusal in one line with exit status 2 and nothing written; return the line."""
    before = set(os.listdir(work))
    with pytest.raises(PatError) as caught:
        merge(options.pop("adapter", work / "adapter"), work / "out", progress=False, **options)
    assert set(os.listdir(work)) == before, "something was written"
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_the_checkpoint_is_the_tuned_model(family: str, tmp_path: Path) -> None:
    expected = make_adapter(make_base(tmp_path / "base", family=family, tied=False), tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "out", progress=False)
    dense = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert largest_difference(logits(dense), expected) < ROUNDING
    assert result.parity.max_abs_logit_diff < ROUNDING
    assert result.num_parameters == sum(p.numel() for p in dense.parameters())
    assert AutoTokenizer.from_pretrained(result.model_dir).chat_template == tiny_tokenizer().chat_template


def test_results_tell_what_was_done(work: Path) -> None:
    result = merge(work / "adapter", work / "out", progress=False)
    text = (work / "out" / "results.json").read_text()
    stored = json.loads(text)
    assert stored["command"] == "merge"
    assert stored["parity"] == result.parity.to_dict()
    assert stored["parity"]["num_tokens"] > 500
    assert stored["cut"]["hidden_size"] == 48
    assert stored["cut"]["pruned_hidden_size"] == 36
    assert stored["cut"]["num_parameters"] == result.num_parameters < stored["cut"]["num_parameters_base"]
    assert stored["cut"]["num_bytes"] == (work / "out" / "model.safetensors").stat().st_size
    assert stored["pat_config"]["peft_type"] == "PAT"
    assert str(work) not in text
    assert str(work) not in (work / "out" / "README.md").read_text()


def test_the_base_can_have_moved(work: Path) -> None:
    (work / "base").rename(work / "moved")
    assert "--base_model" in refused(work)
    result = merge(work / "adapter", work / "out", base_model=str(work / "moved"), progress=False)
    assert result.parity.max_abs_logit_diff < ROUNDING


def test_the_dense_dtype_can_be_asked_for(work: Path) -> None:
    merge(work / "adapter", work / "out", dtype="bfloat16", progress=False)
    assert AutoModelForCausalLM.from_pretrained(work / "out", dtype="auto").dtype == torch.bfloat16


def test_a_base_in_bfloat16_stays_so(tmp_path: Path) -> None:
    make_adapter(make_base(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "out", progress=False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert result.parity.dtype == "bfloat16"


def test_a_tokenizer_saved_with_the_adapter_is_the_one(work: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(work / "adapter")
    merge(work / "adapter", work / "out", progress=False)
    assert AutoTokenizer.from_pretrained(work / "out").chat_template == tokenizer.chat_template


def test_a_text_can_be_given(work: Path) -> None:
    (work / "text.txt").write_text("A short text of its own.")
    result = merge(work / "adapter", work / "out", text_file=work / "text.txt", progress=False)
    assert result.parity.num_tokens == len(tiny_tokenizer()("A short text of its own.").input_ids)


# -- what can be wrong ----------------------------------------------------------------------------------------------


def test_no_such_adapter(work: Path) -> None:
    assert "no such folder" in refused(work, adapter=work / "nowhere")


def test_a_folder_without_an_adapter(work: Path) -> None:
    (work / "empty").mkdir()
    assert "adapter_config.json" in refused(work, adapter=work / "empty")


def test_the_folder_of_a_run_points_at_its_adapter(work: Path) -> None:
    assert f"pass {work / 'adapter'}" in refused(work, adapter=work)


def test_an_adapter_of_another_method(work: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(work / "base"), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(work / "lora")
    assert "LORA" in refused(work, adapter=work / "lora")


@pytest.mark.parametrize("content", ["{broken", "[]", ""])
def test_an_adapter_configuration_that_is_no_json(work: Path, content: str) -> None:
    (work / "adapter" / "adapter_config.json").write_text(content)
    assert "not readable as JSON" in refused(work)


def test_an_adapter_without_weights(work: Path) -> None:
    (work / "adapter" / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refused(work)


def test_an_adapter_cut_short(work: Path) -> None:
    path = work / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(work)


@pytest.mark.parametrize("part", ["lora_A", "pat_mask", "pat_hsm"])
def test_an_adapter_with_tensors_missing(work: Path, part: str) -> None:
    """peft would go on with those at their initial values, and say nothing about mask and operators."""
    path = work / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    victim = next(name for name in tensors if part in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != victim}, path, metadata={"format": "pt"})
    assert re.search("lacks 1 of .*" + re.escape(victim), refused(work))


def test_an_adapter_before_its_milestone(work: Path) -> None:
    model = attach(AutoModelForCausalLM.from_pretrained(work / "base"))
    tuner_of(model).set_step(1, 4)
    model.save_pretrained(work / "early")
    assert "milestone: step 4" in refused(work, adapter=work / "early")


def test_no_such_base(work: Path) -> None:
    shutil.rmtree(work / "base")
    assert "which is not there" in refused(work)
    assert "no such folder" in refused(work, base_model=str(work / "base"))
    assert "no such model" in refused(work, base_model="no-such-org/no-such-model")


@pytest.mark.parametrize("recorded", ["./models/base", "runs/models/base", "~/no-such-folder-anywhere"])
def test_a_recorded_folder_that_is_gone(work: Path, recorded: str) -> None:
    edit_config(work / "adapter", base_model_name_or_path=recorded)
    assert f"{recorded}, which is not there; pass --base_model" in refused(work)


def test_an_adapter_that_names_no_base(work: Path) -> None:
    edit_config(work / "adapter", base_model_name_or_path=None)
    assert "--base_model" in refused(work)


def test_a_base_without_weights(work: Path) -> None:
    (work / "base" / "model.safetensors").unlink()
    assert "Could not load the model" in refused(work)


def test_a_base_cut_short(work: Path) -> None:
    path = work / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "Could not load the model" in refused(work)


def test_a_base_with_tensors_missing(work: Path) -> None:
    path = work / "base" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(work)


def test_a_base_with_a_broken_configuration(work: Path) -> None:
    (work / "base" / "config.json").write_text("{broken")
    assert "configuration of the model" in refused(work)


def test_a_base_of_another_width(work: Path) -> None:
    other = make_base(work / "other", hidden_size=64)
    assert "got hidden_size=64; the adapter was made for hidden_size=48" in refused(work, base_model=str(other))


def test_a_base_of_another_family(work: Path) -> None:
    other = make_base(work / "other", family="qwen3")
    message = refused(work, base_model=str(other))
    assert "model_type=qwen3" in message


def test_a_base_that_differs_elsewhere(work: Path) -> None:
    """The recorded shape agrees, the tensors do not: other heads."""
    other = make_base(work / "other", head_dim=12)
    message = refused(work, base_model=str(other))
    assert "does not fit the base model other" in message
    assert "have other shapes" in message


def test_an_output_folder_in_use(work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "precious").write_text("mine")
    assert "not empty" in refused(work)


@pytest.mark.parametrize("dtype", ["float33", "int8", "float8_e4m3fn", "nn"])
def test_a_dtype_that_is_none(work: Path, dtype: str) -> None:
    assert "expected float32, bfloat16 or float16" in refused(work, dtype=dtype)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\xfa"])
def test_a_text_that_is_none(work: Path, content: bytes | None) -> None:
    if content is not None:
        (work / "text.txt").write_bytes(content)
    assert "text.txt" in refused(work, text_file=work / "text.txt")


# -- the text that is compared on -----------------------------------------------------------------------------------


def test_the_built_in_text_fills_the_budget() -> None:
    batches = verification_batches(tiny_tokenizer())
    lengths = [batch["input_ids"].shape for batch in batches]
    assert set(lengths) == {(1, CONTEXT)}
    assert sum(length for _, length in lengths) == MAX_TOKENS
    assert all(bool(batch["attention_mask"].all()) for batch in batches)


def test_windows_fit_the_model_and_start_as_its_texts_do(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    (tmp_path / "text").write_text("abcdefghij" * 5)
    plain = verification_batches(tokenizer, tmp_path / "text", max_positions=20)
    assert [batch["input_ids"].shape[1] for batch in plain] == [20, 20, 10]

    class Starting:
        bos_token_id = 1

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, *tokenizer(text).input_ids]}

    started = verification_batches(Starting(), tmp_path / "text", max_positions=20)
    assert [batch["input_ids"][0, 0].item() for batch in started] == [1, 1, 1]
    assert [batch["input_ids"].shape[1] for batch in started] == [20, 20, 13]
    body = torch.cat([batch["input_ids"][0, 1:] for batch in started])
    assert torch.equal(body, torch.cat([batch["input_ids"][0] for batch in plain]))


# -- 4-bit bases ----------------------------------------------------------------------------------------------------

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def load_in_4bit(base: Path, **options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **options
    )
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization)


@needs_bitsandbytes
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}])
def test_a_4bit_base_is_merged_as_it_was_tuned(double: bool, fields: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    quantised = load_in_4bit(base, bnb_4bit_use_double_quant=double)
    keep_plain_layout(quantised)  # which attaching an adapter would do, but it is run before that
    plain_logits, quantised_logits = logits(AutoModelForCausalLM.from_pretrained(base)), logits(quantised)
    assert largest_difference(plain_logits, quantised_logits) > 0.1, "quantising a random model changes it a lot"
    model = hardened(quantised, calibration=[batch()], **fields)
    model.save_pretrained(tmp_path / "adapter")

    result = merge(tmp_path / "adapter", tmp_path / "out", progress=False)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert largest_difference(logits(dense), logits(model)) < ROUNDING
    assert result.parity.dtype == "float32"
    assert result.parity.max_abs_logit_diff < ROUNDING
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in stored
    assert stored["dtype"] == "float32"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["pat_config"]["base_quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert results["cut"]["num_parameters_base"] == build("llama", tied=False).num_parameters()


@needs_bitsandbytes
def test_an_adapter_tuned_unquantised_says_so(origin: Path) -> None:
    model = load_adapted(origin / "adapter", base_model=str(origin / "base"), progress=False)
    assert model.peft_config["default"].base_quantization is None


@needs_bitsandbytes
def test_without_bitsandbytes_a_4bit_adapter_says_what_it_needs(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import quantizer_bnb_4bit

    edit_config(work / "adapter", base_quantization=BitsAndBytesConfig(load_in_4bit=True).to_dict())

    def absent(*_args: Any, **_options: Any) -> None:
        raise ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes")

    monkeypatch.setattr(quantizer_bnb_4bit.Bnb4BitHfQuantizer, "validate_environment", absent)
    assert "bitsandbytes" in refused(work)


@needs_bitsandbytes
def test_4bit_weights_are_not_repacked_for_inference(tmp_path: Path) -> None:
    """On processors with AVX512-BF16 a forward pass in eval mode would; here the switch for it is looked at."""
    model = attach(load_in_4bit(make_base(tmp_path / "base")))
    switches = [getattr(module, "support_avx512bf16_for_cpu", None) for module in model.modules()]
    assert [switch for switch in switches if switch is not None] == [False] * 21


@needs_bitsandbytes
def test_a_repacked_base_is_refused(tmp_path: Path) -> None:
    quantised = load_in_4bit(make_base(tmp_path / "base"))
    quantised.model.layers[1].self_attn.k_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(PatError, match="load it again"):
        attach(quantised)


def test_a_model_that_blows_up_rounding_is_merged_from_disk_too(tmp_path: Path) -> None:
    base = build("llama", tied=False)
    with torch.no_grad():
        base.get_output_embeddings().weight *= 1000.0
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer(tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "out", progress=False)
    assert result.parity.permutation_floor is not None
    assert result.parity.max_abs_logit_diff > 1e-3
