"""`pat plan`: the widths taken, what is said of them, and what cannot be known without weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from tiny_models import SLIDING_WINDOW, build
from tiny_training import tuner_of

from pat import cli
from pat.errors import PatError
from pat.plan.command import PlanRecord, run_plan
from pat.plan.cpu import CpuTime
from pat.plan.options import PlanOptions
from pat.plan.tables import print_plan
from pat.tuner import PatConfig


def plan(folder: Path, family: str = "llama", *, tied: bool = True, **options: Any) -> PlanRecord:
    build(family, tied=tied).config.save_pretrained(folder)
    return run_plan(PlanOptions(model_name_or_path=str(folder), **({"axes": ["hidden"]} | options)))


def test_a_ratio_has_its_width_and_the_legal_ones_around_it(tmp_path: Path) -> None:
    record = plan(tmp_path)
    (candidate,) = record.candidates
    assert candidate.shape.pruned("hidden") == 36
    kept = candidate.cost.total.num_parameters / record.base.total.num_parameters
    assert candidate.pruning_ratio == 1 - kept == pytest.approx(0.25, abs=0.005)  # biases are not on the stream
    assert candidate.pruning_ratio == pytest.approx(candidate.shape.pruning_ratio, abs=1e-12)
    assert candidate.nearby_widths == (24, 28, 32, 36, 40, 44)
    assert candidate.shape.reason.startswith("cutting 0.25 of 48 leaves 36;")
    (aligned,) = plan(tmp_path, multiple_of=16, pruning_ratio=[0.3]).candidates
    assert aligned.nearby_widths == (16, 32)


def test_several_ratios_are_planned_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = plan(tmp_path, pruning_ratio=[0.5, 0.25])
    assert [candidate.cost.hidden_size for candidate in record.candidates] == [24, 36]
    half, quarter = record.candidates
    assert half.prefill_speedup == record.base.prefill_flops_per_token / half.cost.prefill_flops_per_token
    assert half.decode_speedup == record.base.decode_bytes_per_token / half.cost.decode_bytes_per_token
    # Half of the weights, but the whole of attention and cache, which are most of a tiny model's cost.
    assert 2 > half.prefill_speedup > quarter.prefill_speedup > 1
    assert 2 > half.decode_speedup > quarter.decode_speedup > 1
    print_plan(record)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    totals = [cost.total.num_parameters for cost in (record.base, half.cost, quarter.cost)]
    assert ["total", *(f"{total:,}" for total in totals)] in rows
    assert ["change", "", *(f"{total / totals[0] - 1:+.1%}" for total in totals[1:])] in rows
    (writing,) = [row for row in rows if row[:1] == ["decode, per token"]]
    assert [cell.split()[-1] for cell in writing[2:]] == [f"({c.decode_speedup:.2f}x)" for c in (half, quarter)]


@pytest.mark.parametrize(
    ("family", "tied", "untie", "rotation", "words"),
    [
        ("llama", False, False, "pca", "PCA, exact"),
        ("llama", True, True, "pca", "PCA, exact"),
        ("llama", True, False, "open", "only the weights can tell"),
        ("gemma2", True, False, "none", "has norms between"),
    ],
)
def test_a_rotation_is_promised_only_where_no_weight_can_rule_it_out(
    family: str,
    tied: bool,
    untie: bool,
    rotation: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = plan(tmp_path, family, tied=tied, untie_word_embeddings=untie)
    print_plan(record)
    assert record.rotation == rotation and words in capsys.readouterr().out


def test_costs_are_for_the_context_that_was_asked_for(tmp_path: Path) -> None:
    default, short = plan(tmp_path), plan(tmp_path, context=32)
    assert (default.context, short.context) == (128, 32)  # all that the model can read, rather than 2048
    assert default.base.kv_cache_bytes == 4 * short.base.kv_cache_bytes
    with pytest.raises(PatError, match="context=129; expected a number of tokens from 1 to 128"):
        plan(tmp_path, context=129)


def test_windows_limit_what_is_cached(tmp_path: Path) -> None:
    record = plan(tmp_path, "gemma2", context=4 * SLIDING_WINDOW)  # two layers of three have a window
    assert record.base.kv_cache_bytes == 2 * 2 * 20 * 4 * (2 * SLIDING_WINDOW + 4 * SLIDING_WINDOW)


@pytest.mark.parametrize(
    "options", [{"pruning_ratio": [0.25, 1.0]}, {"pruning_ratio": [0.25], "pruned_hidden_size": 36}]
)
def test_what_no_model_can_be_pruned_to_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(PatError, match="pruning_ratio="):
        PlanOptions(model_name_or_path="nowhere", **options)


def test_what_does_nothing_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan(tmp_path, axes=["hidden"], pruned_intermediate_size=40)
    assert [line for line in caplog.messages if "no effect" in line] == [
        "axes=['hidden'] has no effect beside the sizes that were given, which cut ['mlp']."
    ]


def test_an_untied_head_that_is_larger_than_the_cut_is_said_of_the_ratio_that_grows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan(tmp_path, tied=True, untie_word_embeddings=True, axes=["mlp"], pruning_ratio=[0.1, 0.05])
    assert caplog.text.count("will not be smaller than its base") == 1


def test_notes_say_what_was_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["dtype"]
    stored["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    record = run_plan(PlanOptions(model_name_or_path=str(tmp_path), untie_word_embeddings=True))
    notes = " ".join(record.notes)
    assert "float32" in notes and "quantised; sizes" in notes
    assert "training stays at its width to the end" in notes and record.training_after_cut == ()
    print_plan(record)
    assert f"│ {record.training.num_trainable_parameters:,} │" in " ".join(capsys.readouterr().out.split())
    assert f"{record.candidates[0].cost.groups['head'].num_parameters:,}" in notes


@pytest.mark.parametrize(
    ("fields", "options", "size"),
    [
        ({}, {}, "36864"),
        ({}, {"pruning_ratio": [0.25]}, "36864"),
        ({"vocab_size": 36_864}, {}, None),
        ({"intermediate_size": 60_000}, {}, None),  # of which the vocabulary is little
        ({"tie_word_embeddings": False}, {}, None),
        ({}, {"pruning_ratio": [0.05, 0.25]}, None),  # the vocabulary alone saves more
        ({}, {"target_latency": 0.8}, None),
        ({}, {"pruned_intermediate_size": 8}, None),
        ({}, {"pruning_ratio": [0.25], "vocabulary_size": 36_864}, None),
    ],
)
def test_a_smaller_vocabulary_is_advised_where_it_takes_much_of_a_model_and_would_be_taken(
    fields: dict[str, Any], options: dict[str, Any], size: str | None, tmp_path: Path
) -> None:
    config = build("llama", tied=True).config.to_dict()
    large = {"vocab_size": 49_152, "intermediate_size": 12_000}
    (tmp_path / "config.json").write_text(json.dumps(config | large | fields))
    notes = " ".join(run_plan(PlanOptions(model_name_or_path=str(tmp_path), axes=["mlp"], **options)).notes)
    assert (f"--vocabulary_size {size} drops" in notes) if size else ("The vocabulary takes" not in notes)


def test_a_trimmed_vocabulary_is_said_to_be_missing_from_the_sizes() -> None:
    stories = str(Path(__file__).resolve().parents[2] / "data" / "stories260K")
    trimmed = run_plan(PlanOptions(model_name_or_path=stories, pruning_ratio=[0.25], vocabulary_size=320))
    whole = run_plan(PlanOptions(model_name_or_path=stories, pruning_ratio=[0.25]))
    said = [note for note in trimmed.notes if "without a vocabulary" in note]
    assert len(said) == 1 and not any("without a vocabulary" in note for note in whole.notes)


@pytest.mark.parametrize(("size", "words"), [(500, "a multiple of 64"), (1024, "below the"), (64, "single bytes")])
def test_a_vocabulary_that_a_run_would_refuse_is_not_planned(size: int, words: str) -> None:
    stories = str(Path(__file__).resolve().parents[2] / "data" / "stories260K")
    with pytest.raises(PatError, match=words):
        run_plan(PlanOptions(model_name_or_path=stories, vocabulary_size=size))


def test_a_mixture_of_experts_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = plan(tmp_path, "mixtral")
    print_plan(record)
    printed = capsys.readouterr().out
    assert "MLP, experts" in printed and "tied embedding" in printed
    assert cli.main(["plan", "--model_name_or_path", record.model_name_or_path, "--axes", "hidden", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["candidates"][0]["cost"]["total"]["num_parameters"] == record.candidates[0].cost.total.num_parameters
    assert facts["training"]["total_bytes"] == record.training.total_bytes


@pytest.mark.parametrize(
    ("family", "asked", "when"),
    [
        ("llama", {"pruned_intermediate_size": 40}, "The cut comes before the first step"),
        ("llama", {"pruned_num_hidden_layers": 2}, "The cut comes before the first step"),
        ("llama", {"pruned_hidden_size": 36}, "up to the milestone"),
        ("mixtral", {"pruned_hidden_size": 36}, "up to the milestone"),
    ],
)
def test_memory_after_the_cut_is_that_of_the_model_which_is_trained_then(
    family: str, asked: dict[str, int], when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = plan(tmp_path, family, axes=["auto"], **asked)
    (after,) = record.training_after_cut
    config = PatConfig(task_type="CAUSAL_LM", rotation="none", refit=False, **asked)
    tuner = tuner_of(get_peft_model(build(family, tied=True), config))
    tuner.set_step(1, 1)
    small = tuner.compact().attach().model
    trained = sum(p.numel() for p in small.parameters() if p.requires_grad)
    assert after.num_trainable_parameters == trained
    assert after.base_bytes == sum(p.nbytes for p in small.parameters() if not p.requires_grad)
    print_plan(record)
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    assert ["trained parameters", f"{record.training.num_trainable_parameters:,}", f"{trained:,}"] in rows
    assert when in printed and "`pat tune` announces the column before the cut" in printed


@pytest.mark.parametrize(
    ("seconds", "unit", "cells"),
    [
        ((3_754.0, 62.0), "(hours:minutes:seconds)", ["1:02:34", "0:01:02"]),
        ((62.0, 61.0), "(minutes:seconds)", ["1:02", "1:01"]),
    ],
)
def test_times_are_headed_by_the_units_of_their_cells(
    seconds: tuple[float, float], unit: str, cells: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = plan(tmp_path)
    print_plan(record)
    before = " ".join(capsys.readouterr().out.split())
    assert "--cpu_time measures" in before and "--max_steps" in before
    # Advice and command come before all figures.
    assert before.index("Recommended: ") < before.index("--output_dir out") < before.index("MLP channels")
    on_cpu = CpuTime(1, None, True, False, 1.0, 1.0, seconds[0], seconds[1:])
    on_gpus = tuple(replace(time, base_seconds=seconds[0], small_seconds=seconds[1:]) for time in record.training_times)
    print_plan(replace(record, cpu_time=on_cpu, training_times=on_gpus))
    printed = capsys.readouterr().out
    assert " ".join(printed.split()).count(unit) == 2
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    assert [row[2:] for row in rows if row and row[0] in ("this CPU", "H100")] == [cells, cells]
    (each,) = [row[2:] for row in rows if row and row[0].startswith("steps an hour")]
    steps = [3600 / (second * 4 * 512 / 1e6) for second in seconds]
    assert each == [f"{number:,.0f}" for number in steps]


def test_notes_do_not_advise_what_has_been_done() -> None:
    stories = str(Path(__file__).resolve().parents[2] / "data" / "stories260K")
    notes = " ".join(run_plan(PlanOptions(model_name_or_path=stories, cpu_time=True)).notes)
    assert "--cpu_time" not in notes and "Time on this CPU: a layer and the head were timed" in notes
    assert "--calibrate DATA measures yours" in notes
