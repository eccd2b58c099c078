"""What `pat merge` costs beside copying: memory, time and safety of merging a checkpoint the shape of Llama-2 7B.

Three measurements, each merge a fresh process, its peak resident set size as the system counts it (mapped pages too):

merges  `cp` and `sync` of the base model, then an adapter without rotation and one with, folded in the default dtype
        and in float64, in turns; base and adapter are not in the file cache, most of the libraries are
error   how many weights of a 1 GB checkpoint differ between folding in float32 and float64, and by how much
kills   a merge of a 1 GB checkpoint, killed at random moments: what has the target's name, and does the next run work?

    python benchmarks/merge_cost.py --output benchmarks/results/merge_cost.json

The weights are random: a merge takes as long whatever they are. It needs 30 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pat.checkpoint.hollow import StoredWeights, hollow_model
from pat.checkpoint.shards import ShardWriter
from pat.general_text import general_text
from pat.loading.stored import stored_tensors
from pat.method.operator import default_rank
from pat.report.records import environment, write_record
from pat.tuner import PatConfig, find_tuner

MARKS = {"peak_rss_gb": 2.0, "wall_to_copy": 4.0}
"""What is held against which limit: every merge's memory, and the time of one without rotation."""

SHAPES = {
    "7b": LlamaConfig(pad_token_id=0),  # the defaults are Llama-2 7B
    "1gb": LlamaConfig(
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=8, num_attention_heads=16, pad_token_id=0
    ),
    "tiny": LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=2048,
        pad_token_id=0,
    ),
}  # fmt: skip

MERGES = {
    "none": ("none", None),
    "none-float64": ("none", "float64"),
    "pca": ("pca", None),
    "pca-float64": ("pca", "float64"),
}
"""Rotation and dtype to fold in, None for the default: float32, since the weights are bfloat16."""

MARKED = "none"
"""What `pat merge` does by default to an adapter without rotation: its time is held against copies'."""


LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
wall = time.perf_counter() - started
print(json.dumps({"wall_seconds": wall, "user_seconds": usage.ru_utime, "system_seconds": usage.ru_stime,
                  "peak_rss_gb": usage.ru_maxrss * 1024 / 1e9}))
sys.exit(0 if status == 0 else 1)
"""
"""Starts a merge: the system counts what a process had before it became another program, so that has to be little."""


def make_base(folder: Path, config: LlamaConfig, device: str = "cpu") -> None:
    """Write a random bfloat16 checkpoint in shards of 2 GB, tensor by tensor, with a tokenizer of one token a word."""
    folder.mkdir(parents=True)
    model = hollow_model(config, torch.bfloat16, torch.device("cpu"))
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).to(device)
    with ShardWriter(folder, model, torch.bfloat16, max_shard_size="2GB") as writer:
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.dim() < 2:
                writer.write(name, (1 + 0.1 * noise[: parameter.numel()]).cpu())
                continue
            # The same numbers over and over, shifted: drawing seven billion would take longer than merging them.
            repeats = -(-parameter.numel() // noise.numel())
            drawn = noise.roll(index * 9973).bfloat16().repeat(repeats)[: parameter.numel()].view(parameter.shape)
            writer.write(name, (drawn / math.sqrt(parameter.shape[-1])).cpu())
    model.config.dtype = "bfloat16"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    text = general_text()
    words = ["<s>", *dict.fromkeys(text.split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<s>").save_pretrained(folder)


@torch.no_grad()
def make_adapter(base: Path, folder: Path, rotation: str, device: str = "cpu") -> None:
    """Save a random hardened adapter: LoRA of rank 20 on every linear layer, operators of the default rank."""
    config = LlamaConfig.from_pretrained(base)
    model = hollow_model(config, torch.bfloat16, torch.device("cpu"))
    model.name_or_path = str(base)
    StoredWeights(model, stored_tensors(str(base)) or {}, base.name)  # the vectors
    pat = PatConfig(task_type="CAUSAL_LM", r=20, lora_alpha=40, pruning_ratio=0.25, rotation=rotation)
    with torch.device(device):  # where the operators are made orthonormal; they then go to the model, on the CPU
        peft_model = get_peft_model(model, pat)
    tuner = find_tuner(peft_model)
    assert tuner is not None
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.normal_(std=1e-3)
        elif parameter.requires_grad and name.endswith("scale"):
            parameter.normal_(std=0.1)
    width = config.hidden_size
    basis = None
    if rotation == "pca":
        basis = torch.linalg.qr(torch.randn(width, width).to(device)).Q.double().cpu()
    prior = torch.randperm(width).double() / width - 0.25
    tuner.mask().set_prior(prior, pinned=torch.zeros(width, dtype=torch.bool), basis=basis, head_factor=None)
    tuner.set_step(2, 1)
    peft_model.save_pretrained(str(folder))


def forget(folder: Path) -> None:
    """Take a folder's files out of the file cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove(folder: Path) -> None:
    """Delete a folder and wait until the disk has done so: what is timed next should not have to."""
    shutil.rmtree(folder)
    os.sync()


def time_copy(base: Path, scratch: Path) -> float:
    """Return how many seconds copying the base model onto the disk takes."""
    forget(base)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(scratch / "copy")], check=True)
    subprocess.run(["sync", *map(str, (scratch / "copy").iterdir())], check=True)
    seconds = time.perf_counter() - started
    remove(scratch / "copy")
    return seconds


def command(adapter: Path, output: Path, fold_dtype: str | None = None, device: str = "cpu") -> list[str]:
    """Return the command line of a merge."""
    options = ["--device", device, "--adapter", str(adapter), "--output_dir", str(output)]
    options += [] if fold_dtype is None else ["--fold_dtype", fold_dtype]
    return [sys.executable, "-m", "pat", "merge", *options]


def time_merge(base: Path, adapter: Path, output: Path, fold_dtype: str | None, device: str) -> dict[str, Any]:
    """Merge in a process of its own and return what it took."""
    forget(base)
    forget(adapter)
    # Copying may have pushed the libraries out of the file cache: they are no part of the input.
    subprocess.run([sys.executable, "-m", "pat", "merge", "--help"], check=True, stdout=subprocess.DEVNULL)
    launched = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command(adapter, output, fold_dtype, device)]
    usage = json.loads(subprocess.run(launched, check=True, stdout=subprocess.PIPE).stdout)
    results = json.loads((output / "results.json").read_text())
    files = sorted(path.stat().st_size for path in output.glob("*.safetensors"))
    remove(output)
    return {
        **usage,
        "weight_file_bytes": files,
        "parity": results["parity"],
        **results["timings"],
    }


def fold_flops(config: LlamaConfig, rank: int, small: int, *, rotated: bool) -> float:
    """Count the multiplications and additions of folding: LoRA's products, operators, and the rotation.

    Without a rotation an operator's second factor is only multiplied out for the channels that are kept.
    """
    d, inner, layers, vocabulary = (
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    )  # fmt: skip
    lora = layers * 2 * rank * (4 * d * d + 3 * d * inner)
    writer_vectors = vocabulary + layers * (d + inner)
    operators = 2 * writer_vectors * default_rank(d) * (d + (d if rotated else small))
    stream_vectors = 2 * vocabulary + layers * (4 * d + 3 * inner)
    rotation = 2 * stream_vectors * d * small if rotated else 0
    return float(lora + operators + rotation)


def measure_merges(
    base: Path, adapters: Path, scratch: Path, config: LlamaConfig, names: list[str], device: str, repetitions: int
) -> dict[str, Any]:
    """Copy and merge in turns; every adapter in every precision asked for, the one with a mark `repetitions` times."""
    results: dict[str, Any] = {"copy": {"bytes": sum(path.stat().st_size for path in base.iterdir()), "seconds": []}}
    rows: dict[str, Any] = {name: {"runs": []} for name in names}
    for turn in range(repetitions):
        results["copy"]["seconds"].append(time_copy(base, scratch))
        print(json.dumps({"copy": results["copy"]}), flush=True)  # at once: a run that is cut off leaves its log
        for name in names:
            if turn > 0 and name != MARKED:
                continue
            rotation, fold_dtype = MERGES[name]
            row = time_merge(base, adapters / rotation, scratch / "out", fold_dtype, device)
            adapter = json.loads((adapters / rotation / "adapter_config.json").read_text())
            small = adapter["resolved_width"]["hidden_size"]
            row["fold_flops"] = fold_flops(config, 20, small, rotated=rotation == "pca")
            row["fold_flops_per_second"] = row["fold_flops"] / row["fold_seconds"]
            rows[name]["runs"].append(row)
            print(json.dumps({name: row}, indent=2), flush=True)
    for row in rows.values():
        row["wall_seconds"] = statistics.median(run["wall_seconds"] for run in row["runs"])
        row["peak_rss_gb"] = max(run["peak_rss_gb"] for run in row["runs"])
    return results | {"merges": rows}


def measure_error(adapter: Path, scratch: Path) -> dict[str, Any]:
    """Merge with both dtypes to fold in and compare the weights."""
    for dtype in ("float32", "float64"):
        subprocess.run(command(adapter, scratch / dtype, dtype), check=True, stderr=subprocess.DEVNULL)
    num_weights = num_differing = 0
    relative = 0.0
    for path in sorted((scratch / "float64").glob("*.safetensors")):
        exact, other = load_file(path), load_file(scratch / "float32" / path.name)
        for name, weight in exact.items():
            num_weights += weight.numel()
            num_differing += int((weight != other[name]).sum())
            difference, scale = (weight.float() - other[name].float()).norm(), weight.float().norm()
            relative = max(relative, (difference / scale).item())
    for dtype in ("float32", "float64"):
        shutil.rmtree(scratch / dtype)
    return {
        "share_differing": num_differing / num_weights,
        "largest_relative_frobenius": relative,
    }


def measure_kills(adapter: Path, scratch: Path, kills: int) -> dict[str, Any]:
    """Kill merges at random moments; then let one finish."""
    output, generator = scratch / "out", random.Random(0)
    started = time.perf_counter()
    subprocess.run(command(adapter, output), check=True, stderr=subprocess.DEVNULL)
    whole = time.perf_counter() - started
    shutil.rmtree(output)
    half_written = finished = 0
    moments = []
    for _ in range(kills):
        process = subprocess.Popen(command(adapter, output), stderr=subprocess.DEVNULL)
        moments.append(generator.uniform(0, whole))
        try:
            process.wait(moments[-1])
            finished += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if output.exists():
            half_written += not is_whole(output)
            shutil.rmtree(output)
    stale = len(list(scratch.glob(".out.tmp-*")))
    succeeded = subprocess.run(command(adapter, output), stderr=subprocess.DEVNULL).returncode == 0
    return {
        "kills": kills,
        "moments_seconds": moments,
        "whole_seconds": whole,
        "finished_before": finished,
        "half_written_outputs": half_written,
        "stale_folders_before_next_run": stale,
        "next_run_succeeded": succeeded and is_whole(output),
        "stale_folders_after_next_run": len(list(scratch.glob(".out.tmp-*"))),
    }


def is_whole(folder: Path) -> bool:
    """Tell whether a folder holds a complete checkpoint with its record."""
    tensors = stored_tensors(str(folder))
    if tensors is None or not (folder / "results.json").is_file():
        return False
    model = hollow_model(LlamaConfig.from_pretrained(folder), torch.bfloat16, torch.device("cpu"))
    return not StoredWeights(model, tensors, folder.name).left_over


def judge(results: dict[str, Any]) -> dict[str, Any]:
    """Hold the figures against the marks."""
    verdict: dict[str, Any] = {"marks": MARKS}
    merges = results.get("merges", {})
    if merges:
        peak = max(row["peak_rss_gb"] for row in merges.values())
        verdict["peak_rss_gb"] = {"worst": peak, "met": peak <= MARKS["peak_rss_gb"]}
    if MARKED in merges and "copy" in results:
        ratio = merges[MARKED]["wall_seconds"] / statistics.median(results["copy"]["seconds"])
        verdict["wall_to_copy"] = {"ratio": ratio, "met": ratio <= MARKS["wall_to_copy"]}
    if "kills" in results:
        kills = results["kills"]
        clean = kills["half_written_outputs"] == kills["stale_folders_after_next_run"] == 0
        verdict["kills"] = {"met": clean and kills["next_run_succeeded"]}
    return verdict


def main() -> None:
    """Measure what is asked for, and merge it into the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file; parts and merges that are not measured stay in it.")
    parser.add_argument("--parts", default="merges,error,kills")
    parser.add_argument("--merges", default=",".join(MERGES))
    parser.add_argument("--shape", default="7b", choices=SHAPES)
    parser.add_argument("--kill_shape", default="1gb", choices=SHAPES)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3, help="Of copying and merging in turns.")
    parser.add_argument("--device", default="cpu", help="Of the merges that are timed.")
    parser.add_argument("--scratch", type=Path, help="Folder for 30 GB of scratch files, on the disk to measure.")
    args = parser.parse_args()
    parts, names = args.parts.split(","), args.merges.split(",")
    results: dict[str, Any] = {}
    if args.output is not None and args.output.exists():
        results = json.loads(args.output.read_text())
    results |= environment()
    with tempfile.TemporaryDirectory(prefix="merge_cost-", dir=args.scratch) as folder:
        scratch = Path(folder)
        if "merges" in parts:
            config = SHAPES[args.shape]
            make_base(scratch / "base", config, args.device)
            results["shape"] = {"name": args.shape} | {
                key: getattr(config, key)
                for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
            }
            for rotation in dict.fromkeys(MERGES[name][0] for name in names):
                make_adapter(scratch / "base", scratch / "adapters" / rotation, rotation, args.device)
            before = results.get("merges", {})
            results |= measure_merges(
                scratch / "base", scratch / "adapters", scratch, config, names, args.device, args.repetitions
            )
            results["merges"] = before | results["merges"]
            shutil.rmtree(scratch / "base")
        if "error" in parts or "kills" in parts:
            make_base(scratch / "small", SHAPES[args.kill_shape])
        if "error" in parts:
            results["error"] = {}
            for rotation in ("none", "pca"):
                make_adapter(scratch / "small", scratch / "small-adapters" / rotation, rotation)
                results["error"][rotation] = measure_error(scratch / "small-adapters" / rotation, scratch)
            print(json.dumps({"error": results["error"]}, indent=2), flush=True)
        if "kills" in parts:
            make_adapter(scratch / "small", scratch / "small-adapter", "none")
            results["kills"] = measure_kills(scratch / "small-adapter", scratch, args.kills)
    results["machine"]["load_average"] = os.getloadavg()
    results["verdict"] = judge(results)
    print(json.dumps(results["verdict"], indent=2))
    if args.output is not None:
        write_record(args.output, results)


if __name__ == "__main__":
    main()
