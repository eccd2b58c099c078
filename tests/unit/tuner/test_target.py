"""A target in parameters, bytes or predicted time becomes a shape that meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from tiny_training import pat_config
from transformers import PretrainedConfig

from pat.errors import PatError
from pat.families import get_family
from pat.options import OptionsParser
from pat.plan.options import PlanOptions
from pat.shape import Shape
from pat.surgery.costs import build_skeleton, cost_of, pruned_config
from pat.training.arguments import TuneArguments
from pat.tuner.config import PatConfig
from pat.tuner.prepare import check_config
from pat.tuner.target import parse_bytes


@pytest.fixture(scope="module")
def config() -> PretrainedConfig:
    return build("llama", tied=True, intermediate_size=512, num_hidden_layers=2).config


def shape(config: PretrainedConfig, **options: Any) -> Shape:
    return check_config(config, get_family("llama"), pat_config(**{"axes": ["mlp"], "pruning_ratio": None, **options}))


def total(config: PretrainedConfig) -> int:
    return build_skeleton(config, torch.float32).model.num_parameters()


@pytest.mark.parametrize("axes", [["mlp"], ["hidden"], ["layers"], ["mlp", "heads"], ["auto"]])
@pytest.mark.parametrize("share", [0.6, 0.72, 0.85])
def test_parameters_and_bytes_are_met_and_hardly_undercut(
    config: PretrainedConfig, share: float, axes: list[str]
) -> None:
    target = round(share * total(config))
    found = shape(config, target_num_parameters=target, axes=axes)
    kept = total(pruned_config(build_skeleton(config, torch.float32), found, tied=True))
    assert kept <= target
    if axes != ["layers"]:  # of which there are two
        assert kept > 0.88 * target
    assert shape(config, target_bytes=str(4 * target), axes=axes).pruned_sizes == found.pruned_sizes


@pytest.mark.parametrize("axes", [["mlp"], ["hidden"], ["layers"], ["auto"]])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_the_predicted_time_is_met_and_hardly_undercut(config: PretrainedConfig, share: float, axes: list[str]) -> None:
    skeleton = build_skeleton(config, torch.float32)

    def flops(found: Shape) -> float:
        small = build_skeleton(pruned_config(skeleton, found, tied=True), torch.float32)
        return cost_of(small, config.max_position_embeddings).prefill_flops_per_token

    goal = share * cost_of(skeleton, config.max_position_embeddings).prefill_flops_per_token
    found = shape(config, target_latency=share, axes=axes)
    assert flops(found) <= goal
    if axes != ["layers"]:  # of which there are two
        assert flops(found) > 0.85 * goal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_num_parameters": 10**9}, "target_num_parameters=1,000,000,000; expected a number below the base's"),
        ({"target_num_parameters": 0}, "target_num_parameters=0; expected"),
        ({"target_bytes": "9GB"}, "target_bytes=9,000,000,000; expected a number below"),
        ({"target_bytes": "small"}, "target_bytes='small'; expected a size such as 200MB"),
        ({"target_latency": 1.5}, r"target_latency=1.5; expected a finite number that is above 0 and below 1"),
        (
            {"target_latency": 0.01},
            "target_latency=0.01, which these axes cannot come to; the furthest that they go is MLP channels 512 to 1",
        ),
        ({"target_bytes": "1MB", "untie_word_embeddings": True}, "target_bytes=1MB with untie_word_embeddings"),
        ({"target_latency": 0.5, "pruning_ratio": 0.2}, "both pruning_ratio=0.2 and target_latency=0.5"),
        (
            {"target_bytes": "1KB", "pruned_intermediate_size": 8},
            "both target_bytes=1KB and pruned_intermediate_size=8",
        ),
    ],
)
def test_impossible_targets_are_refused(config: PretrainedConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PatError, match=message):
        shape(config, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200M", 2 * 10**8), ("1.2b", 12 * 10**8), ("0.5K", 500), (" 7 ", 7), ("90000000", 9 * 10**7), (8, 8)],
)
def test_numbers_of_parameters_are_read_as_people_write_them(text: str | int, expected: int, tmp_path: Path) -> None:
    assert PatConfig(task_type="CAUSAL_LM", target_num_parameters=text).target_num_parameters == expected
    (tmp_path / "flags.yaml").write_text(f"model_name_or_path: m\ntarget_num_parameters: {text}\n", encoding="utf-8")
    for argv in (["--config", str(tmp_path / "flags.yaml")], [f"--target_num_parameters={text}"]):
        options = OptionsParser("pat plan", PlanOptions).parse(["--model_name_or_path=m", *argv])
        assert options.target_num_parameters == expected
        tune = OptionsParser("pat tune", TuneArguments)
        tuned = tune.parse(["--model_name_or_path=m", "--dataset_name=d", f"--output_dir={tmp_path / 'out'}", *argv])
        assert tuned.pat_config().target_num_parameters == expected


@pytest.mark.parametrize(("text", "expected"), [("200MB", 2 * 10**8), ("1.5GB", 15 * 10**8), ("1mib", 2**20), ("7", 7)])
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected
