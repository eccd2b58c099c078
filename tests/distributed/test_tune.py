"""`pat tune` in several processes: the same run as in one, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from many_ranks import check_same, free_port, run_flags

from pat.cli import main

HERE = Path(__file__).parent

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` says to its processes."""

TIMEOUT = 600


def flags(base: Path, data: Path, out: Path, batch_size: int, **more: Any) -> list[str]:
    """Return the arguments of a short run of both stages of the default recipe."""
    both = {"milestone": 0.5, "axes": "mlp,hidden", "calibration_tokens": 256}
    return run_flags(base, data, out, batch_size, **both | more)


def start(argv: list[str], num_processes: int, *, fsdp: bool = False) -> subprocess.Popen[str]:
    """Start a run in several processes, as torchrun does."""
    source = str(HERE.parents[1] / "src")
    # accelerate writes into the environment of a process that has had arguments for FSDP, as other tests have.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    environment = clean | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = (sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_processes}")
    program = [str(HERE / "fsdp_on_cpu.py")] if fsdp else ["--module", "pat"]
    return subprocess.Popen(
        [*launcher, f"--master-port={free_port()}", *program, *argv],
        env=environment | (FSDP2 if fsdp else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(argv: list[str], num_processes: int, *, fsdp: bool = False) -> tuple[int, str]:
    """Run it to its end; return the launcher's status and what was printed on stderr."""
    process = start(argv, num_processes, fsdp=fsdp)
    _, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, err


@pytest.fixture(scope="module")
def alone(stories260k_path: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with batches of eight rows."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(flags(stories260k_path, rows, out, 8)) == 0
    return out


@pytest.mark.parametrize(
    ("num_processes", "fsdp"),
    [
        (2, False),
        (2, True),
        pytest.param(4, False, marks=pytest.mark.slow),
        pytest.param(4, True, marks=pytest.mark.slow),
    ],
)
def test_several_processes_are_one_with_their_batches_together(
    num_processes: int, fsdp: bool, alone: Path, stories260k_path: Path, rows: Path, tmp_path: Path
) -> None:
    argv = flags(stories260k_path, rows, tmp_path / "out", 8 // num_processes)
    status, err = run(argv, num_processes, fsdp=fsdp)
    assert status == 0, err
    check_same(tmp_path / "out", alone)
    assert err.count("Data: ") == 1  # the first process alone speaks
    assert not list((tmp_path / "out").glob(".*"))


def test_a_stream_is_divided_like_rows(stories260k_path: Path, rows: Path, tmp_path: Path) -> None:
    """Fifty-two rows of eighty-eight; each process reads all, and trains on its own."""
    reference = flags(stories260k_path, rows, tmp_path / "alone", 8, streaming="true")
    assert main(reference) == 0
    status, err = run(flags(stories260k_path, rows, tmp_path / "out", 4, streaming="true"), 2)
    assert status == 0, err
    check_same(tmp_path / "out", tmp_path / "alone")
    found = [json.loads((out / "results.json").read_text())["data"] for out in (tmp_path / "out", tmp_path / "alone")]
    assert found[0] == found[1]


def test_a_wrong_input_ends_all_processes_with_one_line(rows: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    status, err = run(flags(tmp_path / "nowhere", rows, tmp_path / "out", 4), 2)
    assert status != 0 and time.monotonic() - began < TIMEOUT / 2
    (line,) = (line for line in err.splitlines() if line.startswith("pat: "))
    assert "nowhere" in line and "no such folder" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_run_whose_process_was_killed_goes_on_with_another_number_of_processes(
    fsdp: bool, alone: Path, stories260k_path: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    more = {"save_strategy": "steps", "save_steps": 1}
    process = start(flags(stories260k_path, rows, out, 4, **more), 2, fsdp=fsdp)
    while not (out / "checkpoints" / "checkpoint-2" / "trainer_state.json").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0 and "SIGKILL" in err
    assert not (out / "results.json").exists()
    # A checkpoint of two processes is gone on from by four, by one, and by another engine.
    assert run(flags(stories260k_path, rows, out, 2, **more), 4, fsdp=not fsdp)[0] == 0
    check_same(out, alone)


def rank_of(launcher: int, rank: int) -> int:
    """Return the process id of one rank of a launcher."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="utf-8").split()
    for child in map(int, children):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise AssertionError(f"no rank {rank} among {children}")
