"""Every flag of the libraries is used by us, passed on to the trainer, or refused with the reason."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from trl import ModelConfig, SFTConfig

from pat.errors import PatError
from pat.option import Option
from pat.options import OptionsParser
from pat.training import flag_names as flag_names_module
from pat.training.arguments import TuneArguments, build_arguments
from pat.training.flag_names import flag_names
from pat.training.options import RunOptions
from pat.training.refused import REFUSED
from pat.training.run.run_file import MAY_CHANGE

BASE: dict[str, Any] = {"model_name_or_path": "base", "dataset_name": "data.jsonl", "output_dir": "out"}

USED = """
deepspeed
model_name_or_path model_revision dtype attn_implementation lora_r lora_alpha lora_dropout lora_target_modules
lora_target_parameters lora_modules_to_save use_rslora use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type
use_bnb_nested_quant bnb_4bit_quant_storage output_dir push_to_hub hub_token hub_private_repo hub_model_id hub_revision
resume_from_checkpoint seed use_cpu chat_template_path dataset_text_field dataset_num_proc eos_token max_length
truncation_mode shuffle_dataset packing packing_strategy eval_packing completion_only_loss assistant_only_loss
disable_tqdm
"""

PASSED_ON = """
fsdp fsdp_config average_tokens_across_devices ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
ddp_static_graph ddp_backend ddp_timeout eval_use_gather_object
per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
max_grad_norm label_smoothing_factor bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size
logging_strategy logging_steps logging_first_step logging_nan_inf_filter include_num_input_tokens_seen log_level
report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_accumulation_steps
save_only_model save_strategy save_steps save_total_limit load_best_model_at_end
metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism
data_seed accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
remove_unused_columns label_names train_sampling_strategy length_column_name debug skip_memory_metrics
router_aux_loss_coef padding_free pad_to_multiple_of loss_type activation_offloading pad_token
"""


def test_the_flags_are_known_before_the_libraries_are_imported() -> None:
    """Or a flag of theirs would be refused as misspelt, or a misspelt one pass for seconds."""
    assert flag_names() == set(OptionsParser("pat tune", TuneArguments).options)


def test_libraries_that_declare_their_flags_otherwise_are_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    without_base = tuple(declared for declared in flag_names_module._CLASSES if declared[2] != "TrainingArguments")
    for other in ((), (("transformers", "training_args.py", "Renamed"),), (("no_such_package", "a.py", "A"),)):
        monkeypatch.setattr(flag_names_module, "_CLASSES", (*without_base, *other))
        assert flag_names() is None


def test_every_flag_has_its_place() -> None:
    """A new version of a library that brings a flag makes somebody decide what it means here."""
    theirs = {field.name for owner in (SFTConfig, ModelConfig) for field in fields(owner) if field.init}
    places = [set(USED.split()), set(PASSED_ON.split()), set(REFUSED)]
    assert set.union(*places) == theirs
    assert sum(map(len, places)) == len(theirs)


def is_read(option: Option, value: Any) -> bool:
    try:
        return option.read(value) == value
    except ValueError:
        return False


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_that_would_do_nothing_is_refused_unless_it_says_what_is_so_anyway(name: str) -> None:
    harmless, reason = REFUSED[name]
    option = OptionsParser("pat tune", TuneArguments).options[name]
    values = [*option.choices, True, False, 3, "x", ["x"], {"a": 1}]
    other = next(value for value in values if value != harmless and is_read(option, value))
    with pytest.raises(PatError) as error:
        build_arguments(**BASE, **{name: other})
    assert f"Got {name}=" in str(error.value) and reason in str(error.value)
    if harmless is not None:
        build_arguments(**BASE, **{name: harmless})


def test_what_may_change_is_known() -> None:
    """A pattern that fits no option would be a slip."""
    names = {f.name for owner in (SFTConfig, ModelConfig, RunOptions) for f in fields(owner)}
    for pattern in MAY_CHANGE:
        stem = pattern.strip("*")
        assert any(stem in name if "*" in pattern else stem == name for name in names), pattern


def test_the_trainer_takes_one_gpu_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = build_arguments(**BASE, per_device_train_batch_size=4)
    arguments.sft._n_gpu = 4  # what the trainer's own arguments count on such a machine
    assert arguments.sft.n_gpu == 1 and arguments.sft.train_batch_size == 4


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")
def test_offloading_needs_something_to_offload_from() -> None:
    with pytest.raises(PatError, match="without an accelerator"):
        build_arguments(**BASE, activation_offloading=True)
