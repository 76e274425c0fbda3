"""Benchmarks: each file of this folder that defines a `BENCHMARK` is one, under the file's name."""

import importlib
import pkgutil

from imae_jax.evaluate.benchmarks.benchmark import Benchmark


def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by the names of their files."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module.BENCHMARK for name, module in modules.items() if hasattr(module, "BENCHMARK")}


def benchmark_named(name: str) -> Benchmark | None:
    """The benchmark whose name results have in their field `benchmark`; None where it does not exist."""
    return next((each for each in benchmarks().values() if each.name == name), None)
