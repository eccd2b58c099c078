"""Does compaction cost quality? Final held-out NLL of `pat tune` with and without it, paired by seed.

    python benchmarks/compaction_nll.py --model .models/smollm2 --data ../shared/data/instruct/instruct_21k.jsonl \
        --seeds 0 --steps 120 --output benchmarks/results/compaction_nll.json

Both runs of a pair see the same rows in the same order from the same initial adapter. Further flags go to `pat tune`.
Results of other models and recipes in the output file stay; a pair that is in it with the same flags is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pat.report.records import environment

MARK = 0.02
"""Nats per response token that compaction may cost at most."""


def main() -> None:
    """Run all pairs, and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--held_out", default="200")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--jobs", type=int, default=1, help="Runs side by side; their seconds then say little.")
    parser.add_argument("--output", required=True, type=Path)
    args, flags = parser.parse_known_args()

    settings = {"flags": flags, "max_length": args.max_length, "held_out": args.held_out, "data": Path(args.data).name}
    key = f"{Path(args.model).name}, {args.recipe} recipe, {args.steps} steps"
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    earlier = results.get("comparisons", {}).get(key, {})
    pairs = {p["seed"]: p for p in earlier.get("pairs", [])} if settings.items() <= earlier.items() else {}
    seeds = [int(seed) for seed in args.seeds.split(",")]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {seed: start(pool, args, flags, seed) for seed in seeds if seed not in pairs}
        for seed in seeds:
            if seed in runs:
                pairs[seed] = compare(runs[seed], seed)
            differences = [pair["difference"] for pair in pairs.values()]
            record = settings | {
                "mark": MARK,
                "jobs": args.jobs,
                "pairs": [pairs[key] for key in sorted(pairs)],
                "mean_difference": statistics.mean(differences),
                "standard_deviation": statistics.stdev(differences) if len(differences) > 1 else None,
            }
            results = results | environment()
            results.setdefault("comparisons", {})[key] = record
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=2) + "\n")


Runs = dict[str, "Future[dict[str, Any]]"]


def start(pool: ThreadPoolExecutor, args: argparse.Namespace, flags: list[str], seed: int) -> Runs:
    """Queue both runs of one pair."""
    kinds = {"compact": [], "full_width": ["--no_compact", "true"]}
    return {name: pool.submit(tune, args, [*flags, *more, "--seed", str(seed)]) for name, more in kinds.items()}


def compare(runs: Runs, seed: int) -> dict[str, Any]:
    """Wait for one pair and compare its runs."""
    pair: dict[str, Any] = {"seed": seed} | {name: run.result() for name, run in runs.items()}
    pair["difference"] = pair["compact"]["nll"] - pair["full_width"]["nll"]
    print(f"seed {seed}: {pair['difference']:+.4f} nats", flush=True)
    return pair


def tune(args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Run `pat tune` in a process of its own and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "pat", "tune", "--model_name_or_path", args.model, "--dataset_name", args.data]
        command += ["--output_dir", str(out), "--max_steps", str(args.steps), "--max_length", str(args.max_length)]
        command += ["--recipe", args.recipe, "--held_out", args.held_out, "--save_strategy", "no"]
        done = subprocess.run([*command, "--disable_tqdm", "true", *flags], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        results = json.loads((out / "results.json").read_text())
        figures = results["figures"]
        return {
            "nll": figures["dense"]["held_out_nll"],
            "nll_base": figures["base"]["held_out_nll"],
            "num_held_out_tokens": figures["dense"]["num_held_out_tokens"],
            "pruned_hidden_size": results["cut"]["pruned_hidden_size"],
            "losses": [row["loss"] for row in results["log_history"] if "loss" in row],
            "seconds": results["timings"],
            "parity_at_the_milestone": (results["compaction"] or {}).get("parity"),
            "parity": results["parity"],
        }


if __name__ == "__main__":
    main()
