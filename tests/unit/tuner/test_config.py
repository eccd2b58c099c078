"""The configuration: its fields, what it refuses, and that it survives JSON and pickle."""

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from peft import ArrowConfig, LoraConfig, PeftConfig, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from pat.errors import PatError
from pat.tuner import PatConfig, PatModel


def test_it_is_a_lora_config_with_fields_of_its_own() -> None:
    config = PatConfig(task_type="CAUSAL_LM", r=20, lora_alpha=40, use_dora=True, use_rslora=True, lora_dropout=0.1)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.use_dora, config.use_rslora) == (20, 40, True, True)
    assert config.pruning_ratio is None and config.pruned_hidden_size is None  # the default ratio
    assert config.operator_lr_multiplier == 30 and config.mask == "trainable" and config.rotation == "auto"
    assert [config.milestone_share(cuts_hidden=cuts) for cuts in (True, False)] == [0.02, 0.0]
    assert dataclasses.replace(config, milestone=0.3).milestone_share(cuts_hidden=False) == 0.3
    given = dataclasses.replace(config, pruned_hidden_size=36.0, multiple_of=4.0, milestone=1)
    sizes = [given.pruned_hidden_size, given.multiple_of, given.milestone]
    assert sizes == [36, 4, 1] and all(isinstance(size, int) for size in sizes)
    assert [PatConfig(axes=axes).axes for axes in ("auto", ("mlp", "hidden"))] == [["auto"], ["mlp", "hidden"]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pruning_ratio": 25}, r"pruning_ratio=25.*above 0 and below 1"),
        ({"pruning_ratio": 0.25, "pruned_hidden_size": 8}, r"one of the two"),
        ({"mask_lr_multiplier": math.inf}, r"mask_lr_multiplier=inf.*finite"),
        ({"gain_tolerance": math.nan}, r"gain_tolerance=nan.*finite"),
        ({"lora_dropout": math.nan}, r"lora_dropout=nan.*finite"),
        ({"mask": "soft"}, r"mask='soft'.*'trainable', 'frozen'"),
        ({"rotation": "svd"}, r"rotation='svd'.*'auto', 'pca', 'none'"),
        ({"milestone": 1.2}, r"milestone=1\.2"),
        ({"milestone": -0.1}, r"milestone=-0\.1"),
        ({"operator_rank": "full"}, r"operator_rank='full'.*'dense'"),
        ({"active_loss_weight": -1.0}, r"active_loss_weight"),
        ({"identity_loss_weight": -1.0}, r"identity_loss_weight"),
        ({"mask_lr_multiplier": -1.0}, r"mask_lr_multiplier"),
        ({"gain_tolerance": -0.1}, r"gain_tolerance"),
        ({"layer_replication": [(0, 1)]}, r"layer_replication.*does not support"),
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens.*some tokens alone"),
        ({"arrow_config": ArrowConfig()}, r"arrow_config.*router"),
        ({"init_lora_weights": "pissa_niter_4"}, r"pissa_niter_4.*at random.*another base.*"),
        ({"init_lora_weights": "lora_ga"}, r"lora_ga.*another base than it was trained on"),
        ({"init_lora_weights": "corda"}, r"corda.*another base than it was trained on"),
        ({"axes": "mpl"}, r"axes=\['mpl'\]; expected 'auto'"),
        ({"bias": 3}, r"bias='3'; expected"),
        ({"lora_alpha": None}, r"lora_alpha='None'; expected a number"),
        ({"base_shape": "llama"}, r"base_shape='llama'; expected a mapping"),
        ({"resolved_from": 3}, r"resolved_from='3'; expected a mapping"),
        ({"base_vocab_size": -1}, r"base_vocab_size=-1; expected a whole number"),
        ({"target_modules": "("}, r"target_modules='\('; expected a regular expression.*unterminated"),
        ({"exclude_modules": "a{99999999999999}"}, r"exclude_modules=.*expected a regular expression"),
        ({"modules_to_save": ["norm", "["]}, r"modules_to_save='\['.*expected a regular expression"),
        (
            {"rank_pattern": {"(?i)q_proj": 4}},
            r"rank_pattern='\(\?i\)q_proj'.*global flags",
        ),  # peft puts it into another
        ({"alpha_pattern": {"*": 4}}, r"alpha_pattern='\*'.*expected a regular expression"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers", "("]},
            r"layers_pattern='\('.*expected a regular expression",
        ),
    ],
)
def test_impossible_values_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PatError, match=message) as error:
        PatConfig(task_type="CAUSAL_LM", **fields)
    assert "\n" not in str(error.value)


def test_a_rank_from_the_command_line_is_a_string() -> None:
    assert PatConfig(operator_rank="12").operator_rank == 12
    assert PatConfig(operator_rank="dense").operator_rank == "dense"


def example() -> PatConfig:
    return PatConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj", "o_proj"],
        pruned_hidden_size=36,
        operator_rank="dense",
        mask="frozen",
        rotation="none",
        milestone=0.4,
        calibration_tokens=100,
        modules_to_save=["norm"],
    )


def test_json_round_trip(tmp_path: Path) -> None:
    config = example()
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "PAT"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is PatConfig
    # peft marks what it loads as meant for inference
    assert loaded.to_dict() | {"inference_mode": False} == config.to_dict()
    assert type(get_peft_config({"peft_type": "PAT", "pruning_ratio": 0.5})) is PatConfig


def test_pickle_round_trip() -> None:
    assert pickle.loads(pickle.dumps(example())) == example()


def test_the_method_is_registered_with_peft() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING["PAT"] is PatConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["PAT"] is PatModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["PAT"] == "lora_"
