"""Do the tests of `method/` and `surgery/` notice a fault? Mutants drawn at random, each against the fast tests.

The mutations are cosmic-ray's operators, applied by its own `mutate_code`. Its runner and mutmut's start a new
interpreter for every mutant, and importing torch, transformers and peft takes seven seconds, more than most mutants
live. Here one process imports them once and forks for every mutant; the child compiles the mutated source in place of
the module before anything imports `pat`, and runs the tests in it, those of the module's own file first. The first
failure kills.

A mutant that differs from the source in annotations, docstrings and the like alone is none, and neither is one that
another operator has made already. Timeouts count as killed. Mutants that survive are listed, to be judged by a person.

    python benchmarks/mutation.py                    # 300 mutants, about 12 minutes on one core
    python benchmarks/mutation.py --num_mutants 20   # a look
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HYPOTHESIS_PROFILE": "unshrunk"}

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

REPO = Path(__file__).resolve().parents[1]
SOURCE, TESTS = REPO / "src", REPO / "tests"
FOLDERS = ("method", "surgery")

FAST_TESTS = (
    "unit/method",
    "unit/surgery",
    "unit/tuner/test_layer.py",
    "unit/tuner/test_config.py",
)
"""What every mutant is tried on, after the test file that mirrors its module."""

TIMEOUT = 120.0
"""Seconds after which a mutant counts as killed: an endless loop, or many times slower."""


@dataclass(frozen=True)
class Mutant:
    """One change to one module."""

    path: str
    """Path of the module, relative to `src`."""
    operator: str
    occurrence: int
    source: str
    """Source text of the whole mutated module."""

    @property
    def module(self) -> str:
        """Name of the module."""
        return self.path.removesuffix(".py").replace("/", ".")

    def diff(self) -> list[str]:
        """Return the lines taken away and put in their place."""
        before = (SOURCE / self.path).read_text(encoding="utf-8").splitlines()
        lines = difflib.unified_diff(before, self.source.splitlines(), n=0, lineterm="")
        return [line for line in lines if not line.startswith(("---", "+++"))]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    path: str
    operator: str
    diff: list[str]
    killed: bool
    by: str
    """The first test that failed; `timeout`, or `import` if the tests could not even start."""
    seconds: float


def main() -> None:
    """Draw mutants, run the tests on each, and write the score with the survivors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--num_mutants", type=int, default=300, help="How many mutants to draw.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draw.")
    parser.add_argument("--workers", type=int, default=2, help="How many run at a time.")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "results" / "mutation.json")
    parser.add_argument("--only", default="", help="Draw from the modules whose path contains this.")
    args = parser.parse_args()
    started = time.perf_counter()
    mutants, num_possible = draw(args.num_mutants, args.seed, args.only)
    preload()
    outcomes: list[Outcome] = []
    for outcome in run_all([None, *mutants], args.workers):
        if outcome is None:
            continue
        outcomes.append(outcome)
        verdict = f"killed by {outcome.by}" if outcome.killed else "SURVIVED"
        print(f"{len(outcomes):4} {outcome.path} {' '.join(outcome.diff)[:100]} {verdict}", flush=True)
    record = summary(outcomes, args.seed, num_possible) | {"seconds": round(time.perf_counter() - started)}
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{record['num_killed']} of {record['num_mutants']} killed ({record['score']:.1%}); see {args.output}")


def summary(outcomes: Sequence[Outcome], seed: int, num_possible: int) -> dict[str, Any]:
    """Return the record of a run."""
    survivors = [outcome for outcome in outcomes if not outcome.killed]
    total, survived = (Counter(outcome.path for outcome in group) for group in (outcomes, survivors))
    return {
        "seed": seed,
        "num_possible_draws": num_possible,
        "num_mutants": len(outcomes),
        "num_killed": len(outcomes) - len(survivors),
        "score": 1 - len(survivors) / len(outcomes),
        "num_timeouts": sum(outcome.by == "timeout" for outcome in outcomes),
        "by_module": {path: {"mutants": total[path], "survivors": survived[path]} for path in sorted(total)},
        "survivors": [asdict(outcome) for outcome in sorted(survivors, key=lambda outcome: outcome.path)],
    }


# -- drawing -----------------------------------------------------------------------------------------------------------


def draw(num: int, seed: int, only: str = "") -> tuple[list[Mutant], int]:
    """Draw mutants that differ from the source and from each other; also return from how many places."""
    places = [place for place in _places() if only in place[0]]
    random.Random(seed).shuffle(places)
    sources = {path: (SOURCE / path).read_text(encoding="utf-8") for path in {path for path, _, _ in places}}
    seen = {_meaning(source) for source in sources.values()}
    mutants: list[Mutant] = []
    for path, name, occurrence in places:
        if len(mutants) == num:
            break
        mutated = mutate_code(sources[path], get_operator(name)(), occurrence)
        meaning = None if mutated is None else _meaning(mutated)
        if mutated is not None and meaning is not None and meaning not in seen:
            seen.add(meaning)
            mutants.append(Mutant(path, name.rpartition("/")[2], occurrence, mutated))
    return mutants, len(places)


def _places() -> list[tuple[str, str, int]]:
    """List (module, operator, occurrence) of everything the operators could change."""
    names = sorted(name for name in operator_names() if not get_operator(name).arguments())
    operators = {name: get_operator(name)() for name in names}
    places = []
    for file in sorted(file for folder in FOLDERS for file in (SOURCE / "pat" / folder).glob("*.py")):
        nodes = list(ast_nodes(get_ast(file.read_text(encoding="utf-8"))))
        for name, operator in operators.items():
            count = sum(len(list(operator.mutation_positions(node))) for node in nodes)
            places += [(str(file.relative_to(SOURCE)), name, occurrence) for occurrence in range(count)]
    return places


class _WithoutWords(ast.NodeTransformer):
    """Takes out of a syntax tree what no test can see: annotations, bare strings, which arguments need their name."""

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        self.generic_visit(node)
        node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
        node.defaults = [default for default in (*node.defaults, *node.kw_defaults) if default is not None]
        node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        self.generic_visit(node)
        node.annotation = ast.Constant(None)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        self.generic_visit(node)
        return None if isinstance(node.value, ast.Constant) else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.returns = None
        return node


def _meaning(source: str) -> str | None:
    """Return what tells two sources apart; None if it is no Python."""
    try:
        return ast.dump(_WithoutWords().visit(ast.parse(source)))
    except SyntaxError:
        return None


# -- running -----------------------------------------------------------------------------------------------------------


def preload() -> None:
    """Import once what takes seconds, and forget again what is imported of `pat` on the way."""
    sys.path[:0] = [str(SOURCE), str(TESTS)]
    import hypothesis.stateful
    import mpmath
    import peft  # before anything of `pat`, which would else wait for it
    import pytest
    import tiny_models
    import torch
    import torch._dynamo.testing
    import trl

    assert all(library.__name__ for library in (hypothesis, mpmath, peft, pytest, trl))
    torch.set_num_threads(1)
    for family in tiny_models.FAMILIES:  # their classes are imported when first used
        tiny_models.build(family, tied=True)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("pat", "tiny_models")]:
        del sys.modules[name]


def run_all(mutants: Sequence[Mutant | None], workers: int) -> Iterator[Outcome | None]:
    """Run the tests on every mutant, some at a time; None stands for the source as it is, which must pass."""
    waiting, running = list(mutants), dict[int, tuple[Mutant | None, Path, float]]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < workers:
                mutant = waiting.pop(0)
                log = Path(folder) / f"{len(waiting)}.log"
                running[_fork(mutant, log)] = (mutant, log, time.perf_counter())
            time.sleep(0.02)
            for pid, (mutant, log, since) in list(running.items()):
                seconds = time.perf_counter() - since
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done and seconds < TIMEOUT:
                    continue
                if not done:
                    os.kill(pid, signal.SIGKILL)
                    _, status = os.waitpid(pid, 0)
                del running[pid]
                code = os.waitstatus_to_exitcode(status)
                text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
                if mutant is None:
                    if code != 0:
                        sys.exit(f"The tests fail without any mutation:\n{text[-3000:]}")
                    print(f"The fast tests take {seconds:.1f} s on the source as it is.", flush=True)
                    yield None
                    continue
                by = "timeout" if not done else _first_failure(text)
                yield Outcome(mutant.path, mutant.operator, mutant.diff(), code != 0, by, round(seconds, 1))


def _fork(mutant: Mutant | None, log: Path) -> int:
    if (pid := os.fork()) != 0:
        return pid
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if mutant is not None:
            sys.meta_path.insert(0, _Finder(mutant))
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", "--no-header", f"--rootdir={REPO}"]
        code = int(pytest.main([*options, *_tests_of(mutant)]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def _tests_of(mutant: Mutant | None) -> list[str]:
    """List test files, the one that mirrors the module first; each once, or pytest would go by folders."""
    files = [file for name in FAST_TESTS for file in _files(TESTS / name)]
    if mutant is not None:
        folder, stem = Path(mutant.path).parts[-2], Path(mutant.path).stem
        own = TESTS / "unit" / folder / f"test_{stem}.py"
        near = TESTS / "unit" / folder
        files.sort(key=lambda file: (file != own, file.parent != near))
    return [str(file) for file in files]


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("test_*.py"))


def _first_failure(log: str) -> str:
    lines = [line for line in log.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split(" - ")[0].rpartition("/")[2] if lines else "import"


class _Finder(MetaPathFinder):
    """Gives a mutated source in place of the module's own."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.mutant.module:
            return None
        file = str(SOURCE / self.mutant.path)
        return importlib.util.spec_from_file_location(name, file, loader=_Loader(name, file, self.mutant.source))


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, mutated: str) -> None:
        super().__init__(name, path)
        self.mutated = mutated

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.mutated, self.path, "exec", dont_inherit=True)


if __name__ == "__main__":
    main()
