"""The written checkpoint: complete, stock, verified, and there either whole or not at all."""

import errno
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hardened import hardened
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny_models import batch, build, tiny_tokenizer
from tiny_training import attach, largest_difference, logits
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pat.checkpoint import verify, write
from pat.checkpoint.compact import write_compact
from pat.checkpoint.staging import check_output_folder, staged_folder
from pat.checkpoint.write import pruning_of, save_checkpoint
from pat.errors import ParityMissed, PatError, RunFailed
from pat.loading import TokenSetup
from pat.tuner import find_tuner

PROVENANCE = {"model_name_or_path": "tiny/llama", "recipe": "default"}

ROUNDING = 2e-5
"""Float32 rounding on the tiny models' logits, see test_verify.py."""


def tuned(tied: bool = True, family: str = "llama", **fields: Any) -> PeftModel:
    return hardened(build(family, tied=tied), **fields)


def export(model: Any, output_dir: Path, **options: Any) -> tuple[verify.Parity, Path]:
    tokens = TokenSetup.of(model.config, getattr(model, "generation_config", None), tiny_tokenizer())
    defaults = {"tokens": tokens, "batches": [batch()], "provenance": PROVENANCE}
    with staged_folder(output_dir) as staging:
        parity, _ = save_checkpoint(model, staging, **(defaults | options))
    return parity, output_dir


def test_the_folder_is_a_stock_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tuned()
    model.get_base_model().generation_config.max_new_tokens = 7
    expected = logits(model)
    parity, folder = export(model, tmp_path / "out")

    assert folder == tmp_path / "out"
    assert os.listdir(tmp_path) == ["out"]
    names = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    names |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(os.listdir(folder)) == names

    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        dense, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    transformers_logging.disable_propagation()
    assert not caplog.records
    assert not any(info.values())
    assert type(dense) is type(model.get_base_model())
    assert dense.config.hidden_size == 36
    assert largest_difference(logits(dense), expected) == parity.max_abs_logit_diff < ROUNDING
    assert dense.generation_config.max_new_tokens == 7

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert tokenizer("Hello, world").input_ids == tiny_tokenizer()("Hello, world").input_ids


def test_files_of_code_that_are_not_written_are_not_named(tmp_path: Path) -> None:
    model, tokenizer = tuned(), tiny_tokenizer()
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", None]}
    tokens = TokenSetup.of(model.config, None, tokenizer)
    _, folder = export(model, tmp_path / "out", tokens=tokens)
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((folder / name).read_text())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_number_of_experts_has_the_names_of_both_transformers(family: str, tmp_path: Path) -> None:
    _, folder = export(tuned(family=family), tmp_path / "out")
    fields = json.loads((folder / "config.json").read_text())
    assert fields["num_experts"] == fields["num_local_experts"] == build(family, tied=True).config.num_local_experts


def test_sizes_that_are_left_alone_are_those_of_one_expert() -> None:
    model = tuned(family="qwen3_moe")
    pruning, config = pruning_of(find_tuner(model)), model.config
    assert pruning.intermediate_size == pruning.pruned_intermediate_size == config.moe_intermediate_size
    assert config.moe_intermediate_size != config.intermediate_size and not pruning.trims_vocabulary


def test_the_masked_model_stays_as_it_was(tmp_path: Path) -> None:
    model = tuned(tied=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    export(model, tmp_path / "out")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_tied_stays_tied(tmp_path: Path) -> None:
    _, folder = export(tuned(tied=True), tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in set(file.keys())
    dense = AutoModelForCausalLM.from_pretrained(folder)
    assert dense.lm_head.weight is dense.get_input_embeddings().weight


def test_an_untied_head_is_written(tmp_path: Path) -> None:
    _, folder = export(tuned(tied=True, untie_word_embeddings=True), tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" in set(file.keys())


def test_no_tokenizer_is_no_obstacle(tmp_path: Path) -> None:
    _, folder = export(tuned(), tmp_path / "out", tokens=None)
    assert not (folder / "tokenizer.json").exists()


def test_sampling_flags_beside_greedy_decoding_are_dropped(tmp_path: Path) -> None:
    """Llama 2 has them, generation ignores them, and transformers refuses to save them."""
    model = tuned()
    config = model.get_base_model().generation_config
    config.temperature, config.top_p, config.do_sample = 0.9, 0.6, False
    _, folder = export(model, tmp_path / "out")
    written = json.loads((folder / "generation_config.json").read_text())
    assert "temperature" not in written
    assert "top_p" not in written
    assert config.temperature == 0.9, "the base keeps its own"


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    build("llama", tied=True).save_pretrained(tmp_path / "private" / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "private" / "base")
    provenance = {"model_name_or_path": str(tmp_path / "private" / "base"), "dataset": str(tmp_path / "d.jsonl")}
    _, folder = export(hardened(base), tmp_path / "out", provenance=provenance)
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


# -- nothing is left behind ---------------------------------------------------------------------------------------


def interrupted(error: type[BaseException]) -> Iterator[dict[str, torch.Tensor]]:
    yield batch()
    raise error("stopped")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupt_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        export(tuned(), tmp_path / "new" / "deeper" / "out", batches=interrupted(error))
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_stays_where_the_user_made_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        export(tuned(), tmp_path / "out", batches=interrupted(KeyboardInterrupt))
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == []


def test_a_model_past_tolerance_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write.load_written

    def spoiled(folder: Path, dtype: torch.dtype, device: Any) -> PreTrainedModel:
        dense = original(folder, dtype, device)
        with torch.no_grad():
            dense.get_input_embeddings().weight[5] += 0.01
        return dense

    monkeypatch.setattr(write, "load_written", spoiled)
    with pytest.raises(RunFailed, match="not the tuned one"):
        export(tuned(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


LOUD = 1000.0
"""So many times the logits, and their rounding, which is then past the tolerance though nothing is wrong."""


def loud(**fields: Any) -> PreTrainedModel:
    base = build("llama", tied=False, **fields)
    with torch.no_grad():
        base.get_output_embeddings().weight *= LOUD
    return base


def test_a_model_that_blows_up_rounding_is_written(tmp_path: Path) -> None:
    parity, out = export(hardened(loud()), tmp_path / "out")
    assert parity.max_abs_logit_diff > verify.MAX_LOGIT_DIFF
    assert parity.permutation_floor is not None and parity.permutation_floor > verify.MAX_LOGIT_DIFF
    assert "permuting the channels" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrong", ["epsilon", "gain"])
def test_a_wrong_fold_of_such_a_model_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    original = write.load_written

    def spoiled(folder: Path, dtype: torch.dtype, device: Any) -> PreTrainedModel:
        dense = original(folder, dtype, device)
        if wrong == "gain":
            dense.get_submodule("model.norm").weight.data *= 1.001
            return dense
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"rms_norm_eps": 1e-4}), encoding="utf-8")  # as the base has it
        return original(folder, dtype, device)

    monkeypatch.setattr(write, "load_written", spoiled)
    with pytest.raises(ParityMissed, match="what rounding does to it"):
        export(hardened(loud(rms_norm_eps=1e-4)), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_the_parameters_of_the_base_are_counted_in_its_tensors_whatever_its_configuration_says() -> None:
    base = build("llama", tied=False)
    num_parameters = base.num_parameters()
    base.config.tie_word_embeddings = True
    tuner = find_tuner(hardened(base, untie_word_embeddings=True))
    assert tuner is not None
    assert pruning_of(tuner).num_parameters_base == num_parameters


def test_compaction_has_the_same_measure(tmp_path: Path) -> None:
    model = hardened(loud())
    tuner = find_tuner(model)
    assert tuner is not None
    tokens = TokenSetup.of(model.config, model.generation_config, tiny_tokenizer())
    _, record = write_compact(model, tuner, tmp_path / "out", tokens=tokens, batches=[batch()], seed=0)
    assert record.parity["permutation_floor"] > verify.MAX_LOGIT_DIFF


def test_a_checkpoint_that_does_not_load_cleanly_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write.write_config

    def deeper(config: Any, folder: Path) -> None:
        config.num_hidden_layers += 1
        original(config, folder)

    monkeypatch.setattr(write, "write_config", deeper)
    with pytest.raises(RunFailed, match=r"does not load cleanly.*layers\.3\.mlp\.up_proj"):
        export(tuned(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "write_config", full)
    with pytest.raises(RunFailed, match="No space left"):
        export(tuned(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_weight_beyond_the_range_of_its_dtype_is_called_that(dtype: torch.dtype, tmp_path: Path) -> None:
    """A healthy adapter whose folded embedding float16 cannot hold, and a broken one."""
    model = tuned(tied=False)
    with torch.no_grad():
        weight = model.get_submodule("base_model.model.model.embed_tokens").weight
        weight[5, :] = 1e6 if dtype == torch.float16 else torch.nan
    message = (
        r"model\.embed_tokens\.weight is beyond the range of float16 .* --dtype bfloat16 or float32"
        if dtype == torch.float16
        else r"non-finite values in the folded weight model\.embed_tokens\.weight; the adapter is broken"
    )
    with pytest.raises(PatError, match=message):
        export(model, tmp_path / "out", dtype=dtype)
    assert os.listdir(tmp_path) == []
    with pytest.raises(PatError, match=message):
        model.merge_and_unload(safe_merge=True, dtype=dtype)


def test_before_the_milestone_nothing_is_written(tmp_path: Path) -> None:
    model = attach(build("llama", tied=True))
    tuner = find_tuner(model)
    assert tuner is not None
    tuner.set_step(1, 2)
    with pytest.raises(PatError, match="milestone"):
        export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(build("llama", tied=True), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(PatError, match="without a PAT adapter"):
        export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


# -- the output folder ----------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PatError, match="not empty"):
        check_output_folder(tmp_path)
    with pytest.raises(PatError, match="not empty"):
        export(tuned(), tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(PatError, match="not a folder"):
        check_output_folder(tmp_path / "notes.txt")


def test_new_and_empty_folders_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert check_output_folder(str(tmp_path / "empty")) == tmp_path / "empty"
    assert check_output_folder(tmp_path / "new") == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    _, folder = export(tuned(), tmp_path / "empty")
    assert (folder / "config.json").is_file()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PatError, match="cannot be written"), staged_folder(tmp_path / "file" / "out"):
        pytest.fail("there is no folder to write to")


def test_a_mount_point_is_filled_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be neither removed nor replaced: a container's volume, say."""
    target = tmp_path / "volume"
    target.mkdir()

    def busy(self: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    removed = Path.rmdir
    monkeypatch.setattr(Path, "rmdir", lambda self: busy(self) if self == target else removed(self))
    _, folder = export(tuned(), target)
    assert os.listdir(tmp_path) == ["volume"]
    AutoModelForCausalLM.from_pretrained(folder)
