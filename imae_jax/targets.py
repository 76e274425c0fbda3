"""Accelerators by name: their data sheets, and XLA's compilers for them, which need no accelerator.

The compilers come with JAX's own packages (extras `plan-tpu` and `plan-gpu`) and compile for abstract
devices. Such a program says what it holds and computes; nothing can run it here.

Sources of the figures: Google's [TPU pages](https://docs.cloud.google.com/tpu/docs/v5p) (each kind has one),
NVIDIA's data sheets of the [A100](https://www.nvidia.com/en-us/data-center/a100/),
[H100](https://www.nvidia.com/en-us/data-center/h100/) (SXM), [H200](https://www.nvidia.com/en-us/data-center/h200/)
and [HGX B200](https://www.nvidia.com/en-us/data-center/hgx/), and its table of
[compute capabilities](https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities).
"""

import contextlib
import dataclasses
import math
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from imae_jax.errors import UserError, first_line

if TYPE_CHECKING:
    import jax


# The compilers by the extra that installs them: what each is called, and the packages of which it is one.
COMPILERS = {
    "plan-tpu": ("XLA's compiler for TPUs", ("libtpu",)),
    "plan-gpu": ("XLA's compiler for GPUs", ("jax-cuda12-plugin", "jax-cuda13-plugin")),
}
CUDA = ("jax_cuda12_plugin", "jax_cuda13_plugin")
CUDA_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
# What libtpu sets while it starts, though there is no TPU.
TPU_VARIABLES = ("TPU_WORKER_ID", "CLOUD_TPU_TASK_ID", "TPU_ACCELERATOR_TYPE", "CLOUD_TPU_ACCELERATOR_TYPE")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler must know of a GPU.

    Attributes:
        capability: major number of its compute capability; the minor one is 0.
        cores: streaming multiprocessors.
        l2: MiB of its L2 cache.
        clock: GHz, boosted.
    """

    capability: int
    cores: int
    l2: int
    clock: float


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of accelerator as its vendor publishes it.

    Attributes:
        memory: GB (10⁹ bytes) of a device. Devices report up to 7 % more (an H200 140 GiB, where 141 GB are
            131 GiB): that is left to the runtime and to fragmentation.
        bandwidth: GB/s of its memory.
        tflops: 10¹² bfloat16 operations a second, of dense matrices.
        kinds: names that JAX has for such a device (`jax.Device.device_kind`).
        gpu: for XLA, of a GPU.
        axes: dimensions of the grid of a TPU's slice, 2 or 3; 0 where its compiler is not asked.
    """

    memory: int
    bandwidth: int
    tflops: int
    kinds: tuple[str, ...]
    gpu: Gpu | None = None
    axes: int = 0

    @property
    def extra(self) -> str | None:
        """The extra that installs its compiler; None where there is no compiler to ask."""
        if self.gpu is not None:
            return "plan-gpu"
        return "plan-tpu" if self.axes else None

    @property
    def compiler(self) -> str | None:
        """What its compiler is called, with its version; None where it is not installed."""
        from importlib.metadata import PackageNotFoundError, version  # Not with every command.

        name, packages = COMPILERS.get(self.extra, (None, ()))
        for package in packages:
            with contextlib.suppress(PackageNotFoundError):
                return f"{name} ({package} {version(package)})"
        return None


AMPERE, HOPPER = Gpu(8, 108, 40, 1.41), Gpu(9, 132, 50, 1.98)
TARGETS = {
    # Of GPUs the SXM boards: others of the same name, such as an H100 PCIe, are slower.
    "a100-40gb": Target(40, 1555, 312, ("NVIDIA A100-SXM4-40GB",), AMPERE),
    "a100": Target(80, 2039, 312, ("NVIDIA A100-SXM4-80GB",), AMPERE),
    "h100": Target(80, 3350, 989, ("NVIDIA H100 80GB HBM3",), HOPPER),
    "h200": Target(141, 4800, 989, ("NVIDIA H200",), HOPPER),
    "b200": Target(180, 8000, 2250, ("NVIDIA B200",), Gpu(10, 148, 126, 1.965)),
    # XLA counts two devices a chip of v4, which its users see as one.
    "v4": Target(32, 1228, 275, ("TPU v4",)),
    "v5e": Target(16, 819, 197, ("TPU v5 lite", "TPU v5e"), axes=2),
    "v5p": Target(95, 2765, 459, ("TPU v5", "TPU v5p"), axes=3),
    "v6e": Target(32, 1638, 918, ("TPU v6 lite", "TPU v6e"), axes=2),
}


def find(name: str) -> Target:
    """The target of a name, or a `UserError`."""
    if name not in TARGETS:
        raise UserError(f"--device {name} is not known: use one of {', '.join(TARGETS)}")
    return TARGETS[name]


def of_kind(kind: str) -> Target | None:
    """The target that a device is (`jax.Device.device_kind`); None where its data sheet is not known."""
    return next((target for target in TARGETS.values() if kind in target.kinds), None)


def leave_out() -> None:
    """Keeps the compilers out of a process without accelerator, before it imports JAX.

    JAX would take them for drivers, load them at once, look for devices in vain and say so at length.
    """
    absent = "jax" not in sys.modules and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu"
    if absent and any(map(find_spec, ("libtpu", *CUDA))) and not has_accelerator():
        os.environ["JAX_PLATFORMS"] = "cpu"
        for name in CUDA:
            sys.modules[name] = None  # As if it were not installed.
        for name in CUDA_PLUGINS:
            # JAX calls `initialize` of every plug-in that it finds, whatever the platform.
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].initialize = lambda: None


def let_in() -> None:
    """Undoes `leave_out`. Of JAX that was imported before, `attention=flash` does not compile for GPUs."""
    for name in (*CUDA, *CUDA_PLUGINS):
        if getattr(sys.modules.get(name), "__spec__", None) is None:
            sys.modules.pop(name, None)
    with _quiet():
        import jax  # noqa: F401


def has_accelerator() -> bool:
    """Whether this machine may have a TPU, or an NVIDIA or AMD GPU that this process may see."""
    gpus = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
    # In a container the PCI devices below need not show; TPU hosts set variables for libtpu.
    if any(map(os.path.exists, (*gpus, "/dev/accel0", "/dev/vfio/0"))) or "TPU_WORKER_ID" in os.environ:
        return True
    google = "0x1ae0"
    return any(path.read_text().strip() == google for path in Path("/sys/bus/pci/devices").glob("*/vendor"))


def abstract_devices(name: str, number: int) -> "list[jax.Device]":
    """Devices to compile for.

    Args:
        name: of `TARGETS`.
        number: how many. TPUs are the first ones of the smallest slice that holds them.

    Raises:
        UserError: the name is not known, or the compiler not installed, or it does not start.
    """
    target = find(name)
    if target.compiler is None:
        how = f"pip install 'imae-jax[{target.extra}]'" if target.extra else "choose another device"
        raise UserError(f"--device {name}: there is no compiler for it here: {how}")
    if target.gpu is not None:
        let_in()
    from jax.experimental.topologies import get_topology_desc

    # The TPU's would write logs to a directory of its own, ask the network what machine this is, and refuse
    # to be loaded by two processes, as if they wanted one device.
    for variable, value in (
        ("TPU_LOG_DIR", "disabled"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(variable, value)
    with _quiet() as said:
        try:
            if target.gpu is not None:
                options = {"target_config": _description(name, target), "topology": f"1x1x{number}"}
                topology = get_topology_desc(name, "cuda", **options)
            else:
                options = {"chips_per_host_bounds": (1, 1, 1)} if number == 1 else {}
                grid = "x".join(map(str, _slice(number, target.axes)))
                topology = get_topology_desc(f"{name}:{grid}", "tpu", **options)
        except (RuntimeError, NotImplementedError) as error:  # JAX's own are of these kinds.
            reason = first_line(error) or said()
            raise UserError(f"--device {name}: {target.compiler} does not start: {reason}") from error
    for variable in TPU_VARIABLES:
        if variable not in os.environ:  # Set in C: child processes would take this for a TPU's host.
            os.unsetenv(variable)
    return list(topology.devices[:number])


def _slice(number: int, axes: int) -> tuple[int, ...]:
    """The grid of the smallest slice of TPUs with so many chips, such as 2×4, or 2×2×1."""
    # Four chips share a host: between 1 and 4 there is no slice.
    exponent = 0 if number == 1 else max(2, math.ceil(math.log2(number)))
    sizes = [2 ** ((exponent + i) // axes) for i in range(axes)]
    return tuple(sizes[::-1] if exponent == 2 else sizes)


def _description(name: str, target: Target) -> str:
    """A GPU as XLA's text proto `GpuTargetConfigProto`, with what its compiler asks for."""
    gpu, hopper = target.gpu, target.gpu.capability >= 9
    # One kilobyte of a multiprocessor's shared memory belongs to the system.
    shared = (228 if hopper else 164) * 1024
    extension = "feature_extension: ACCELERATED_FEATURES" if hopper else ""
    return f"""
        platform_name: "CUDA"
        device_description_str: "{name}"
        dnn_version_info {{ major: 9 minor: 8 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {gpu.capability} {extension} }}
          core_count: {gpu.cores}  fpus_per_core: {128 if hopper else 64}  clock_rate_ghz: {gpu.clock}
          threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
          block_dim_limit_x: {2**31 - 1}  block_dim_limit_y: 65535  block_dim_limit_z: 65535
          registers_per_block_limit: 65536  registers_per_core_limit: 65536
          shared_memory_per_block: {48 * 1024}  shared_memory_per_core: {shared}
          shared_memory_per_block_optin: {shared - 1024}
          l2_cache_size: {gpu.l2 * 2**20}
          device_memory_size: {target.memory * 10**9}  memory_bandwidth: {target.bandwidth * 10**9}
        }}"""


@contextlib.contextmanager
def _quiet() -> Iterator:
    """Keeps from stderr what the compilers' libraries write to it while they start: that there is no device.

    Yields:
        A function for the last line that they wrote.
    """
    with tempfile.TemporaryFile("w+") as file:

        def last_line() -> str:
            file.seek(0)
            return (file.read().strip().splitlines() or ["no reason given"])[-1]

        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield last_line
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
