"""`python -m imae_jax.train plan`: shows the memory that a run needs on each device; see `plan`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from imae_jax import runtime
from imae_jax.cli import ArgumentParser, command
from imae_jax.errors import UserError

if TYPE_CHECKING:
    from imae_jax.train.config import TrainConfig

# Memory of one device as its vendor publishes it, counted as GB = 10^9 bytes. Devices report up to 7 % more
# (an H200 140 GiB, where 141 GB are 131 GiB): that is left to the runtime and to fragmentation.
DEVICES = {
    "a100-40gb": 40,
    "a100": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
    "v4": 32,
    "v5e": 16,
    "v5p": 95,
    "v6e": 32,
}


def _set_up_devices(config: "TrainConfig", number: int | None, here: bool) -> None:
    """Gives this process as many CPU devices as the run's mesh has, before JAX looks for any."""
    runtime.set_up()
    import jax

    # A program from the cache does not know its memory.
    jax.config.update("jax_enable_compilation_cache", False)
    if here:
        return
    sizes = config.mesh
    if number is None:
        number = abs(sizes.data) * sizes.fsdp * sizes.tensor
    if number < 1:
        raise UserError(f"a run on {number} devices: give at least 1")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)


def _capacity(device: str, memory: float | None) -> tuple[str, float]:
    """What a device is called, and its memory in bytes."""
    if memory is not None:
        if not memory > 0:
            raise UserError(f"--memory {memory:g}: give GiB above 0")
        return f"a device of {memory:g} GiB", memory * 2**30
    if device not in DEVICES:
        raise UserError(f"--device {device} is not known: use one of {', '.join(DEVICES)}, or --memory GIB")
    return device, DEVICES[device] * 1e9


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan; exit code 1 if it does not fit."""
    parser = ArgumentParser(
        prog="python -m imae_jax.train plan",
        description="Prints the memory that a training run needs on each device, without its weights and "
        "without allocating anything. Exit code 1: it does not fit.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, or the name of a shipped config")
    parser.add_argument("--device", default="h200", help=f"one of {', '.join(DEVICES)} (default: h200)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of one device, instead of --device")
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="how many the run will have (default: the mesh's; with mesh.data=-1 those of one replica)",
    )
    parser.add_argument(
        "--here",
        action="store_true",
        help="compile for this machine's own devices, which must be as many as the mesh has, instead of "
        "virtual CPU devices",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="override a setting")
    args = parser.parse_intermixed_args(argv)
    if args.here and args.devices is not None:
        raise UserError("--devices goes without --here, which takes all devices of this machine")
    from imae_jax.train.config import load_config
    from imae_jax.train.loop import run_mesh
    from imae_jax.train.plan import largest_table, plan, plan_table, verdict

    # A plan writes nothing.
    config = load_config(args.config, ["out=unused", *args.settings])
    name, capacity = _capacity(args.device, args.memory)
    _set_up_devices(config, args.devices, args.here)
    mesh = run_mesh(config, bool(config.adapters_to_train()))
    stages = plan(config, mesh)

    from rich.console import Console

    console = Console()
    largest = max(stages, key=lambda stage: stage.total)
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(f"{config.model} on {mesh.size} × {name}: {sizes}")
    print(f"worst case: rows of data.max_length={config.data.max_length} tokens")
    console.print(plan_table(stages))
    console.print(largest_table(largest))
    print(verdict(config, largest, mesh, name, capacity))
    if largest.total > capacity:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
