"""Time and memory of repeated runs."""

import ctypes
import dataclasses
import gc
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is decoded.

    Attributes:
        batch_size: number of rows.
        prompt_tokens: tokens of every row's prompt.
        new_tokens: new tokens of every row; the first comes from the prefill.
        repeats: number of runs after the first one, which compiles.
    """

    batch_size: int = 1
    prompt_tokens: int = 32
    new_tokens: int = 64
    repeats: int = 5


@dataclasses.dataclass(frozen=True)
class Timing:
    """One run, in seconds: the prefill with the first token, and `steps` decoding steps after it."""

    prefill: float
    decode: float
    steps: int

    @property
    def total(self) -> float:
        return self.prefill + self.decode


class MemoryMeter:
    """Peak memory while decoding: of the accelerator's allocator, or of this process.

    A process also holds libraries, compiled programs and what loading left behind, all of which depend on the
    file's format more than on the method. So it counts the weights by their bytes, and what resident memory
    grows by at most while it decodes: caches and temporaries.
    """

    def __init__(self):
        self._before: int | None = None

    def start(self) -> None:
        """Begins to measure: all is loaded and compiled by now, and nothing is decoding."""
        # Garbage, and freed memory that the C library keeps, would be filled before the process grows.
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self._before = _resident_bytes("VmRSS")

    def peak_bytes(self, weight_bytes: int, device: Any = None) -> int | None:
        """Peak memory in bytes, weights included; None where the system does not tell.

        Args:
            weight_bytes: bytes of all weights in memory.
            device: a JAX device, whose own statistics are taken where it has them.
        """
        device_statistics = device and device.memory_stats()
        if device_statistics:
            return device_statistics["peak_bytes_in_use"]
        peak = _resident_bytes("VmHWM")
        return None if self._before is None or peak is None else weight_bytes + max(0, peak - self._before)


def _resident_bytes(field: str) -> int | None:
    """`VmRSS` (now) or `VmHWM` (the peak), on Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return 1024 * int(re.search(rf"^{field}:\s*(\d+)", status, re.MULTILINE)[1])


def time_runs(run: Callable[[], Timing], repeats: int, memory: MemoryMeter) -> dict[str, Any]:
    """Figures of a run that is repeated; the first time, which compiles, counts apart.

    Returns:
        `ms_per_token`, a step's time, `prefill_ms`, medians; `first_token_s` and `compile_s` of the first
        run; `cores`, how many CPU cores were busy; `times_ms`, a step's in every run.
    """
    first = run()
    memory.start()
    cpu = time.process_time()
    timings = [run() for _ in range(repeats)]
    cpu = time.process_time() - cpu
    per_step = [1e3 * timing.decode / timing.steps for timing in timings]
    totals = [timing.total for timing in timings]
    return {
        "ms_per_token": statistics.median(per_step),
        "prefill_ms": 1e3 * statistics.median(timing.prefill for timing in timings),
        "first_token_s": first.prefill,
        "compile_s": max(0.0, first.total - statistics.median(totals)),
        "cores": cpu / sum(totals),
        "times_ms": per_step,
    }


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a fresh process; its errors are raised here."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process ended without a result, for lack of memory perhaps: try a smaller model, dtype "
                "or batch"
            ) from error
