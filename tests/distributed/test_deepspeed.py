"""DeepSpeed on CPUs, where it is installed: ZeRO-2 is the same run as one process, and as DDP; ZeRO-3 is refused.

Its first start builds an extension, which takes a minute or two.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from many_ranks import check_same, free_port, run_flags
from safetensors.torch import load_file

from pat.cli import main

pytestmark = pytest.mark.slow

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install deepspeed)")

ROOT = Path(__file__).parents[2]

ZERO_2, ZERO_3, DDP = "zero2", "zero3", "cpu"

WEIGHT = 1e-3
"""Largest difference of a written weight. Rounding of the calibration is scaled up in the refit of what fills in for
channels: 5e-5 between one process and two."""

MASK = 1e-6
"""Largest difference of a trained number between ZeRO-2 and DDP, which average the same gradients: 1e-8 was measured.
The regularisers move the mask by 3e-4."""

TIMEOUT = 900


def environment() -> dict[str, str]:
    """Return the environment of a launcher: PAT from this checkout, DeepSpeed on the CPU."""
    return os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }


def launcher(config: str, num_processes: int) -> list[str]:
    """Return flags of accelerate's launcher for one of the configurations that are shipped, put on the CPU."""
    text = (ROOT / "configs" / "accelerate" / f"{config.replace('zero3', 'zero2')}.yaml").read_text(encoding="utf-8")
    for old, new in (("use_cpu: false", "use_cpu: true"), ("zero_stage: 2", f"zero_stage: {config[-1]}")):
        text = text.replace(old, new)
    path = Path(tempfile.mkdtemp()) / f"{config}.yaml"
    path.write_text(text, encoding="utf-8")
    port = str(free_port())
    return ["--config_file", str(path), "--num_processes", str(num_processes), "--main_process_port", port]


def start(argv: list[str], num_processes: int = 2, config: str = ZERO_2) -> subprocess.Popen[str]:
    """Start `pat launch`."""
    return subprocess.Popen(
        [sys.executable, "-m", "pat", "launch", *launcher(config, num_processes), *argv],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(argv: list[str], num_processes: int = 2, config: str = ZERO_2) -> tuple[int, str]:
    """Run it to its end; return its status and what was printed on stderr."""
    process = start(argv, num_processes, config)
    _, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, err


def check_same_model(out: Path, reference: Path) -> None:
    """Check that a run has taken the steps of another one, kept the same channels and written the same model."""
    check_same(out, reference)
    written, wanted = (load_file(folder / "model" / "model.safetensors") for folder in (out, reference))
    assert written.keys() == wanted.keys()
    assert max(float((written[name] - wanted[name]).abs().max()) for name in wanted) <= WEIGHT


@pytest.fixture(scope="module")
def alone(stories260k_path: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with batches of eight rows, without DeepSpeed."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(run_flags(stories260k_path, rows, out, 8)) == 0
    return out


def test_zero_2_is_one_run_and_goes_on_after_a_kill_in_as_many_processes_alone(
    alone: Path, stories260k_path: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = [*run_flags(stories260k_path, rows, out, 4), "--save_steps", "1"]
    argv[argv.index("--save_strategy") + 1] = "steps"
    process = start(argv)
    checkpoints = out / "checkpoints" / "compact"
    while not (checkpoints / "checkpoint-3" / "trainer_state.json").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    ranks = [child for child in map(int, children) if b"\0RANK=" in Path(f"/proc/{child}/environ").read_bytes()]
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    process.communicate(timeout=TIMEOUT)
    assert not (out / "results.json").exists() and (checkpoints / "checkpoint-2" / "global_step2").is_dir()
    shutil.copytree(out, tmp_path / "torn")

    # Another engine, and another number of processes, are refused before anything is touched.
    for num_processes, config, words in ((2, DDP, "got another engine"), (1, ZERO_2, "got 1 processes")):
        status, err = run(argv, num_processes, config)
        assert status == 2 and words in err and "in a part for each of 2 processes" in err, err

    status, err = run(argv)
    assert status == 0 and "going on from checkpoints/compact/checkpoint-" in err, err
    check_same_model(out, alone)

    # A part that is cut off is found, and the checkpoint before it is gone on from.
    torn = tmp_path / "torn" / "checkpoints" / "compact"
    shutil.rmtree(torn / "checkpoint-3")
    (part,) = torn.glob("checkpoint-2/global_step2/*zero_pp_rank_1_*")
    part.write_bytes(part.read_bytes()[:-100])
    status, err = run([str(tmp_path / "torn") if word == str(out) else word for word in argv])
    assert (
        status == 0 and "checkpoint-2 is passed over" in err and "going on from checkpoints/compact/checkpoint-1" in err
    )
    check_same_model(tmp_path / "torn", alone)


def test_a_step_whose_gradients_are_not_finite_ends_the_run(stories260k_path: Path, rows: Path, tmp_path: Path) -> None:
    status, err = run([*run_flags(stories260k_path, rows, tmp_path / "out", 4), "--learning_rate", "1e30"])
    assert status == 1 and "became non-finite at step 1" in err, err
    adapter = load_file(tmp_path / "out" / "checkpoints" / "compact" / "last-finite" / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in adapter.values())


def script(config: str, *argv: object) -> subprocess.CompletedProcess[str]:
    """Run the script with the soft mask."""
    words = [str(ROOT / "tests" / "distributed" / "soft_mask.py"), *map(str, argv)]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launcher(config, 2), *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def test_a_script_of_ones_own_trains_the_same_mask_as_with_ddp(
    stories260k_path: Path, rows: Path, tmp_path: Path
) -> None:
    adapters = []
    for config, engine in ((DDP, "MULTI_CPU"), (ZERO_2, "DEEPSPEED")):
        done = script(config, stories260k_path, rows, tmp_path / config)
        assert done.returncode == 0 and f"2 processes of DistributedType.{engine}" in done.stdout, done.stderr
        adapters.append(load_file(tmp_path / config / "adapter" / "adapter_model.safetensors"))
    expected, found = adapters
    assert found.keys() == expected.keys() and any(name.endswith("pat_mask.masks.weight") for name in found)
    assert max(float((found[n].float() - expected[n].float()).abs().max()) for n in found if found[n].numel()) <= MASK
    merged = ["merge", "--adapter", tmp_path / "zero2" / "adapter", "--output_dir", tmp_path / "model"]
    assert main([*map(str, merged), "--base_model", str(stories260k_path)]) == 0

    for config, more, words in (
        (ZERO_2, ["--bf16"], "Got a mask in bfloat16"),
        (ZERO_3, [], "Got DeepSpeed's ZeRO-3"),
    ):
        done = script(config, stories260k_path, rows, tmp_path / "refused", *more)
        assert done.returncode != 0 and words in done.stderr, done.stderr


def test_zero_3_is_refused_in_one_line(stories260k_path: Path, rows: Path, tmp_path: Path) -> None:
    status, err = run(run_flags(stories260k_path, rows, tmp_path / "out", 4), config=ZERO_3)
    (line,) = (line for line in err.splitlines() if line.startswith("pat: "))
    assert status == 2 and "Got DeepSpeed's ZeRO-3" in line
    assert not (tmp_path / "out").exists()
