"""A script of one's own, with a stock trainer and PatCallback, in two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def test_the_example_trains_in_two_processes(stories260k_path: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = ({"prompt": f"one {number}", "completion": f" two {number % 7}"} for number in range(24))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(stories260k_path), str(data), str(tmp_path / "out")]
    more = [
        "max_steps=3",
        "use_cpu=true",
        "bf16=false",
        "gradient_checkpointing=false",
        "disable_tqdm=true",
        "save_strategy=no",
    ]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"),
            *(str(ROOT / "examples" / "own_trainer.py"), *arguments, *more),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    progress = next(value for name, value in adapter.items() if name.endswith("mlp.pat_gate.gates.progress"))
    assert progress.tolist()[2] == 1  # hard since the first of three steps
    kept = [value for name, value in adapter.items() if name.endswith("gates.keep")]
    assert kept and all(0 < int(value.sum()) < len(value) for value in kept)
    assert all(value.isfinite().all() for value in adapter.values() if value.dtype == torch.float32)
