"""How fast and how large a model is beside the one it was made from, and whether that is what was promised."""

from pat.benchmark.command import run_benchmark
from pat.benchmark.options import BenchmarkOptions
from pat.benchmark.tables import print_benchmark

__all__ = ["BenchmarkOptions", "print_benchmark", "run_benchmark"]
