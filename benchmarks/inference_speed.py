"""Is a 25 % smaller model as much faster as FLOP and byte counts say? `pat benchmark` on random Llamas, float32, CPU.

    OMP_NUM_THREADS=1 python benchmarks/inference_speed.py --output benchmarks/results/inference_speed.json

The shape is hidden-dominated: nearly all of its work scales with the hidden size (MHA, small vocabulary), so that the
hidden size and not the shape is tested. Random weights are as fast as trained ones. The figure lands beside the record.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pat.benchmark import BenchmarkOptions, print_benchmark, run_benchmark
from pat.benchmark.options import parse_counts
from pat.benchmark.record import to_dict
from pat.export.results import write_results
from pat.families import get_family
from pat.surgery.dense import shrink_config

RATIO = 0.25
HEAD_DIM = 64

MARKS = {"prefill": (8, 0.95), "decode": (1, 0.90)}
"""Smallest batch size that counts, and least share of the predicted speed-up, by phase."""


def make_models(folder: Path, hidden_size: int) -> dict[str, str]:
    """Write a random hidden-dominated Llama and one with a hidden size that is a quarter smaller."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=8,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=hidden_size // HEAD_DIM,
        head_dim=HEAD_DIM,
        vocab_size=2048,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    small = shrink_config(
        config,
        get_family("llama"),
        pruned_hidden_size=round(hidden_size * (1 - RATIO)),
        head_dim=HEAD_DIM,
        tied=False,
    )
    torch.manual_seed(0)
    paths = {}
    for role, shape in (("baseline", config), ("model", small)):
        paths[role] = str(folder / f"{role}-{shape.hidden_size}")
        AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(paths[role])
    return paths


def judge(settings: list[dict[str, Any]], phase: str) -> dict[str, Any]:
    """Hold a phase against its mark, at the setting that does worst."""
    least_batch, mark = MARKS[phase]
    rows = [row for row in settings if row["phase"] == phase and row["batch_size"] >= least_batch]
    figures = {f"{row['batch_size']} x {row['context']}": row["measured_over_predicted"] for row in rows}
    by_cpu = {
        f"{row['batch_size']} x {row['context']}": row["cpu_speedup"]["median"] / row["predicted_speedup"]
        for row in rows
        if row["cpu_speedup"] is not None
    }
    complete = bool(figures) and None not in figures.values()
    worst = min(figures, key=lambda name: figures[name]) if complete else None
    return {
        "mark": mark,
        "from_batch_size": least_batch,
        "measured_over_predicted": figures,
        "cpu_time_over_predicted": by_cpu,
        "worst": worst,
        "met": worst is not None and figures[worst] >= mark,
    }


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file; the figure goes beside it.")
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--contexts", default="128,512,2048")
    parser.add_argument("--batch_sizes", default="1,8,16")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--max_seconds", type=float, default=120, help="See `pat benchmark`.")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="inference_speed-") as scratch:
        paths = make_models(Path(scratch), args.hidden_size)
        benchmark = run_benchmark(
            BenchmarkOptions(
                **paths,
                contexts=parse_counts(args.contexts, "contexts"),
                batch_sizes=parse_counts(args.batch_sizes, "batch_sizes"),
                new_tokens=args.new_tokens,
                repetitions=args.repetitions,
                warmup=args.warmup,
                max_seconds=args.max_seconds,
                device="cpu",
                threads=args.threads,
                output_dir=Path(scratch) / "out",
            )
        )
        print_benchmark(benchmark)
        record = to_dict(benchmark)
        phases = dict.fromkeys(row["phase"] for row in record["settings"])
        record["marks"] = {phase: judge(record["settings"], phase) for phase in phases}
        record["machine"] |= {"load_average_before": load_before, "load_average_after": os.getloadavg()}
        for role in paths:  # where the scratch folder was means nothing to a reader
            record["models"][role]["name"] = record["options"][role] = Path(paths[role]).name
        record["options"]["output_dir"] = None
        figure = Path(scratch) / "out" / "speedup.png"
        if args.output is not None:
            write_results(args.output, record)
            if figure.exists():
                shutil.copy(figure, args.output.with_suffix(".png"))
    for phase, verdict in record["marks"].items():
        figures = verdict["measured_over_predicted"]
        worst = verdict["worst"]
        share = "not complete" if worst is None else f"{figures[worst]:.3f} at {worst} (batch x context)"
        print(f"{phase}: worst {share}, mark {verdict['mark']}: {'met' if verdict['met'] else 'NOT MET'}")
        for name, by_cpu in verdict["cpu_time_over_predicted"].items():
            print(f"  {name}: {figures[name]:.3f} by wall time, {by_cpu:.3f} by CPU time")


if __name__ == "__main__":
    main()
