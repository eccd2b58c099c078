r"""Does every answer agree with a plain loop: one question at a time, no batch, no cache?

    pat evaluate --model .models/smollm2 --tasks paper --data_dir ../shared/data/eval/tasks --limit 200 \
        --log_samples --output_dir runs/smollm2
    PYTHONPATH=tests python benchmarks/task_eval_agreement.py --run runs/smollm2 --limit 200 \
        --output benchmarks/results/task_eval_agreement.json

The plain loop is the one of the tests (`tests/plain_answers.py`), in the dtype of the checkpoint. Its answers are
kept in the run's folder: started again, it goes on where it stopped, and `--questions` may be more then. Questions
whose two best choices (or tokens) lie within 1e-3 are listed.
Exits with 1 if answers disagree that do not lie so close, or log-likelihoods differ by more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from plain_answers import best, plain_letter, plain_likelihoods
from tqdm import tqdm

from pat.evaluation.tasks.fingerprints import fingerprint_model, fingerprint_rows
from pat.evaluation.tasks.protocols import PROTOCOLS, fingerprint_wording
from pat.loading import load_base, load_tokenizer
from pat.questions.hub import LETTERS
from pat.questions.rows import load_rows
from pat.questions.table import resolve_tasks
from pat.report.records import environment, write_record

ROOT = Path(__file__).resolve().parents[1]

NEAR_TIE = 1e-3
"""Closer than this, the order of float32 sums may decide."""


def plain_answer(model: Any, tokenizer: Any, protocol: str, row: Any, max_positions: int) -> dict[str, Any]:
    """The answer of the plain loop, and how far its best is ahead of the second best."""
    if protocol == "letter":
        answer = plain_letter(model, tokenizer, row, max_positions)
        return {"prediction": answer.letter, "text": answer.text, "gap": answer.gap}
    values = plain_likelihoods(model, tokenizer, row, max_positions)
    index, gap = best(values)
    return {"prediction": LETTERS[index], "log_likelihoods": values, "gap": gap}


def per_character(answer: dict[str, Any], choices: list[str]) -> tuple[int, float]:
    """The choice of `acc_norm`, and how far it is ahead."""
    pairs = zip(answer["log_likelihoods"], choices, strict=True)
    return best([value / len(choice) for value, choice in pairs])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; one that was cut off while being written does not count."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def compare(sample: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Whether two answers to a question agree, whether it is a near tie, and the largest difference."""
    agrees, near_tie = sample["prediction"] == plain["prediction"], plain["gap"] < NEAR_TIE
    entry = {"agrees": agrees, "near_tie": near_tie, "unexplained": not agrees and not near_tie, "gap": plain["gap"]}
    if "log_likelihoods" not in plain:
        return entry | {"largest_difference": 0.0}
    difference = max(abs(a - b) for a, b in zip(sample["log_likelihoods"], plain["log_likelihoods"], strict=True))
    choices = sample["choices"]
    (ours, _), (theirs, gap) = per_character(sample, choices), per_character(plain, choices)
    near_tie_norm = gap * min(map(len, choices)) < NEAR_TIE  # in nats of the whole choice, like `near_tie`
    return entry | {
        "largest_difference": difference,
        "agrees_norm": ours == theirs,
        "near_tie_norm": near_tie_norm,
        "gap_norm": gap,
        "unexplained": entry["unexplained"] or (ours != theirs and not near_tie_norm) or difference > NEAR_TIE,
    }


def main() -> None:
    """Answer plainly, compare, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / ".models" / "smollm2"))
    parser.add_argument("--data_dir", type=Path, default=ROOT.parent / "shared" / "data" / "eval" / "tasks")
    parser.add_argument("--run", type=Path, required=True, help="--output_dir of `pat evaluate --log_samples`.")
    parser.add_argument("--tasks", default="paper")
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    parser.add_argument("--limit", type=int, default=200, help="As in the run.")
    parser.add_argument(
        "--questions", type=int, help="How many of them to answer plainly, drawn at random; default all."
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    if args.questions is not None and args.questions < 1:
        parser.error(f"--questions is {args.questions}; expected 1 or more")
    torch.set_num_threads(args.threads)
    model, tokenizer = load_base(args.model).eval(), load_tokenizer(args.model)
    fingerprint = fingerprint_model(model)
    max_positions = model.config.get_text_config().max_position_embeddings
    figures, listed = {}, []
    for task in resolve_tasks(args.tasks):
        rows = load_rows(task, args.data_dir, limit=args.limit)
        for protocol in args.protocols:
            name = f"{task.name}.{protocol}"
            score = json.loads((args.run / "scores" / f"{name}.json").read_text(encoding="utf-8"))
            if score["settings"]["model"] != fingerprint:
                raise SystemExit(f"{args.run}: holds answers of another model than {args.model}")
            if score["settings"]["wording"] != fingerprint_wording():
                raise SystemExit(f"{args.run}: {name} was asked in another wording; evaluate again")
            if score["settings"]["questions"] != fingerprint_rows(rows):
                raise SystemExit(f"{args.run}: {name} holds answers to other questions than --limit {args.limit} takes")
            samples = read_lines(args.run / "samples" / f"{name}.jsonl")
            if len(samples) != len(rows):
                raise SystemExit(f"{args.run}: {name} has {len(samples)} answers to {len(rows)} questions")
            # Answers belong to questions and to how they are asked: others have another file.
            asked = (score["settings"]["questions"] + fingerprint_wording()[protocol]).encode()
            file = args.run / "plain" / f"{name}.{hashlib.sha256(asked).hexdigest()[:12]}.jsonl"
            drawn = random.Random(0).sample(range(len(rows)), len(rows))[: args.questions]
            plain = {answer.pop("question", line): answer for line, answer in enumerate(read_lines(file))}
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"question": number} | answer) + "\n" for number, answer in plain.items()]
            file.write_text("".join(lines), encoding="utf-8")  # without a line that was cut off
            with file.open("a", encoding="utf-8") as out:
                for number in tqdm([n for n in drawn if n not in plain], desc=name, disable=None):
                    plain[number] = plain_answer(model, tokenizer, protocol, rows[number], max_positions)
                    out.write(json.dumps({"question": number} | plain[number]) + "\n")
                    out.flush()
            compared = {number: compare(samples[number], plain[number]) for number in sorted(drawn)}
            listed += [
                {"task": task.name, "protocol": protocol, "question": number} | entry
                for number, entry in compared.items()
                if entry["near_tie"] or entry.get("near_tie_norm") or not entry["agrees"] or entry["unexplained"]
            ]
            entries = list(compared.values())
            figures[name] = {
                "questions": len(entries),
                "agree": sum(entry["agrees"] for entry in entries),
                "agree_norm": sum(entry["agrees_norm"] for entry in entries) if protocol == "likelihood" else None,
                "near_ties": sum(entry["near_tie"] for entry in entries),
                "unexplained": sum(entry["unexplained"] for entry in entries),
                "largest_difference": max((entry["largest_difference"] for entry in entries), default=0.0),
            }
            print(f"{name}: {figures[name]}", flush=True)
    total = {key: sum(entry[key] for entry in figures.values()) for key in ("questions", "agree", "unexplained")}
    print(f"in all: {total}; near ties and disagreements: {len(listed)}")
    if args.output is not None:
        settings = {"model": Path(args.model).name, "limit": args.limit, "drawn": args.questions, "near_tie": NEAR_TIE}
        write_record(
            args.output,
            {**environment(), "settings": settings, "total": total, "by_task": figures, "listed": listed},
        )
    if total["unexplained"] or not total["questions"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
