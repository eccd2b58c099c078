"""Run all cells of a comparison in worker processes; what is done is never done again."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

from compare.cells import Cell, done_cells, num_cells, num_open, ready_cells, tuned_cell
from compare.config import CompareConfig
from compare.methods import METHODS, TUNED
from compare.prepare import prepare
from compare.results import FILE, append_row, read_current_rows, row_identity
from pat.checkpoint.staging import lock_folder
from pat.errors import PatError, RunFailed

SIZES_TO_TIME = (576, 1536)
"""Channels of the model and of its MLPs (SmolLM2's) with which the number of threads is chosen."""


def run_cells(config: CompareConfig) -> list[dict[str, Any]]:
    """Run what is not done yet, and return all rows.

    Raises:
        PatError: models, data or baselines cannot be used, or the output folder is another comparison's.
        RunFailed: cells failed; the others are done.
    """
    with _folder_of_ones_own(config.output_dir):
        return _run_cells(config)


def _run_cells(config: CompareConfig) -> list[dict[str, Any]]:
    rows = read_current_rows(config)
    try:
        inputs = prepare(config, rows)
    except PatError:
        if not rows:  # what nothing was made from yet can be made again
            shutil.rmtree(config.output_dir / "data", ignore_errors=True)
        raise
    done = _without_lost_models(config, done_cells(rows))
    total, failed = num_cells(config), dict[Cell, str]()
    started, num_before = time.perf_counter(), total - num_open(config, done)
    running: dict[Future[dict[str, Any]], Cell] = {}
    threads = config.threads or default_threads(config.workers)
    pool = _make_pool(config.workers, threads)
    try:
        while True:
            waiting = [c for c in ready_cells(config, done) if c not in failed and c not in running.values()]
            for cell in waiting[: config.workers - len(running)]:
                running[pool.submit(_run, config, cell, _tuned_model(config, cell, done))] = cell
            if not running:
                break
            is_broken = False
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    is_broken, row = True, _lost_row(config, cell)
                else:
                    row = future.result()
                row |= {"inputs": inputs[cell.model]}
                append_row(config, row)
                if "failed" in row:
                    failed[cell] = row["failed"]
                else:
                    done[cell] = row
                    rows.append(row)
                    (config.output_dir / "failed" / f"{cell.name}.txt").unlink(missing_ok=True)
                _report(cell, row, total - num_open(config, done), total, started, num_before)
            if is_broken:  # all that ran in it is lost, but not what is still to be run
                for cell in running.values():
                    failed[cell] = _lost_row(config, cell)["failed"]
                running.clear()
                pool.shutdown()
                pool = _make_pool(config.workers, threads)
    except KeyboardInterrupt:
        for process in active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        cell, reason = next(iter(failed.items()))
        raise RunFailed(f"Failed cells: {len(failed)}, such as {cell.describe()}: {reason}")
    shutil.rmtree(config.output_dir / "tuned", ignore_errors=True)
    shutil.rmtree(config.output_dir / "work", ignore_errors=True)
    return rows


def default_threads(workers: int) -> int:
    """Return the CPU threads of each worker: what OMP_NUM_THREADS says, else its share of the cores.

    A worker that is alone takes fewer threads than there are cores where `pat tune` would (`measure_threads`).
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    share = max(1, (os.cpu_count() or 1) // workers)
    if workers > 1 or share == 1:
        return share
    import torch

    from pat.training.preflight.threads import measure_threads

    threads = None if torch.accelerator.is_available() else measure_threads(*SIZES_TO_TIME)
    return share if threads is None or threads.number == threads.default else threads.number


def _make_pool(workers: int, threads: int) -> ProcessPoolExecutor:
    context = get_context("spawn")  # torch's threads do not survive a fork
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(threads,))


def _lost_row(config: CompareConfig, cell: Cell) -> dict[str, Any]:
    """Return the row of a cell whose process, or one beside it, was killed; the next start tries it again."""
    reason = "a worker process died, most likely for want of memory; start again with fewer --workers"
    return {"cell": cell.to_dict(), "identity": row_identity(config, cell), "failed": reason}


@contextmanager
def _folder_of_ones_own(folder: Path) -> Iterator[None]:
    """Keep other comparisons out of a folder: two that run the same cells would write into each other's models."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    results = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PatError(f"{folder}: cannot be created ({error.strerror}); choose another --output_dir.") from error
    try:
        lock = lock_folder(folder)
    except BlockingIOError as error:
        raise PatError(
            f"{folder}: another comparison is running there; wait for it, or choose another --output_dir."
        ) from error
    try:
        if any(folder.iterdir()) and not results.is_file():
            raise PatError(f"{folder}: holds files, but no comparison; give an --output_dir that is new or empty.")
        results.touch()  # marks the folder as ours, whose subfolders are removed when they have served
        yield
    finally:
        if results.is_file() and results.stat().st_size == 0 and len(list(folder.iterdir())) == 1:
            results.unlink()
        if lock is not None:
            os.close(lock)
        for path in made:  # wrong input leaves nothing behind
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _tuned_model(config: CompareConfig, cell: Cell, done: dict[Cell, dict[str, Any]]) -> Path | None:
    """Return where LoRA's tuned model goes, or lies, for a cell that makes one, prunes it or learns from it."""
    source: Cell | None = None
    if cell.method == TUNED and not cell.search and any(METHODS[n].needs_tuned for n in config.all_methods):
        source = cell
    elif METHODS[cell.method].needs_tuned:
        source = tuned_cell(config, cell, done)
    return None if source is None else config.output_dir / "tuned" / source.name


def _without_lost_models(config: CompareConfig, done: dict[Cell, dict[str, Any]]) -> dict[Cell, dict[str, Any]]:
    """Leave out LoRA's cells whose model is gone but still needed: a finished comparison keeps no models."""
    lost = set()
    for cell in ready_cells(config, done):
        if METHODS[cell.method].needs_tuned:
            path, source = _tuned_model(config, cell, done), tuned_cell(config, cell, done)
            if source is not None and path is not None and not path.is_dir() and "diverged" not in done[source]:
                lost.add(source)
    return {cell: row for cell, row in done.items() if cell not in lost}


def _start(threads: int) -> None:
    """Prepare a worker: its threads, and silence, because what several of them print at once nobody can read."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Trainers print their losses, and runs what they have understood; standard output is the table's alone.
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  as long as the process lives
    logging.disable(logging.WARNING)  # what there is to warn of, the parent has said
    torch.set_num_threads(threads)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def _end_with_parent() -> None:
    """Do not outlive a parent that was killed: its successor may run the same cell in the same folder."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(config: CompareConfig, cell: Cell, tuned: Path | None) -> dict[str, Any]:
    import torch

    from compare.run_cell import failed_row, run_cell

    try:
        return run_cell(config, cell, tuned)
    except Exception as error:  # one cell's failure is a row of its own, not the end of a night's work
        return dict(failed_row(config, cell, error))
    finally:
        gc.collect()  # trainers hold themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _report(cell: Cell, row: dict[str, Any], num_done: int, total: int, started: float, num_before: int) -> None:
    if "failed" in row:
        outcome = f"failed: {row['failed']}"
    else:
        nll = row.get("validation_nll", row.get("held_out_nll"))
        outcome = f"{'diverged' if nll is None else f'NLL {nll:.3f}'}, {row['seconds']:.0f} s"
    spent = time.perf_counter() - started
    left = spent / max(1, num_done - num_before) * (total - num_done)
    print(f"[{num_done}/{total}, {left / 60:.0f} min to go] {cell.describe()}: {outcome}", file=sys.stderr, flush=True)
