"""Is evaluation on tasks as much faster than one question at a time as it should be? One run, in turns.

    python benchmarks/task_eval_speed.py --threads 2 --output benchmarks/results/task_eval_speed.json

Chunks of questions go through ours and through the baselines in turns, so that whatever else the machine does meets
both: under the letter protocol `model.generate(max_new_tokens=5)` with its cache, one question at a time, as the
paper's authors evaluate; under the likelihood protocol lm-evaluation-harness's own `HFLM` at batch size 1. Answers are
compared on the way. Tokens computed are counted for ours (padding included) and for the baselines. Beside them, without
a mark of its own: `HFLM` at batch size 16. Exits with 1 if a mark is missed or answers differ.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from pat.evaluation.tasks.adapter import BatchedLM
from pat.evaluation.tasks.harness import CPU_BATCH_SIZE
from pat.evaluation.tasks.protocols import MAX_NEW_TOKENS, first_letter, is_decided, task_config
from pat.loading import load_base, load_tokenizer
from pat.questions.rows import load_rows
from pat.questions.table import TASKS
from pat.report.records import environment, write_record

MARKS = {"letter": 2.5, "likelihood": 1.5}
"""Least speed-up over the baseline."""

STOCK_BATCH_SIZE = 16

STOCK = f"hflm_{STOCK_BATCH_SIZE}"

AGREEMENT = 1e-3
"""Largest difference of a log-likelihood."""


class Counted(HFLM):
    """The harness's own model, with a count of the tokens it computes."""

    num_tokens = 0
    """Of likelihoods; what it generates is not counted."""

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.num_tokens += inps.numel()
        return super()._model_call(inps, *args, **kwargs)


class OneByOne:
    """Generate the answer to one question after the other, with the model's own `generate`."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.num_tokens = model, tokenizer, 0

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        answers = []
        for request in requests:
            inputs = self.tokenizer(request.args[0], return_tensors="pt")
            output = self.model.generate(
                **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
            new = output[0, inputs["input_ids"].shape[1] :]
            self.num_tokens += output.shape[1] - 1
            answers.append(self.tokenizer.decode(new, skip_special_tokens=True))
        return answers


def requests_of(name: str, protocol: str, rows: list[Any]) -> list[Instance]:
    """The harness's requests for some questions."""
    task = ConfigurableTask(config=task_config(name, protocol, rows))
    task.build_all_requests()
    return list(task.instances)


def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return the wall time and the processor time of a call, in seconds, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def disagreements(protocol: str, requests: list[Instance], ours: list[Any], theirs: list[Any]) -> int:
    """How many answers differ: letters, or log-likelihoods by more than `AGREEMENT`."""
    if protocol == "likelihood":
        return sum(abs(a[0] - b[0]) > AGREEMENT for a, b in zip(ours, theirs, strict=True))
    counts = [len(request.doc["choices"]) for request in requests]
    pairs = zip(ours, theirs, counts, strict=True)
    return sum(first_letter(a, count) != first_letter(b, count) for a, b, count in pairs)


def main() -> None:
    """Measure in turns, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--model", default=str(root / ".models" / "smollm2"))
    parser.add_argument("--data_dir", type=Path, default=root.parent / "shared" / "data" / "eval" / "tasks")
    parser.add_argument("--task", default="arc_easy", choices=TASKS)
    parser.add_argument("--limit", type=int, default=500, help="Questions.")
    parser.add_argument("--protocols", nargs="+", default=list(MARKS), choices=MARKS)
    parser.add_argument("--chunk", type=int, default=100, help="Questions of a turn.")
    parser.add_argument("--batch_size", type=int, default=CPU_BATCH_SIZE, help="Of ours.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = load_base(args.model, dtype=torch.float32).eval(), load_tokenizer(args.model)
    rows = load_rows(TASKS[args.task], args.data_dir, limit=args.limit)
    ours = BatchedLM(model, tokenizer, batch_size=args.batch_size, is_decided=is_decided)
    stock: dict[str, Any] = {
        "letter": OneByOne(model, tokenizer),
        "likelihood": Counted(pretrained=model, tokenizer=tokenizer, batch_size=1),
    }
    stock_batched = Counted(pretrained=model, tokenizer=tokenizer, batch_size=STOCK_BATCH_SIZE)
    calls = {
        "letter": lambda lm, requests: lm.generate_until(requests, disable_tqdm=True),
        "likelihood": lambda lm, requests: lm.loglikelihood(requests, disable_tqdm=True),
    }
    load_before = os.getloadavg()
    warm = {protocol: requests_of(args.task, protocol, rows[:2]) for protocol in MARKS}
    for protocol, requests in warm.items():
        for lm in (ours, stock[protocol], stock_batched):
            calls[protocol](lm, requests)
    ours.batched.num_tokens = 0
    for lm in (*stock.values(), stock_batched):
        lm.num_tokens = 0

    runs: dict[str, list[dict[str, Any]]] = {protocol: [] for protocol in args.protocols}
    for number, start in enumerate(range(0, len(rows), args.chunk)):
        for protocol in runs:
            requests = requests_of(args.task, protocol, rows[start : start + args.chunk])
            before = ours.batched.num_tokens, stock[protocol].num_tokens, stock_batched.num_tokens
            order = [("ours", ours), ("baseline", stock[protocol]), (STOCK, stock_batched)]
            order = order[:: 1 if number % 2 == 0 else -1]
            seconds, cpu_seconds, answers = {}, {}, {}
            for name, lm in order:
                seconds[name], cpu_seconds[name], answers[name] = timed(
                    lambda lm=lm, p=protocol, r=requests: calls[p](lm, r)
                )
            runs[protocol].append(
                {
                    "first_question": start,
                    "seconds": seconds,
                    "cpu_seconds": cpu_seconds,
                    "speedup": seconds["baseline"] / seconds["ours"],
                    "tokens": {
                        "ours": ours.batched.num_tokens - before[0],
                        "baseline": stock[protocol].num_tokens - before[1],
                        STOCK: stock_batched.num_tokens - before[2] if protocol == "likelihood" else None,
                    },
                    "disagreements": disagreements(protocol, requests, answers["ours"], answers["baseline"]),
                    f"disagreements_{STOCK}": disagreements(protocol, requests, answers["ours"], answers[STOCK]),
                }
            )
            last = runs[protocol][-1]
            by_cpu = cpu_seconds["baseline"] / cpu_seconds["ours"]
            print(
                f"{start:>5} {protocol:<11} ours {seconds['ours']:6.2f} s, baseline {seconds['baseline']:6.2f} s, "
                f"{STOCK} {seconds[STOCK]:6.2f} s: "
                f"{last['speedup']:.2f}x ({by_cpu:.2f}x by CPU time); tokens {last['tokens']}; "
                f"{last['disagreements']} answers differ",
                flush=True,
            )

    verdicts = {}
    for protocol in runs:
        mark = MARKS[protocol]
        totals, cpu, tokens = (
            {name: sum(run[figure][name] or 0 for run in runs[protocol]) for name in ("ours", "baseline", STOCK)}
            for figure in ("seconds", "cpu_seconds", "tokens")
        )
        tokens[STOCK] = tokens[STOCK] or None
        speedup, over_stock = (totals[name] / totals["ours"] for name in ("baseline", STOCK))
        verdicts[protocol] = {
            "mark": mark,
            "speedup": speedup,
            f"speedup_over_{STOCK}": over_stock,
            "median_speedup_of_turns": median(run["speedup"] for run in runs[protocol]),
            "speedup_by_cpu_time": cpu["baseline"] / cpu["ours"],
            "seconds": totals,
            "cpu_seconds": cpu,
            "tokens": tokens,
            "tokens_saved": tokens["baseline"] / tokens["ours"],
            "disagreements": sum(run["disagreements"] for run in runs[protocol]),
            f"disagreements_{STOCK}": sum(run[f"disagreements_{STOCK}"] for run in runs[protocol]),
            "met": speedup >= mark,
        }
        print(
            f"{protocol}: {speedup:.2f}x (mark {mark}): {'met' if speedup >= mark else 'NOT MET'}; "
            f"{over_stock:.2f}x over HFLM at batch size {STOCK_BATCH_SIZE}; "
            f"{verdicts[protocol]['disagreements']} answers differ"
        )
    if args.output is not None:
        facts = environment()
        facts["machine"] |= {"load_average_before": load_before, "load_average_after": os.getloadavg()}
        settings = {"model": Path(args.model).name, "task": args.task, "num_questions": len(rows)}
        settings |= {"chunk": args.chunk, "batch_size": args.batch_size, "dtype": "float32"}
        write_record(args.output, {**facts, "settings": settings, "marks": verdicts, "turns": runs})
    if not all(verdict["met"] and not verdict["disagreements"] for verdict in verdicts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
