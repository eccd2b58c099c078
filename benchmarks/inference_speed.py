"""Is a 25 % smaller model as much faster as FLOP and byte counts say? `pat benchmark` on random Llamas.

    OMP_NUM_THREADS=1 python benchmarks/inference_speed.py --output benchmarks/results/inference_speed.json

The shapes are hidden-dominated: nearly all of their work scales with the hidden size (MHA, small vocabulary), so that
the hidden size and not the shape is tested. Random weights are as fast as trained ones.

Prefill is held against its mark at hidden size 1024, decode at 2048: the product of one token with a matrix was seen to
read fewer bytes a second where the matrix has rows of 768 numbers than where they have 1024 (MKL, one thread: 12.6 and
15.4 GB/s), which wider shapes feel less. Decode of the narrower one is in the record, too. The figures lie beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pat.benchmark.command import run_benchmark
from pat.benchmark.options import BenchmarkOptions
from pat.benchmark.tables import print_benchmark
from pat.families import get_family
from pat.report.records import to_json, write_record
from pat.surgery.dense import shrink_config

RATIO = 0.25
HEAD_DIM = 64

MARKS = {"prefill": (8, 0.95), "decode": (1, 0.90)}
"""Smallest batch size that counts, and least share of the predicted speed-up, by phase."""


def make_models(folder: Path, hidden_size: int, dtype: torch.dtype, device: str) -> dict[str, str]:
    """Write a random hidden-dominated Llama and one with a hidden size that is a quarter smaller.

    They are drawn on the device: a CPU needs minutes for billions of numbers in bfloat16.
    """
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
        {"hidden_size": round(hidden_size * (1 - RATIO))},
        head_dim=HEAD_DIM,
        tied=False,
    )
    torch.manual_seed(0)
    paths = {}
    for role, shape in (("baseline", config), ("model", small)):
        paths[role] = str(folder / f"{role}-{shape.hidden_size}")
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        model.save_pretrained(paths[role])
    return paths


def run(
    args: argparse.Namespace, hidden_size: int, contexts: list[int], batch_sizes: list[int], figure: Path | None
) -> dict[str, Any]:
    """Compare the two models of a shape; print the tables and return the record."""
    with tempfile.TemporaryDirectory(prefix="inference_speed-") as scratch:
        paths = make_models(Path(scratch), hidden_size, getattr(torch, args.dtype), args.device)
        benchmark = run_benchmark(
            BenchmarkOptions(
                **paths,
                contexts=contexts,
                batch_sizes=batch_sizes,
                new_tokens=args.new_tokens,
                repetitions=args.repetitions,
                warmup=args.warmup,
                max_seconds=args.max_seconds,
                device=args.device,
                threads=args.threads,
                output_dir=Path(scratch) / "out",
            )
        )
        print_benchmark(benchmark)
        record: dict[str, Any] = json.loads(to_json(benchmark))
        for role in paths:  # where the scratch folder was means nothing to a reader
            record["models"][role]["name"] = record["options"][role] = Path(paths[role]).name
        record["options"]["output_dir"] = None
        drawn = Path(scratch) / "out" / "speedup.png"
        if figure is not None and drawn.exists():
            figure.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(drawn, figure)
    return record


def judge(record: dict[str, Any], phase: str) -> dict[str, Any]:
    """Hold a phase against its mark, at the setting that does worst."""
    least_batch, mark = MARKS[phase]
    rows = [row for row in record["settings"] if row["phase"] == phase and row["batch_size"] >= least_batch]

    def over_predicted(row: dict[str, Any], name: str) -> float | None:
        return None if row[name] is None else row[name]["median"] / row["predicted_speedup"]

    figures = {f"{row['batch_size']} x {row['context']}": over_predicted(row, "speedup") for row in rows}
    known = {name: figure for name, figure in figures.items() if figure is not None}
    worst = min(known, key=lambda name: known[name]) if known and len(known) == len(figures) else None
    return {
        "model": record["options"]["model"],
        "baseline": record["options"]["baseline"],
        "mark": mark,
        "from_batch_size": least_batch,
        "measured_over_predicted": figures,
        "cpu_time_over_predicted": {
            f"{row['batch_size']} x {row['context']}": over_predicted(row, "cpu_speedup")
            for row in rows
            if record["device"] == "cpu"  # an accelerator's work is none of the CPU's
        },
        "worst": worst,
        "met": worst is not None and known[worst] >= mark,
    }


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file; the figures go beside it.")
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--decode_hidden_size", type=int, default=2048)
    parser.add_argument("--decode_contexts", type=int, nargs="+", default=[128])
    parser.add_argument("--decode_batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--max_seconds", type=float, default=120, help="See `pat benchmark`.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    load_before = os.getloadavg()
    figures = [None, None] if args.output is None else [args.output.with_suffix(f".{phase}.png") for phase in MARKS]
    shapes = (
        (args.hidden_size, args.contexts, args.batch_sizes),
        (args.decode_hidden_size, args.decode_contexts, args.decode_batch_sizes),
    )
    runs = {phase: run(args, *shape, figure) for phase, shape, figure in zip(MARKS, shapes, figures, strict=True)}
    common = {name: runs["prefill"].pop(name) for name in ("schema_version", "versions", "machine")}
    for name in common:
        runs["decode"].pop(name)
    common["machine"] |= {"load_average_before": load_before, "load_average_after": os.getloadavg()}
    marks = {phase: judge(record, phase) for phase, record in runs.items()}
    if args.output is not None:
        write_record(args.output, {**common, "marks": marks, "runs": runs})
    for phase, verdict in marks.items():
        print(f"{phase}, {verdict['model']} beside {verdict['baseline']}, measured over predicted (batch x context):")
        for name, by_wall in verdict["measured_over_predicted"].items():
            by_cpu = verdict["cpu_time_over_predicted"].get(name)
            wall, cpu = ("no figure" if value is None else f"{value:.3f}" for value in (by_wall, by_cpu))
            print(f"  {name}: {wall} by wall time, {cpu} by CPU time")
        print(f"  mark {verdict['mark']}: {'met' if verdict['met'] else 'NOT MET'}, worst at {verdict['worst']}")


if __name__ == "__main__":
    main()
