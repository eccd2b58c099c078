"""`pat merge`: from a saved adapter to a checkpoint, and one clear line for everything that can be wrong."""

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hardened import hardened
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig, MontecloraConfig
from safetensors.torch import load_file, save_file
from tiny_models import batch, build, fill_hub_cache, tiny_tokenizer
from tiny_training import attach, largest_difference, logits, tuner_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pat.checkpoint.adapter import load_adapted
from pat.checkpoint.adapter_tokens import adapter_tokens
from pat.checkpoint.compact import save_adapter
from pat.checkpoint.merge import merge
from pat.checkpoint.verification_text import CONTEXT, MAX_TOKENS, verification_batches
from pat.errors import PatError
from pat.loading import TokenSetup, keep_plain_layout
from pat.report.records import collected_warnings

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


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_the_checkpoint_is_the_tuned_model(family: str, tmp_path: Path) -> None:
    expected = make_adapter(make_base(tmp_path / "base", family=family, tied=False), tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "out", progress=False)
    dense = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert largest_difference(logits(dense), expected) < ROUNDING
    assert result.parity.max_abs_logit_diff < ROUNDING
    assert result.record.cut.num_parameters == sum(p.numel() for p in dense.parameters())
    assert AutoTokenizer.from_pretrained(result.model_dir).chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("fields", [{"kasa_config": KasaConfig()}, {"monteclora_config": MontecloraConfig()}], ids=str)
def test_variants_that_look_at_the_base_are_merged_in_memory(fields: dict[str, Any], tmp_path: Path) -> None:
    """peft puts off what they do until the base is there, and a base that stays on disk never is."""
    expected = make_adapter(make_base(tmp_path / "base"), tmp_path / "adapter", **fields)
    merge(tmp_path / "adapter", tmp_path / "out", progress=False)
    assert largest_difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected) < ROUNDING


def test_a_part_of_a_tokenizer_is_refused_and_a_template_alone_taken_over(work: Path) -> None:
    base_config = AutoConfig.from_pretrained(work / "base")
    adapter, template = work / "adapter", "{{ messages[0]['content'] }}"
    (adapter / "chat_template.jinja").write_text(template)
    tokens = adapter_tokens(adapter, str(work / "base"), base_config)
    assert tokens.tokenizer.chat_template == template and len(tokens.tokenizer) == len(tiny_tokenizer())
    tiny_tokenizer().save_pretrained(adapter)
    (adapter / "tokenizer_config.json").unlink()
    with pytest.raises(PatError, match=r"holds tokenizer\.json, but no tokenizer_config\.json that belongs to it"):
        adapter_tokens(adapter, str(work / "base"), base_config)


def test_results_tell_what_was_done(work: Path) -> None:
    result = merge(work / "adapter", work / "out", progress=False)
    text = (work / "out" / "results.json").read_text()
    stored = json.loads(text)
    assert stored["command"] == "merge"
    assert stored["parity"] == asdict(result.parity)
    assert stored["parity"]["num_tokens"] > 500
    assert stored["cut"]["hidden_size"] == 48
    assert stored["cut"]["pruned_hidden_size"] == 36
    assert stored["cut"]["num_parameters"] == result.record.cut.num_parameters < stored["cut"]["num_parameters_base"]
    sizes, base = stored["cut"], json.loads((work / "base" / "config.json").read_text())
    for left_alone in ("intermediate_size", "num_key_value_heads", "num_hidden_layers", "vocab_size"):
        assert sizes[left_alone] == sizes[f"pruned_{left_alone}"] == base[left_alone]
    assert sizes["file_bytes"] == (work / "out" / "model.safetensors").stat().st_size > sizes["num_bytes"]
    assert stored["pat_config"]["peft_type"] == "PAT"
    assert str(work) not in text
    assert str(work) not in (work / "out" / "README.md").read_text()


def test_the_base_can_have_moved(work: Path) -> None:
    (work / "base").rename(work / "moved")
    result = merge(work / "adapter", work / "out", base_model=str(work / "moved"), progress=False)
    assert result.parity.max_abs_logit_diff < ROUNDING


@pytest.mark.parametrize("given", [None, "org/base"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_an_adapter_is_merged_into_the_revision_that_it_was_trained_on(
    work: Path, given: str | None, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(load_adapted(work / "adapter", base_model=str(work / "base"), progress=False))
    shutil.copytree(work / "base", work / "other")
    change_tensors(work / "other" / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(2))
    fill_hub_cache(work / "hub", "org/base", main=work / "other", first=work / "base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(work / "hub"))
    edit_config(work / "adapter", base_model_name_or_path="org/base", revision="first")
    if in_memory:
        monkeypatch.setattr("pat.checkpoint.merge.load_hollow", lambda *_, **__: None)
    merge(work / "adapter", work / "out", base_model=given, progress=False)
    assert largest_difference(logits(AutoModelForCausalLM.from_pretrained(work / "out")), expected) < ROUNDING


def test_the_home_folder_can_be_written_as_a_tilde(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(work))
    (work / "text").write_text("abcdefghij" * 50)
    edit_config(work / "adapter", base_model_name_or_path="~/base")
    merge("~/adapter", "~/out", text_file="~/text", progress=False)
    merge("~/adapter", "~/again", base_model="~/base", progress=False)
    assert (work / "out" / "model.safetensors").read_bytes() == (work / "again" / "model.safetensors").read_bytes()


def test_what_a_run_says_of_its_tokens_is_saved_with_its_adapter(work: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = "{{ messages[0]['content'] }}", "<|user|>"
    base = AutoModelForCausalLM.from_pretrained(work / "base")
    base.generation_config.max_new_tokens = 7
    tokens = TokenSetup.of(base.config, base.generation_config, tokenizer, base_tokenizer=tiny_tokenizer())
    save_adapter(hardened(base), work / "adapter", tokens)
    assert {path.stat().st_mode & 0o777 for path in (work / "adapter").iterdir()} == {0o666 & ~current_umask()}
    merge(work / "adapter", work / "out", progress=False)
    written = AutoTokenizer.from_pretrained(work / "out")
    assert (written.chat_template, written.eos_token) == (tokenizer.chat_template, "<|user|>")
    dense = AutoModelForCausalLM.from_pretrained(work / "out")
    assert dense.config.eos_token_id == 5
    assert dense.generation_config.eos_token_id == [5, 2]
    assert dense.generation_config.max_new_tokens == 7


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_the_card_tells_what_the_run_beside_the_adapter_says(work: Path) -> None:
    (work / "results.json").write_text(json.dumps({"command": "tune", "seed": 7, "dataset": "org/data", "other": 1}))
    merge(work / "adapter", work / "out", progress=False)
    assert "- seed: 7\n" in (work / "out" / "README.md").read_text()
    assert "- data: org/data\n" in (work / "out" / "README.md").read_text()


def test_a_text_can_be_given(work: Path) -> None:
    (work / "text.txt").write_text("A short text of its own.")
    result = merge(work / "adapter", work / "out", text_file=work / "text.txt", progress=False)
    assert result.parity.num_tokens == len(tiny_tokenizer()("A short text of its own.").input_ids)


# -- what can be wrong ----------------------------------------------------------------------------------------------


def edit_base(work: Path, **fields: Any) -> None:
    path = work / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def early(work: Path) -> None:
    model = attach(AutoModelForCausalLM.from_pretrained(work / "base"))
    tuner_of(model).set_step(1, 4)
    model.save_pretrained(work / "adapter")


def plain_lora(work: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(work / "base"), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(work / "adapter")


UP = "model.layers.1.mlp.up_proj.weight"

ITS_OWN = "The base model base is the one it was made for; copy the adapter again"

WRONG: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no such adapter": (lambda _: None, {"adapter": "nowhere"}, "no such folder"),
    "no adapter": (lambda work: (work / "empty").mkdir(), {"adapter": "empty"}, "adapter_config.json"),
    "a run's folder": (lambda _: None, {"adapter": "."}, "pass .*adapter"),
    "another method": (plain_lora, {}, "LORA"),
    "no JSON": (lambda w: (w / "adapter/adapter_config.json").write_text("{broken"), {}, "not readable as JSON"),
    "no object": (lambda w: (w / "adapter/adapter_config.json").write_text("[]"), {}, "not readable as JSON"),
    "no adapter weights": (lambda w: (w / "adapter/adapter_model.safetensors").unlink(), {}, "not saved completely"),
    "adapter cut short": (
        lambda w: cut(w / "adapter/adapter_model.safetensors", -100), {}, "not readable .*; copy the adapter again"
    ),
    "before its milestone": (early, {}, "milestone: step 4"),
    "base gone": (lambda w: shutil.rmtree(w / "base"), {}, "which is not there; pass --base_model"),
    "no such folder": (lambda _: None, {"base_model": "./nowhere"}, "no such folder"),
    "no such hub id": (lambda _: None, {"base_model": "no-such-org/no-such-model"}, "no such folder"),
    "names no base": (lambda w: edit_config(w / "adapter", base_model_name_or_path=None), {}, "--base_model"),
    "base without weights": (lambda w: (w / "base/model.safetensors").unlink(), {}, "Could not load the model"),
    "base cut short": (lambda w: cut(w / "base/model.safetensors", 1000), {}, "Could not load the model"),
    "base lacks a weight": (lambda w: change_tensors(w / "base/model.safetensors", lambda t: t.pop(UP)), {}, UP),
    "base cannot be used": (lambda w: edit_base(w, hidden_act="nonsense"), {}, "hidden_act='nonsense'"),
    "base of another width": (
        lambda work: make_base(work / "other", hidden_size=64),
        {"base_model": "other"},
        "got hidden_size=64; the adapter was made for hidden_size=48",
    ),
    "base of another family": (
        lambda work: make_base(work / "other", family="qwen3"), {"base_model": "other"}, "model_type=qwen3"
    ),
    "base with other heads": (
        lambda work: make_base(work / "other", head_dim=12),
        {"base_model": "other"},
        "does not fit the base model other: .* have other shapes, such as .*pass it with --base_model[.]$",
    ),
    "base of the same shape": (
        lambda work: make_base(work / "other", seed=1),
        {"base_model": "other"},
        "other: it was made for a model with the fingerprint …[0-9a-f]{8}, this one has …[0-9a-f]{8}",
    ),
    "base that was changed": (
        lambda w: change_tensors(w / "base/model.safetensors", lambda t: t[UP].mul_(1.5)), {}, "fingerprint"
    ),
    "base of which a row was changed": (
        lambda w: change_tensors(w / "base/model.safetensors", lambda t: t[UP][1].mul_(3)), {}, "fingerprint"
    ),
    "base with positions of another scale": (
        lambda w: edit_base(w, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
        {},
        "fingerprint",
    ),
    "base that names fewer layers": (
        lambda w: edit_base(w, num_hidden_layers=1), {}, "hold .* tensors .*num_hidden_layers=1"
    ),
    "another rotation": (
        lambda w: edit_config(w / "adapter", resolved_rotation="none"), {}, r"no place for \(2, .*basis"
    ),
    "no rotation": (lambda w: edit_config(w / "adapter", resolved_rotation="fourier"), {}, "'fourier'"),
    "another mask": (lambda w: edit_config(w / "adapter", mask="frozen"), {}, r"no place for \(1, .*pat_mask"),
    "another rank": (
        lambda w: edit_config(w / "adapter", r=3), {}, f"do not belong together .*lora_A.* {ITS_OWN}"
    ),
    "another rank and size": (
        lambda w: edit_config(w / "adapter", r=3, pruned_hidden_size=40),
        {},
        f"pruned_hidden_size=40 is not what its sizes were chosen by.* {ITS_OWN}",
    ),
    "an unknown start": (
        lambda w: edit_config(w / "adapter", init_lora_weights="zzz"), {}, f"init_lora_weights='zzz'.* {ITS_OWN}"
    ),
    "a layer too many": (
        lambda w: edit_config(w / "adapter", layers_to_transform=[7]), {}, f"config.json: has a .*{ITS_OWN}"
    ),
    "another rank, and no fingerprint": (
        lambda w: edit_config(w / "adapter", r=3, base_fingerprint=None),
        {},
        "does not fit the base model base: .*--base_model, and its files as they were saved",
    ),
    "another program's layers": (
        lambda w: edit_config(w / "adapter", megatron_config={"a": 1}), {}, "config.json: .*megatron_config={'a': 1}"
    ),
    "no target": (lambda w: edit_config(w / "adapter", target_modules=[]), {}, "config.json: .*empty target_modules"),
    "a torn pattern": (lambda w: edit_config(w / "adapter", target_modules="("), {}, "config.json: .*target_modules"),
    "another width": (
        lambda w: edit_config(w / "adapter", resolved_width={"hidden_size": 32}), {}, "keeps 36 entries .* says 32"
    ),
    "a width of nonsense": (
        lambda w: edit_config(w / "adapter", resolved_width={"hidden_size": "wide"}), {}, "resolved_width"
    ),
    "an unknown key": (lambda w: edit_config(w / "adapter", operator_scale=2.0), {}, "1 unknown keys .operator_sc"),
    "a tensor too many": (
        lambda w: change_tensors(
            w / "adapter/adapter_model.safetensors", lambda t: t.update({"base_model.model.extra": torch.ones(2)})
        ),
        {},
        "has 1 tensors .*base_model.model.extra",
    ),
    "weights of the base": (
        lambda w: change_tensors(
            w / "adapter/adapter_model.safetensors",
            lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(128, 48)}),
        ),
        {},
        "its tensor .*embed_tokens.weight is not the base's",
    ),
    "an embedding without a place": (
        lambda w: change_tensors(
            w / "adapter/adapter_model.safetensors",
            lambda t: t.update({"base_model.model.nowhere.embed_tokens.weight": torch.ones(128, 48)}),
        ),
        {},
        "its tensor .*nowhere.embed_tokens.weight is not the base's",
    ),
    "a milestone of words": (lambda w: edit_config(w / "adapter", milestone="soon"), {}, "milestone='soon'"),
    "a target of nothing": (lambda w: edit_config(w / "adapter", target_modules=["nothing"]), {}, "nothing"),
    "output in use": (
        lambda work: [(work / "out").mkdir(), (work / "out/precious").write_text("mine")], {}, "not empty"
    ),
    "no dtype": (lambda _: None, {"dtype": "float8_e4m3fn"}, "expected float32, bfloat16 or float16"),
    "no dtype to fold in": (lambda _: None, {"fold_dtype": "bfloat16"}, "expected float64 or float32"),
    "no text": (lambda _: None, {"text_file": "text.txt"}, "text.txt"),
    "empty text": (lambda work: (work / "text.txt").write_bytes(b""), {"text_file": "text.txt"}, "text.txt"),
    "no UTF-8": (lambda work: (work / "text.txt").write_bytes(b"\xff\xfe"), {"text_file": "text.txt"}, "text.txt"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_nothing_is_written(case: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, options, words = WRONG[case]
    monkeypatch.chdir(work)
    spoil(work)
    before = set(os.listdir(work))
    with pytest.raises(PatError, match=words) as caught:
        merge(
            options.get("adapter", "adapter"),
            "out",
            progress=False,
            **{k: v for k, v in options.items() if k != "adapter"},
        )
    assert set(os.listdir(work)) == before
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


def test_the_base_may_lie_in_other_files(work: Path) -> None:
    AutoModelForCausalLM.from_pretrained(work / "base").save_pretrained(work / "other", max_shard_size="60KB")
    tiny_tokenizer(work / "other")
    merge(work / "adapter", work / "out", base_model=str(work / "other"), progress=False)


def test_another_base_of_the_shape_is_said_in_python_too(work: Path) -> None:
    shutil.copytree(work / "base", work / "other")
    change_tensors(work / "other" / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(2))
    said = {}
    for name in ("base", "other"):
        with collected_warnings() as said[name]:
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(work / name), work / "adapter")
    assert not said["base"] and len(said["other"]) == 1
    assert re.search("made for a base with the fingerprint .* other has", said["other"][0])


@pytest.mark.parametrize("known", [None, "0" * 64])
def test_an_adapter_that_does_not_say_its_base_is_taken_with_a_warning(known: str | None, work: Path) -> None:
    """Or says it in a form that is no longer known."""
    edit_config(work / "adapter", base_fingerprint=known)
    make_base(work / "other", seed=1)
    result = merge(work / "adapter", work / "out", base_model=str(work / "other"), progress=False)
    assert any("which base it was made for" in warning for warning in result.record.warnings)


@pytest.mark.parametrize("part", ["lora_A", "pat_mask", "pat_hsm"])
def test_an_adapter_with_tensors_missing(work: Path, part: str) -> None:
    """peft would go on with those at their initial values, and say nothing about mask and operators."""
    path = work / "adapter" / "adapter_model.safetensors"
    victim = next(name for name in load_file(path) if part in name)
    change_tensors(path, lambda tensors: tensors.pop(victim))
    with pytest.raises(PatError, match="lacks 1 of .*" + re.escape(victim)):
        merge(work / "adapter", work / "out", progress=False)


@pytest.mark.parametrize("recorded", ["./models/base", "runs/models/base", "~/no-such-folder-anywhere"])
def test_a_recorded_folder_that_is_gone(work: Path, recorded: str) -> None:
    edit_config(work / "adapter", base_model_name_or_path=recorded)
    with pytest.raises(PatError, match=f"{recorded}, which is not there; pass --base_model"):
        merge(work / "adapter", work / "out", progress=False)


# -- the text that is compared on -----------------------------------------------------------------------------------


def test_the_built_in_text_fills_the_budget() -> None:
    batches = verification_batches(tiny_tokenizer())
    lengths = [batch["input_ids"].shape for batch in batches]
    assert set(lengths) == {(1, CONTEXT)}
    assert sum(length for _, length in lengths) == MAX_TOKENS
    assert all(bool(batch["attention_mask"].all()) for batch in batches)


def test_tokens_without_an_embedding_are_left_out_of_the_built_in_text_and_refused_in_others(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    num_known = len(tokenizer)
    tokenizer.add_tokens(["the"])
    whole, known = (
        torch.cat([batch["input_ids"][0] for batch in verification_batches(tokenizer, num_embeddings=number)])
        for number in (None, num_known)
    )
    assert int((whole == num_known).sum()) > 5
    assert torch.equal(known, whole[whole != num_known])
    (tmp_path / "text").write_text("in the text")
    with pytest.raises(PatError, match=f"the token 'the' .id {num_known}., but the model has embeddings for"):
        verification_batches(tokenizer, tmp_path / "text", num_embeddings=num_known)


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
def test_an_8bit_base_is_as_it_was_after_a_merge(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    base = make_base(tmp_path / "base", tied=False)
    quantised: Any = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    model = hardened(quantised)
    before = logits(model)
    model.merge_and_unload()
    assert torch.equal(logits(model), before)


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
    with pytest.raises(PatError, match="bitsandbytes"):
        merge(work / "adapter", work / "out", progress=False)


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
